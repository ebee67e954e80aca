"""Evaluation of what is not the student (``kd-train --eval-only`` evaluates that one).

    kd-evaluate teacher --config-file CONFIG
    kd-evaluate visdrone --data VisDrone2019-DET-val --results FOLDER --output metrics.json

``kd-evaluate PART -h`` shows a part's flags.
"""

from ..parts import Parts

PARTS = Parts(
    __name__,
    __doc__,
    {
        "teacher": ("teacher", "the teacher of a distillation config: the first thing to run"),
        "assistant": ("assistant", "CSA's assistant, and the student of the same checkpoint"),
        "visdrone": ("visdrone", "result files by the rules of the VisDrone-DET toolkit"),
    },
)
run = PARTS.run
