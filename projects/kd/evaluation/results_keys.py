"""What evaluations take and lead to, and where their results go: keys of TEST, and WRITERS."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ..config import register_config


@register_config
def add_results_config(cfg: CfgNode) -> None:
    """Add TEST.BEST_METRIC, BEST_MODE, PATIENCE, PICTURES and IMS_PER_BATCH, and WRITERS."""
    # Metric by which the weights of the best evaluation are kept as model_best.pth, e.g. "bbox/AP",
    # "segm/AP50", "sem_seg/mIoU"; with several data sets in DATASETS.TEST "<data set>/bbox/AP".
    # "" = they are not kept.
    cfg.TEST.BEST_METRIC = ""
    # "max": higher is better; "min": lower is.
    cfg.TEST.BEST_MODE = "max"
    # Training ends after so many evaluations (TEST.EVAL_PERIOD) in a row without a better
    # TEST.BEST_METRIC. 0 = it goes on to SOLVER.MAX_ITER.
    cfg.TEST.PATIENCE = 0
    cfg.TEST.PICTURES = CN()
    # Every so many evaluations, and with the last, pictures for TensorBoard and WRITERS: detections
    # beside the ground truth, and where each head pulls the student. 0 = none.
    cfg.TEST.PICTURES.PERIOD = 0
    # Images of the first data set in DATASETS.TEST that are shown, evenly spaced.
    cfg.TEST.PICTURES.COUNT = 4
    # Images that a detector gets at once in evaluation, in each process. More are faster. Those of
    # equal size are put together, so that results are the same but for rounding.
    cfg.TEST.IMS_PER_BATCH = 1
    cfg.WRITERS = CN()
    # Where numbers and pictures go beside metrics.json and TensorBoard: "wandb", "mlflow". Account,
    # server and offline mode are set in their own environment variables.
    cfg.WRITERS.NAMES = ()
    # wandb's project, mlflow's experiment.
    cfg.WRITERS.PROJECT = "detection-distillation"
    # Name of the run there; "" = the last folder of OUTPUT_DIR.
    cfg.WRITERS.RUN = ""
