"""Gains, gaps closed, what is marked, and the closing sentences."""

from __future__ import annotations

import statistics

import pytest

from projects.kd.analysis.comparison import compare_rows, pooled_deviation, sentences, warnings
from projects.kd.analysis.report import summarise
from projects.kd.analysis.report_tables import result_table


def row(name, *seeds, baseline="student", teacher="teacher", distilled=None, **facts):
    return summarise(
        name,
        [{"AP": value} for value in seeds],
        baseline=baseline,
        teacher=teacher,
        distilled="+" in name if distilled is None else distilled,
        **facts,
    )


def compared(*rows):
    found = compare_rows(list(rows), "AP")
    return found, {x["name"]: x for x in found}


def test_gap_closed_is_the_gain_in_parts_of_the_teachers_lead():
    _, by_name = compared(
        row("teacher", 50.0), row("student", 20.0), row("student+A", 35.0), row("student+B", 14.0)
    )
    assert by_name["student+A"]["gain"] == 15.0 and by_name["student+A"]["gap_closed"] == 50.0
    assert by_name["student+B"]["gap_closed"] == -20.0 and by_name["student+B"]["below"]
    assert "gain" not in by_name["student"] and "gap_closed" not in by_name["teacher"]
    assert by_name["teacher"]["gain"] == 30.0 and "below" not in by_name["teacher"]


def test_a_gain_is_clear_above_twice_the_pooled_deviation():
    a, b = [10.0, 11.0, 12.0], [13.0, 15.0]
    # by hand: (2 * 1 + 1 * 2) / 3
    assert pooled_deviation(a, b) == pytest.approx((4 / 3) ** 0.5)
    weighed = 2 * statistics.variance(a) + statistics.variance(b)
    assert pooled_deviation(b, a) == pytest.approx((weighed / 3) ** 0.5)
    assert pooled_deviation([1.0], a) is None and pooled_deviation(a, []) is None
    # both deviations are 1: two seeds each, and the limit is 2
    half = 0.5**0.5
    _, by_name = compared(
        row("student", 20 - half, 20 + half),
        row("student+A", 22.01 - half, 22.01 + half),
        row("student+B", 21.99 - half, 21.99 + half),
        row("student+C", 40.0),
    )
    assert by_name["student+A"]["clear"] is True and by_name["student+B"]["clear"] is False
    assert by_name["student+C"]["clear"] is None
    text = result_table(list(by_name.values())).markdown()
    assert "| +2.0 clear |" in text and "| +2.0 |" in text and "| +20.0 |" in text
    assert "twice the pooled sample deviation of the row and its baseline" in text


def test_a_row_below_its_baseline_is_marked_and_named():
    rows, _ = compared(
        row("teacher", 50.0), row("student", 20.0), row("student+A", 26.0), row("student+B", 19.5)
    )
    text = result_table(rows).markdown()
    assert "| -0.5 below |" in text and "below: a distilled row" in text
    (sentence,) = sentences(rows, "AP")
    assert sentence == (
        "student 20.0, distilled (A) 26.0: +6.0 AP; teacher 50.0. "
        "Below student: student+B 19.5 (-0.5)."
    )
    only, _ = compared(row("student", 20.0), row("student+B", 19.5))
    (sentence,) = sentences(only, "AP")  # the best one is below: it is named all the same
    assert sentence == (
        "student 20.0, distilled (B) 19.5: -0.5 AP. Below student: student+B 19.5 (-0.5)."
    )


def test_the_sentence_says_size_and_speed():
    def measured(name, *seeds, mb, ms):
        return row(name, *seeds, model_mb=mb, latency_ms=ms)

    teacher = measured("teacher", 55.0, mb=48.0, ms=61.0)
    plain = measured("student", 20.0, 22.0, 21.0, mb=2.25, ms=9.9)
    best = measured("student+CWD", 29.0, 29.4, 29.8, mb=2.25, ms=10.2)
    rows, _ = compared(teacher, plain, best)
    (sentence,) = sentences(rows, "AP", "on 1 CPU thread")
    assert sentence == (
        "student 21.0, distilled (CWD) 29.4: +8.4 AP, mean of 3 seeds; teacher 55.0 (48.0 MB, "
        "61.0 ms); same size (2.2 MB) and same speed at inference (10.2 ms an image), on 1 CPU "
        "thread."
    )
    rows, _ = compared(plain, {**best, "latency_ms": 14.0, "model_mb": 2.5})
    assert "2.5 MB for 2.2 MB, 14.0 ms an image at inference for 9.9 ms" in sentences(rows, "AP")[0]


def test_each_group_is_counted_from_its_own_baseline_and_teacher():
    long = {"baseline": "long", "teacher": "big"}
    rows, by_name = compared(
        row("teacher", 50.0),
        row("big", 60.0),
        row("student", 20.0),
        row("student+A", 30.0),
        row("long", 40.0, **long),
        row("long+A", 45.0, **long),
        row("long+B", 38.0, **long),
    )
    assert (by_name["long+A"]["gain"], by_name["long+A"]["gap_closed"]) == (5.0, 25.0)
    assert by_name["student+A"]["gap_closed"] == pytest.approx(33.3)
    first, second = sentences(rows, "AP")
    assert first == "student 20.0, distilled (A) 30.0: +10.0 AP; teacher 50.0."
    assert second == (
        "long 40.0, distilled (A) 45.0: +5.0 AP; big 60.0. Below long: long+B 38.0 (-2.0)."
    )
    assert result_table(rows).header[-1] == "baseline"
    assert result_table(rows[:4]).header[-1] != "baseline"


def test_a_teacher_that_is_not_better_is_said():
    rows, by_name = compared(row("teacher", 20.0), row("student", 20.0), row("student+A", 21.0))
    assert warnings(rows, "AP") == [
        "The teacher 'teacher' (AP 20.0) is not better than the baseline 'student' (20.0): it has "
        "nothing to teach."
    ]
    assert "gap_closed" not in by_name["student+A"]
    rows, by_name = compared(row("teacher", 20.9), row("student", 20.0), row("student+A", 29.0))
    assert warnings(rows, "AP") == []
    assert "gap_closed" not in by_name["student+A"]  # 1000 % would say nothing
    _, by_name = compared(row("teacher", 21.0), row("student", 20.0), row("student+A", 20.5))
    assert by_name["student+A"]["gap_closed"] == 50.0


def test_unfinished_groups_say_nothing():
    rows, by_name = compared(row("teacher", 50.0), row("student+A", 26.0))
    assert sentences(rows, "AP") == [] and "gain" not in by_name["student+A"]
    undefined = summarise("student", [{}], baseline="student")
    rows, _ = compared(undefined, row("student+A", 26.0))
    assert sentences(rows, "AP") == [] and warnings(rows, "AP") == []
