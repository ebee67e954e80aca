"""The time left of a suite: all rows, jobs, resumed runs and seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kd_suites import make_suite, registered_toy_data

from projects.kd.analysis import suites
from projects.kd.analysis.suite_clock import Clock, duration


@pytest.fixture
def suite(tmp_path):
    with registered_toy_data(tmp_path):
        yield make_suite()


LINE = "[07/27 12:00:00 kd]: {}/200 (5 %), 0:00:01 left | loss 3: cls 3 | {} s a step, lr 1\n"


class Now:
    """A clock that tests set."""

    def __init__(self):
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def clock_of(suite, tmp_path, jobs, iterations, **options):
    suite["opts"] = ["SOLVER.MAX_ITER", iterations]
    suite["rows"][2]["opts"] = ["SOLVER.MAX_ITER", 2 * iterations]
    runs = suites.make_runs(suite, [1], str(tmp_path), [])
    now = Now()
    return runs, Clock(runs, jobs, now=now, **options), now


def test_time_left_counts_all_rows_and_jobs(suite, tmp_path):
    runs, clock, now = clock_of(suite, tmp_path, 2, 100)
    teacher, student, distilled = runs
    assert clock.seconds_left() is None and clock.line().startswith("ETA not known yet; 0 of 3")
    clock.start(teacher)
    now.time += 10
    clock.read(teacher, LINE.format(20, 0.5))
    # 80 iterations of the teacher, then 100 and 200 side by side, all at 0.5 s
    assert clock.seconds_left() == pytest.approx(40 + 100)
    now.time += 20
    clock.read(teacher, LINE.format(40, 0.5))  # 20 iterations took 20 s, an evaluation included
    assert clock.seconds_left() == pytest.approx(60 + 200)
    clock.finish(teacher)  # at its last line: the end took no time
    clock.start(student)
    clock.start(distilled)
    clock.read(student, LINE.format(50, 0.2))
    clock.read(distilled, LINE.format(100, 0.4))
    assert clock.seconds_left() == pytest.approx(40)  # 100 at 0.4 beside 50 at 0.2
    assert clock.line() == (
        "ETA 0:40; 1 of 3 runs done; student, seed 1 50/100; student+X, seed 1 100/200"
    )
    now.time += 5
    clock.read(student, LINE.format(100, 0.2))
    now.time += 7
    clock.finish(student)  # the last evaluations took 0 and 7 s, another will take the mean
    clock.read(distilled, LINE.format(200, 0.2))
    now.time += 3
    assert clock.seconds_left() == pytest.approx(0.5)
    now.time += 30
    assert clock.seconds_left() == 0.0
    clock.finish(distilled)
    assert clock.seconds_left() == 0.0 and clock.line() == "ETA 0:00; 3 of 3 runs done"


def test_one_after_another_takes_the_sum(suite, tmp_path):
    runs, clock, now = clock_of(suite, tmp_path, 1, 100)
    clock.start(runs[0])
    clock.read(runs[0], LINE.format(20, 0.5))
    assert clock.seconds_left() == pytest.approx(40 + 50 + 100)


def test_rows_may_be_beside_the_teacher(suite, tmp_path):
    runs, clock, now = clock_of(suite, tmp_path, 2, 100, beside=True)
    clock.start(runs[0])
    clock.start(runs[1])
    clock.read(runs[0], LINE.format(20, 1.0))
    clock.read(runs[1], LINE.format(20, 0.5))
    # 80 s beside 40 s, then 200 iterations at the mean of what is known
    assert clock.seconds_left() == pytest.approx(40 + 200 * 0.75)


def test_resumed_and_finished_runs_count_with_what_is_left(suite, tmp_path):
    suite["opts"] = ["SOLVER.MAX_ITER", 100]
    teacher, student, distilled = suites.make_runs(suite, [1], str(tmp_path), [])
    for run, lines in ((teacher, [0.5, 0.5]), (student, [0.25])):
        folder = Path(run.dir)
        folder.mkdir(parents=True)
        (folder / "settings").write_text(run.stamp())
        text = "".join(json.dumps({"iteration": 19, "time": t}) + "\n" for t in lines)
        (folder / "metrics.json").write_text(text)
    (Path(teacher.dir) / "finished.json").write_text('{"seconds": 56.0}')
    (Path(student.dir) / "last_checkpoint").write_text("model_0000059.pth")
    clock = Clock([teacher, student], 1)
    # 40 iterations at 0.25, and the 6 s that the teacher took beside its iterations
    assert clock.seconds_left() == pytest.approx(10 + 6)
    assert "1 of 2 runs done" in clock.line()
    student.opts += ["SOLVER.BASE_LR", 0.5]  # it will start anew
    assert student.iterations_done() == 0


def test_seeds_of_a_row_take_its_time(suite, tmp_path):
    runs = suites.make_runs(suite, [1, 2], str(tmp_path), ["SOLVER.MAX_ITER", 100])
    now = Now()
    clock = Clock(runs, 1, now=now)
    for run, rate in ((runs[0], 9.0), (runs[1], 0.5), (runs[2], 2.0)):
        clock.start(run)
        clock.read(run, LINE.format(100, rate))
    clock.works[id(runs[0])].state = 2
    # seeds 1 are at their ends; seeds 2 take 100 x 0.5 and 100 x 2
    assert clock.seconds_left() == pytest.approx(250)


def test_durations_read_like_clocks():
    assert [duration(x) for x in (0, 59.6, 3599, 3725)] == ["0:00", "1:00", "59:59", "1:02:05"]
