"""metrics.json has every iteration once; a log that cannot be written is said once, no more."""

import json
import logging
import os
import random

import pytest
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from projects.kd.engine import writers
from projects.kd.engine.writers import LogFile, build_writers, keep_before


def write_steps(folder, start, steps, period=2):
    made = build_writers(str(folder), start)
    with EventStorage(start) as storage:
        for iteration in range(start, start + steps):
            storage.iter = iteration
            storage.put_scalar("loss", float(iteration), smoothing_hint=False)
            if (iteration + 1) % period == 0:
                for writer in made:
                    writer.write()
        for writer in made:
            writer.write()
            writer.close()


def iterations(folder):
    return [json.loads(line)["iteration"] for line in open(folder / "metrics.json")]


def test_random_kills_leave_every_iteration_once(tmp_path):
    choose = random.Random(3)
    start = 0
    for _ in range(25):  # killed after some steps, resumed from an earlier checkpoint
        steps = choose.randrange(1, 8)
        write_steps(tmp_path, start, steps)
        path = tmp_path / "metrics.json"
        if choose.random() < 0.5:  # killed while it wrote a line
            path.write_bytes(path.read_bytes()[: -choose.randrange(1, 20)])
        start = max(start, start + steps - choose.randrange(0, 4))
    write_steps(tmp_path, start, 4)
    found = iterations(tmp_path)
    assert found == sorted(set(found)) and found[-1] == start + 3
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == sorted(set(steps)) and steps[-1] == start + 3
    assert all(event.value == event.step for event in events.Scalars("loss"))


def test_a_file_of_another_run_is_moved_aside(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    for number in (1, 2):
        path.write_text('{"iteration": 3, "loss": 1.0}\n')
        keep_before(str(path), 0)
        assert not path.exists() and (tmp_path / f"metrics.json.{number}").exists()
    path.write_text('{"iteration": 3}\n{"iteration": 4}\n')
    before = path.stat().st_ino
    keep_before(str(path), 5)
    assert path.stat().st_ino == before and iterations(tmp_path) == [3, 4]


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device /dev/full")


@needs_full
def test_a_full_disk_ends_a_log_but_not_the_run(tmp_path, caplog, monkeypatch):
    (tmp_path / "metrics.json").symlink_to("/dev/full")
    opened = open

    def open_event_file(path, *args, **kwargs):
        return opened("/dev/full" if "tfevents" in str(path) else path, *args, **kwargs)

    monkeypatch.setattr(writers, "open", open_event_file, raising=False)
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, 0, 9)
    lines = [record.getMessage() for record in caplog.records]
    end = "cannot be written: No space left on device; training goes on without it"
    assert lines == [f"metrics.json {end}", f"the event file of TensorBoard {end}"]


@needs_full
def test_a_full_disk_is_said_once_for_the_log(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    missing = LogFile(str(tmp_path / "none" / "log.txt"))
    full = LogFile(str(tmp_path / "log.txt"))
    for handler in (missing, full):
        log = logging.Logger("test")
        log.addHandler(handler)
        for _ in range(3):
            log.warning("a line")
        handler.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "No space left on device" in lines[1]
    assert all("cannot be written" in line for line in lines)
