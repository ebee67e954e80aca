"""student.yaml: the config with which stock detectron2 builds and loads the student."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from torch import nn

from ..config import LazyNode
from ..files import write_atomically

NAME = "student.yaml"
# How a detector is used, not how it was trained.
_SECTIONS = ("VERSION", "MODEL", "DATASETS", "INPUT", "TEST", "OUTPUT_DIR")
_STOCK = ("detectron2.", "fvcore.", "torch.", "torchvision.")

logger = logging.getLogger(__name__)


def write_student_config(cfg: CfgNode, student: nn.Module) -> str:
    """Write OUTPUT_DIR/student.yaml for a student that detectron2 alone can build.

    Args:
        cfg: the config of the run.
        student: the plain detector built from it.

    Returns:
        The file; "" with a line in the log where the student needs this project (or another
        package), as the backbones of timm and GFL, FCOS, RepPoints and ConditionalDETR do.
    """
    if isinstance(cfg, LazyNode):
        logger.info(
            f"{NAME} is not written: detectron2's LazyConfig.load({cfg.path!r}) and "
            "instantiate(cfg.model) build this student"
        )
        return ""
    foreign = needed_packages(cfg, student)
    if foreign:
        logger.info(
            "%s is not written: stock detectron2 cannot build this student, it needs %s; build it "
            "from config.yaml with `import projects.kd` and load_config",
            NAME,
            ", ".join(foreign),
        )
        return ""
    path = os.path.join(cfg.OUTPUT_DIR, NAME)
    stock = stock_config(cfg)
    stock.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    write_atomically(path, stock.dump())
    return path


def stock_config(cfg: CfgNode) -> CfgNode:
    """The part of a config that describes the student, with detectron2's own keys only."""
    own = cfg.clone()
    own.defrost()
    for key in [key for key in own if key not in _SECTIONS]:
        del own[key]
    _prune(own, get_cfg())
    return own


def _prune(node: CfgNode, stock: CfgNode) -> None:
    for key in list(node):
        if key not in stock:
            del node[key]
        elif isinstance(node[key], CfgNode):
            _prune(node[key], stock[key])


def needed_packages(cfg: CfgNode, student: nn.Module) -> list[str]:
    """What of a student is not detectron2's: registered names and classes of modules, sorted."""
    builders = [
        META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE),
        BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME),
    ]
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME in PROPOSAL_GENERATOR_REGISTRY:
        builders.append(PROPOSAL_GENERATOR_REGISTRY.get(cfg.MODEL.PROPOSAL_GENERATOR.NAME))
    parts = [*builders, *(type(module) for module in student.modules())]
    foreign = {f"{part.__module__}.{part.__qualname__}" for part in parts if not _is_stock(part)}
    return sorted(foreign)


def _is_stock(part) -> bool:
    # detectron2.projects (DeepLab, ...) is part of the package, but its keys are not in get_cfg()
    module = f"{part.__module__}."
    return module.startswith(_STOCK) and not module.startswith("detectron2.projects.")
