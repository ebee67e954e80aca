from . import timm_fpn  # noqa: F401  (registers its backbones)
