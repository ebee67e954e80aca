"""LazyConfig files of tiny detectors: detectron2's own files with few channels, on shapes."""

from __future__ import annotations

import torch
from detectron2.evaluation import DatasetEvaluator

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


# the rest of a file that trains: a few steps on registered images
_TRAINING = """
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper, build_detection_test_loader, build_detection_train_loader,
    get_detection_dataset_dicts, transforms as T,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names={data!r}),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=(32, 48), sample_style="choice", max_size=64
                ),
                L(T.RandomFlip)(),
            ],
            image_format="RGB",
        ),
        total_batch_size=2,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names={data!r}, filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=40, max_size=56)],
            image_format="${...train.mapper.image_format}",
        ),
        num_workers=0,
    ),
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0),
    lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1], milestones=[4], num_updates=6
    ),
    warmup_length=0.5, warmup_factor=0.1, warmup_method="linear",
)
train = dict(
    output_dir={output!r}, init_checkpoint="", max_iter=6, amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=2, max_to_keep=100), eval_period=0, log_period=1, device="cpu",
    seed=11,
)
"""


def write_training(folder, model: str, data: str, more: str = "", name: str = "student") -> str:
    """A file that trains a tiny detector for six steps of two images; returns its path."""
    path = folder / f"{name}.py"
    text = _TRAINING.replace("{data!r}", repr(data)).replace("{output!r}", repr(str(folder / name)))
    path.write_text(model_text(model) + text + more)
    return str(path)


def repeat_factors(count: int) -> torch.Tensor:
    """Half of the images come more often."""
    return torch.cat([torch.ones(count // 2), torch.full((count - count // 2,), 2.5)])


class Seen(DatasetEvaluator):
    """Gives the number of images and the means of their first and last channels as metrics."""

    def __init__(self, output_dir: str | None = None):
        self.output_dir = output_dir

    def reset(self):
        self.means, self.sizes = [], []

    def process(self, inputs, outputs):
        self.means += [x["image"].float().mean((1, 2)) for x in inputs]
        self.sizes += [max(x["image"].shape) for x in inputs]

    def evaluate(self):
        mean = torch.stack(self.means).mean(0).tolist()
        found = {"AP": len(self.means), "side": max(self.sizes), "first": mean[0], "last": mean[-1]}
        return {"bbox": found}
