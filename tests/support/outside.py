"""A package outside of the repository, and configs that need it."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "external_package" / "my_dots"
IMPORTS = ("KD.IMPORTS", "('my_dots.plugin',)")

# detectron2's own keys and those of the package, so that reading it here needs KD.IMPORTS
BASE = """
MODEL:
  META_ARCHITECTURE: DotDetector
  DEVICE: cpu
  PIXEL_STD: [57.0, 57.0, 57.0]
  DOT: {WIDTH: 4}
INPUT: {MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}
DATASETS:
  TRAIN: ("dots",)
  TEST: ("dots",)
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.05, MAX_ITER: 3, STEPS: []}
SEED: 1
"""
STUDENT = """
_BASE_: base.yaml
KD:
  META_ARCHITECTURE: DistillMetaArch
  HEADS: ("ScoreMatch", "Mimic")
  TEACHER: {CONFIG_FILE: "base.yaml", OPTS: ["MODEL.DOT.WIDTH", 12]}
  SCOREMATCH: {POWER: 2.0, END_ITER: 3}
  MIMIC: {START_ITER: 3}
OUTPUT_DIR: student
"""
