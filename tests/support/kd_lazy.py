"""LazyConfig files of tiny detectors: detectron2's own files with few channels, on shapes."""

from __future__ import annotations

_IMPORTS = """
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, MViT, ResNet, SwinTransformer
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
"""
# without the mask head; all levels have 8 channels
_RCNN = """
model.proposal_generator.head.in_channels = 8
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.anchor_generator.aspect_ratios = [1.0]
model.proposal_generator.head.num_anchors = 1
model.proposal_generator.pre_nms_topk = (50, 50)
model.proposal_generator.post_nms_topk = (20, 20)
heads = model.roi_heads
heads.num_classes, heads.batch_size_per_image = 3, 16
heads.box_head.input_shape = ShapeSpec(channels=8, height=7, width=7)
heads.box_head.conv_dims, heads.box_head.fc_dims = [8], [16]
heads.box_predictor.input_shape = ShapeSpec(channels=16)
heads.box_predictor.test_score_thresh = 0.0
for key in ("mask_in_features", "mask_pooler", "mask_head"):
    heads.pop(key)
del heads
"""
_RESNET = """
model.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock, num_blocks=1, in_channels=a, out_channels=b, norm="BN",
            stride_per_block=[s],
        )
        for a, b, s in ((8, 8, 1), (8, 16, 2), (16, 24, 2), (24, 32, 2))
    ],
    out_features={levels},
)
model.backbone.in_features = {levels}
model.backbone.out_channels = 8
"""
_DENSE = """
model.backbone.top_block.in_channels = {width}
model.head.input_shape = [ShapeSpec(channels=8)] * 5
model.head.conv_dims = [8]
model.num_classes = 3
model.test_score_thresh = 0.0
"""
_FPN = """
model.backbone = L(FPN)(
    bottom_up={net}, in_features={levels}, out_channels=8, top_block=L(LastLevelMaxPool)(),
    square_pad={square},
)
"""


def _zoo(name: str) -> str:
    return f"model = model_zoo.get_config({name!r}).model\n"


def _resnet(*levels: str) -> str:
    return _RESNET.replace("{levels}", repr(list(levels)))


_SWIN = (
    "L(SwinTransformer)(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,"
    " out_indices=(0, 1, 2, 3))"
)
_MVIT = (
    "L(MViT)(embed_dim=8, depth=4, num_heads=1, last_block_indexes=(0, 1, 2, 3), img_size=64,"
    " drop_path_rate=0.1, residual_pooling=True, use_abs_pos=False)"
)
MODELS = {
    "vitdet": _zoo("common/models/mask_rcnn_vitdet.py")
    + "net = model.backbone.net\n"
    + "net.img_size, net.embed_dim, net.depth, net.num_heads, net.window_size = 64, 8, 2, 2, 2\n"
    + "net.window_block_indexes = [0]\n"
    + "del net\n"
    + "model.backbone.out_channels, model.backbone.square_pad = 8, 64\n"
    + _RCNN,
    "swin": _zoo("common/models/mask_rcnn_fpn.py")
    + _FPN.format(net=_SWIN, levels=["p0", "p1", "p2", "p3"], square=64)
    + _RCNN,
    "mvit": _zoo("common/models/mask_rcnn_fpn.py")
    + _FPN.format(net=_MVIT, levels=[f"scale{n}" for n in (2, 3, 4, 5)], square=64)
    + _RCNN,
    "fcos": _zoo("common/models/fcos.py")
    + _resnet("res3", "res4", "res5")
    + _DENSE.format(width=8)
    + "model.head.norm = 'BN'\n",
    "retinanet": _zoo("common/models/retinanet.py")
    + _resnet("res3", "res4", "res5")
    + _DENSE.format(width=32),
    "baseline": _zoo("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
    + _resnet("res2", "res3", "res4", "res5")
    + "model.backbone.norm = 'BN'\n"
    + _RCNN
    + "model.roi_heads.box_head.conv_norm = 'BN'\n",
}


def model_text(name: str) -> str:
    """The part of a file that makes ``model``; BGR images, those of vitdet RGB."""
    return _IMPORTS + MODELS[name]


def write_model(folder, name: str, more: str = "") -> str:
    """A file with a model alone, and what a test adds; returns its path."""
    path = folder / f"{name}.py"
    path.write_text(model_text(name) + more)
    return str(path)
