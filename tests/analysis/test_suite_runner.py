"""Which run begins when, with how many threads, what is stopped, and what is shown."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from kd_suites import execute, fake_training, make_suite, registered_toy_data

from projects.kd.analysis import suite_runner, suites
from projects.kd.analysis.run_folders import Ended, bundle, run_logged
from projects.kd.analysis.suite_runner import (
    Console,
    SuiteRunner,
    execute_suite,
    fitting_on_gpu,
    number_of_jobs,
)
from projects.kd.errors import ConfigError


@pytest.fixture
def suite(tmp_path):
    with registered_toy_data(tmp_path):
        yield make_suite()


def quiet() -> Console:
    return Console(io.StringIO())


@pytest.fixture
def recorded(monkeypatch):
    """Trainings that last until they are released; (name of the row, threads) as they begin."""
    begun, gate, lock = [], threading.Semaphore(0), threading.Lock()

    def run(command, log, threads, on_line, on_start):
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        with lock:
            begun.append((folder.parts[-2] if "seed" in folder.name else folder.name, threads))
        gate.acquire()
        (folder / "metrics.json").write_text(json.dumps({"iteration": 9, "bbox/AP": 1.0}) + "\n")
        return Ended(0, None)

    monkeypatch.setattr(suites, "run_logged", run)
    monkeypatch.setattr(suite_runner.os, "cpu_count", lambda: 6)
    yield begun, gate
    gate.release(100)  # a failed test must not wait for them


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def in_background(runner, after=lambda: None):
    thread = threading.Thread(target=runner.execute, args=(after,))
    thread.start()
    return thread


def test_on_a_cpu_the_teacher_is_alone_and_has_all_cores(suite, tmp_path, recorded):
    begun, gate = recorded
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), [])
    thread = in_background(SuiteRunner(runs, 2, quiet()))
    wait_for(lambda: begun == [("teacher", 0)])
    gate.release()
    wait_for(lambda: len(begun) == 3)
    time.sleep(0.05)
    assert sorted(begun[1:]) == [("student", 3), ("student+X", 3)]
    gate.release(4)
    thread.join()
    assert len(begun) == 5 and {threads for _, threads in begun[1:]} == {3}


def test_plain_rows_begin_beside_the_teacher(suite, tmp_path, recorded):
    begun, gate = recorded
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), [])
    thread = in_background(SuiteRunner(runs, 3, quiet(), beside=True))
    wait_for(lambda: len(begun) == 3)
    assert sorted(begun) == [("student", 2), ("student", 2), ("teacher", 2)]
    gate.release(5)
    thread.join()
    assert sorted(begun[3:]) == [("student+X", 2), ("student+X", 2)]


def test_independent_teachers_share_the_cores_and_a_second_waits_for_its_start(
    suite, tmp_path, recorded
):
    begun, gate = recorded
    config = suite["rows"][0]["config"]
    suite["rows"] += [
        {"name": "origin", "config": config, "role": "start"},
        {"name": "tuned", "config": config, "role": "start", "init": "origin"},
    ]
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    thread = in_background(SuiteRunner(runs, 3, quiet()))
    wait_for(lambda: len(begun) == 2)
    time.sleep(0.05)
    assert sorted(begun) == [("origin", 2), ("teacher", 2)]  # and not tuned
    gate.release(5)
    thread.join()
    assert begun[2] == ("tuned", 2)


def test_reports_come_between_and_not_at_the_end(suite, tmp_path, monkeypatch):
    fake_training(monkeypatch, [30.0, 1.0, 4.0])
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    seen = []
    assert SuiteRunner(runs, 1, quiet()).execute(lambda: seen.append(1)) is True
    assert len(seen) == 2  # the last one is written with what is measured at the end


def test_a_failure_lets_the_others_finish_and_begins_none(suite, tmp_path, monkeypatch):
    begun = []

    def run(command, log, threads, on_line, on_start):
        begun.append(command)
        Path(log).write_text("error: broken\n")
        return Ended(int(len(begun) == 2), None)

    monkeypatch.setattr(suites, "run_logged", run)
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), [])
    with pytest.raises(ConfigError, match="student, seed 1 failed .status 1.: error: broken"):
        SuiteRunner(runs, 1, quiet()).execute(lambda: None)
    assert len(begun) == 2


def test_the_deadline_stops_a_run_that_goes_on_later(suite, tmp_path, monkeypatch):
    """Real processes: one that would sleep for a minute is ended, and executed again later."""
    seconds = [60]

    def run(command, log, threads, on_line, on_start):
        script = f"import time; print(1, flush=True); time.sleep({seconds[0]})"
        sleeping = [sys.executable, "-c", script]
        return run_logged(sleeping, log, threads, on_line, on_start)

    monkeypatch.setattr(suites, "run_logged", run)
    suite["rows"] = suite["rows"][1:2]
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    console = quiet()
    start = time.monotonic()
    assert execute_suite(runs, 1, lambda: None, minutes=0.01, console=console) is False
    assert time.monotonic() - start < 50 and runs[0].finished() is None
    assert "1 of 1 runs are left; the same command goes on" in console.stream.getvalue()
    (attempt,) = map(json.loads, (Path(runs[0].dir) / "attempts.jsonl").read_text().splitlines())
    assert attempt["status"] == -15
    seconds[0] = 0
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    assert execute_suite(runs, 1, lambda: None, minutes=5, console=quiet()) is True
    assert runs[0].finished()["seconds"] >= attempt["seconds"]  # both attempts count


def test_a_run_that_does_not_stop_is_killed_after_a_minute(suite, tmp_path, monkeypatch):
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    runner = SuiteRunner(runs, 1, quiet())
    runner._running = {object(): runs[0]}
    now, asked = [10.0], []
    monkeypatch.setattr(suite_runner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runs[0], "stop", lambda kill: asked.append((now[0], kill)))
    for now[0] in (10.0, 11.0, 70.0, 70.5):
        runner._stop()
    assert asked == [(10.0, False), (70.5, True)] and not runner._waiting


def test_jobs_are_a_number_or_one_for_every_two_cores(suite, tmp_path, monkeypatch):
    assert number_of_jobs("3") == 3 and number_of_jobs("auto") == "auto"
    for text in ("0", "-1", "many", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            number_of_jobs(text)
    fake_training(monkeypatch, [30.0, 1.0, 4.0])
    monkeypatch.setattr(suite_runner.os, "cpu_count", lambda: 16)
    made = []
    runner = suite_runner.SuiteRunner
    monkeypatch.setattr(
        suite_runner, "SuiteRunner", lambda *a, **k: made.append(a[1]) or runner(*a, **k)
    )
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    assert execute_suite(runs, "auto", lambda: None, console=quiet()) and made == [8]


def test_as_many_runs_as_the_gpu_has_memory_for(suite, tmp_path):
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), [])
    fitting = fitting_on_gpu(runs, 20 * 2**30)
    assert fitting() == 5  # nothing is known yet
    runs[1].gpu_peak_mb = 4000 * 1.048576
    # 1.5 x 4000 MiB + 1024 MiB each: 20480 / 7024
    assert fitting() == 2


def test_memory_is_that_of_the_process_alone(tmp_path):
    """A parent of more than 200 MB does not count for a child that has less."""
    ballast = bytearray(200_000_000)
    script = "import time; x = b'1' * 60_000_000; print(1, flush=True); time.sleep(0.5)"
    ended = run_logged([sys.executable, "-c", script], str(tmp_path / "log"), 1)
    assert ended.status == 0 and 60e6 < ended.peak_bytes < 150e6
    assert (tmp_path / "log").read_text() == "1\n" and len(ballast) == 200_000_000


def test_a_bundle_holds_reports_and_logs_alone(suite, tmp_path, monkeypatch):
    fake_training(monkeypatch, [30.0, 1.0, 4.0])
    output = tmp_path / "out"
    execute(suite, output, seeds=[1])
    for path in ("teacher/model_final.pth", "student/seed1/model_final.pth"):
        (output / "runs" / path).write_bytes(b"0" * 1000)
    file = tmp_path / "new" / "small.tar.gz"
    count = bundle(str(output), str(file))
    with tarfile.open(file) as archive:
        names = archive.getnames()
        report = json.load(archive.extractfile("out/report.json"))
    assert len(names) == count and report["title"] == "test"
    assert "out/runs/student/seed1/metrics.json" in names and "out/report.html" in names
    assert not [name for name in names if name.endswith(".pth") or "inference" in name]
    assert os.listdir(tmp_path / "new") == ["small.tar.gz"]
    blocked = tmp_path / "out" / "report.md" / "x.tar.gz"
    with pytest.raises(ConfigError, match="--bundle: .* cannot be written"):
        bundle(str(output), str(blocked))


# --- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(monkeypatch):
    monkeypatch.setattr(suite_runner.os, "get_terminal_size", lambda fd: os.terminal_size((20, 5)))
    terminal = Console(Terminal())
    terminal.show("ETA 1:00; 1 of 3 runs done")
    terminal.show("ETA 0:50")
    terminal.say("done")
    shown = terminal.stream.getvalue()
    assert shown == "\r\033[KETA 1:00; 1 of 3 r…\r\033[KETA 0:50\r\033[Kdone\n"
    plain = Console(io.StringIO())
    plain.show("ETA 1:00")
    plain.show("ETA 0:59")  # within 15 seconds
    plain.say("done")
    assert plain.stream.getvalue() == "ETA 1:00\ndone\n"
    plain._shown -= 15
    plain.show("ETA 0:30")
    assert plain.stream.getvalue().endswith("done\nETA 0:30\n")
