"""Draw docs/images/methods/*.png: where each head pulls a student, by ``kd-visualize pull``.

    python dev/docs_site/method_pictures.py --student RUN --teacher RUN [--only cwd fgfi]

RUN is the folder of a finished run on the built-in shapes (config.yaml, a checkpoint). Both are
one-stage detectors of one family. A head that both cannot serve is named and left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from projects.kd.commands.visualize import PARTS  # noqa: E402
from projects.kd.errors import ConfigError  # noqa: E402
from projects.kd.heads import IMITATION_HEAD_REGISTRY  # noqa: E402

OPTIONS = {"PI": ["KD.PI.TARGET", "dense"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--student-weights", default="model_final.pth", help="in that folder")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--index", default="2", help="of the image in shapes_val")
    parser.add_argument("--only", nargs="*", default=[], help="names of pages in docs/methods")
    args = parser.parse_args()
    names = {name.lower(): name for name, _ in IMITATION_HEAD_REGISTRY}
    for page in sorted((ROOT / "docs/methods").glob("*.md")):
        name = names.get(page.stem.replace("_", ""))
        if name is None or (args.only and page.stem not in args.only):
            continue
        picture = ROOT / f"docs/images/methods/{page.stem}.png"
        words = ["pull", "--config-file", args.student / "config.yaml", "--output", picture]
        words += ["--dataset", "shapes_val", "--index", args.index]
        words += ["KD.META_ARCHITECTURE", "DistillMetaArch", "KD.HEADS", f"('{name}',)"]
        words += ["KD.TEACHER.CONFIG_FILE", args.teacher / "config.yaml"]
        words += ["KD.TEACHER.WEIGHTS", args.teacher / "model_final.pth"]
        words += ["MODEL.WEIGHTS", args.student / args.student_weights, *OPTIONS.get(name, [])]
        try:
            PARTS.call(words)
        except ConfigError as error:
            print(f"{page.stem}: left out, {error}")
        else:  # 96 colours are enough for these, and half the bytes
            Image.open(picture).convert("RGB").quantize(96).save(picture, optimize=True)


if __name__ == "__main__":
    main()
