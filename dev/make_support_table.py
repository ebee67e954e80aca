"""Write the table of imitation heads by detectors into docs/methods/index.md, or print it.

    python -m dev.make_support_table --write
    python -m dev.make_support_table --why    # what is refused, and with which line

Each cell is found by building the head for the detectors of configs/shapes; nothing is written by
hand, so a head or detector that is added appears by itself.
"""

from __future__ import annotations

import os

from projects.kd import load_config
from projects.kd.analysis.support import between_markers, shapes_detectors, support_table, verdicts
from projects.kd.arguments import Parser
from projects.kd.errors import exit_on_user_error
from projects.kd.files import write_atomically

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LABELS = (
    ("retinanet", "RetinaNet"),
    ("fcos", "FCOS"),
    ("gfl", "GFL"),
    ("reppoints", "RepPoints"),
    ("faster_rcnn", "Faster R-CNN"),
    ("cascade_rcnn", "Cascade R-CNN"),
    ("mask_rcnn", "Mask R-CNN"),
    ("keypoint_rcnn", "Keypoint R-CNN"),
    ("panoptic_fpn", "Panoptic FPN"),
    ("semseg", "Semantic FPN"),
    ("conditional_detr", "Conditional DETR"),
)
PAGE = os.path.join(ROOT, "docs", "methods", "index.md")


def table() -> str:
    """The table for the detectors of configs/shapes."""
    return support_table(shapes_detectors(ROOT, LABELS))


def main() -> None:
    """Print, explain or write the table."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="put it between the markers of docs/methods/index.md"
    )
    parser.add_argument("--why", action="store_true", help="print the refusals")
    args = parser.parse_args()
    if args.why:
        for name, paths in shapes_detectors(ROOT, LABELS).items():
            for head, targets in verdicts(*(load_config(path) for path in paths)).items():
                for target, refusal in targets.items():
                    if refusal:
                        print(f"{name}, {head} ({target}): {refusal}")
        return
    if not args.write:
        print(table())
        return
    with open(PAGE) as file:
        text = file.read()
    write_atomically(PAGE, between_markers(text, table()))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
