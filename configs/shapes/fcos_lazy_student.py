"""A LazyConfig student on the built-in shapes, distilled: an FCOS with ResNet-18 of 64 channels.

Run by train_net.py as it is; docs/guide/lazyconfig.md says what is read. Teacher first:
python train_net.py --config-file configs/shapes/fcos_teacher.yaml
"""

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

model = model_zoo.get_config("common/models/fcos.py").model
model.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
    stages=L(ResNet.make_default_stages)(depth=18, norm="BN"),
    out_features=["res3", "res4", "res5"],
)
model.backbone.out_channels = 64
model.backbone.top_block.in_channels = 64  # p6 is made of p5
model.head.input_shape = [ShapeSpec(channels=64)] * 5
model.head.conv_dims = [64]
model.num_classes = 6
model.pixel_std = [57.375, 57.120, 58.395]

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "shapes_train"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=(128,), sample_style="choice", max_size=160),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.test.dataset.names = "shapes_val"
dataloader.test.num_workers = 0
dataloader.test.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=128, max_size=160)
]

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 0.002
optimizer.weight_decay = 0.05

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.1,
    warmup_factor=0.001,
)

train = model_zoo.get_config("common/train.py").train
train.max_iter = 1000
train.seed = 1

# keys of KD in small letters; train_net.py --teacher FILE --method NAME sets them as well
kd = dict(
    heads=["CWD"],
    teacher=dict(
        config_file="fcos_teacher.yaml",  # beside this file
        weights="output/shapes/fcos_teacher/model_final.pth",
    ),
    cwd=dict(weight=5.0, tau=1.0, levels=["p3", "p4", "p5", "p6"]),
)
