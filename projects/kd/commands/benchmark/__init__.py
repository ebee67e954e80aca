"""Time and memory, in turns with what a number is compared to.

    kd-benchmark step --heads CWD --threads 1
    kd-benchmark icd --boxes 20 200 --output icd.json

All run best on an idle machine. ``kd-benchmark PART -h`` shows a part's flags.
"""

from ..parts import Parts

_STEP = "step"
PARTS = Parts(
    __name__,
    __doc__,
    {
        "profile": ("profile", "the share of each part of a training, as a table and a picture"),
        "turns": ("turns", "steps with other settings in turns: what a setting gives"),
        "gradients": ("gradients", "bytes that several processes exchange in a step"),
        "step": (_STEP, "a distillation step against student step and teacher's forward pass"),
        "heads": (_STEP, "each imitation head alone: loss and gradient"),
        "teacher": (_STEP, "the teacher's input and forward pass"),
        "student": (_STEP, "the student's step alone"),
        "mask": (_STEP, "FGFI's imitation mask"),
        "data": (_STEP, "the training loader of a --config-file"),
        "all": (_STEP, "all of these"),
        "icd": ("icd", "ICD beside an implementation that keeps full attention maps"),
        "d3etr": ("d3etr", "D3ETR on a Conditional DETR pair"),
        "visdrone": ("visdrone", "the VisDrone metrics beside pycocotools"),
    },
)
run = PARTS.run
