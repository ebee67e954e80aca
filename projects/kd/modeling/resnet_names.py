"""torchvision's names of ResNet tensors, which many published detectors use, as detectron2's."""

from __future__ import annotations

import re


def detectron2_name(name: str) -> str | None:
    """detectron2's name of a tensor of a torchvision ResNet, None for the classifier.

    ``layer2.0.bn1.bias`` becomes ``res3.0.conv1.norm.bias``, ``layer2.0.downsample.0.weight``
    ``res3.0.shortcut.weight``.
    """
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
