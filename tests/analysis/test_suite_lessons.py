"""What a distilled row says of its teacher, whose row may change the model of its config file."""

import pytest

from projects.kd.analysis.suites import make_runs

TEACHER = {
    "name": "teacher",
    "role": "teacher",
    "config": "configs/shapes/faster_rcnn_teacher.yaml",
}
CASCADE = [
    "MODEL.ROI_HEADS.NAME",
    "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
    True,
]
DISTILLED = {
    "name": "distilled",
    "config": "configs/shapes/faster_rcnn_student_distilled.yaml",
    "teacher": "teacher",
}


def _teacher_of_a_run(teacher_opts=(), suite_opts=(), row_opts=()):
    rows = [{**TEACHER, "opts": list(teacher_opts)}, {**DISTILLED, "opts": list(row_opts)}]
    suite = {"dataset": "shapes_val", "opts": list(suite_opts), "rows": rows}
    return make_runs(suite, [1], "out", [])[-1].cfg.KD.TEACHER


def test_options_of_the_teachers_model_go_along():
    found = _teacher_of_a_run(["SOLVER.MAX_ITER", 9, *CASCADE], ["MODEL.RPN.NMS_THRESH", 0.6])
    assert found.OPTS == ["MODEL.RPN.NMS_THRESH", 0.6, *CASCADE]
    assert found.WEIGHTS == "out/runs/teacher/model_final.pth"


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.MAX_ITER", 9, "INPUT.MIN_SIZE_TEST", 64],
        ["MODEL.WEIGHTS", "start.pth", "MODEL.DEVICE", "cpu"],
        ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],  # as in its config
    ],
)
def test_options_that_leave_the_model_as_it_is_do_not(opts):
    assert _teacher_of_a_run(opts).OPTS == []


def test_what_the_row_itself_says_stays():
    own = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3]
    assert _teacher_of_a_run(CASCADE, row_opts=["KD.TEACHER.OPTS", own]).OPTS == own
