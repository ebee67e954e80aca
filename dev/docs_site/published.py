"""The page of published numbers, from the one YAML file that holds them."""

from __future__ import annotations

from pathlib import Path

import yaml

TRUST = ("verified", "recalled")
INTRODUCTION = """# Published numbers

What others report for the configs under `configs/COCO-*`: AP of boxes on COCO val2017, unless a
row says otherwise. **None of these trainings was run here.** Plain rows are detectron2's 1x
schedule: 90 000 iterations of 16 images on eight GPUs.

- *From* is the plain student of the same source. Gains of different papers cannot be compared:
  their baselines differ.
- *Recalled* figures come from memory of a table and were not checked against it. Never take one as
  a threshold.
- A config that is not listed has no published number that is known to us.

The command of each row is

```bash
python train_net.py --num-gpus 8 --config-file CONFIG
```

Students with R50 start from detectron2's ImageNet weights, those with R18 from torchvision's. The
teachers are the model zoo's R101 3x detectors. FCOS, GFL, RepPoints and Conditional DETR have none
in the zoo: there is a config for their teacher beside the student's.
"""


def read_rows(path: Path) -> list[dict]:
    """The entries of the file; ValueError names one that is not complete."""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if sorted(row) != ["config", "published", "source", "trust"] or row["trust"] not in TRUST:
            raise ValueError(f"{path.name}: {row}: config, published, source and trust are needed")
    return rows


def published_page(path: Path) -> str:
    """The Markdown of the page, one table for each folder of configs."""
    folders: dict[str, list[str]] = {}
    for row in read_rows(path):
        config = Path(row["config"])
        source = row["source"] + (" (recalled)" if row["trust"] == "recalled" else "")
        line = f"| `{config.stem}` | {row['published']} | {source} |"
        folders.setdefault(str(config.parent), []).append(line)
    lines = [INTRODUCTION]
    for folder, rows in folders.items():
        lines += [f"## `{folder}`", "", "| config | published | where from |", "|---|---|---|"]
        lines += [*rows, ""]
    return "\n".join(lines)
