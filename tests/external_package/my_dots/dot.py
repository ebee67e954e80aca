"""A detector of one's own, on plain detectron2: it marks the cells where objects have centres."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

STRIDES = {"fine": 4, "coarse": 8}


def add_dot_config(cfg):
    cfg.MODEL.DOT = CfgNode({"WIDTH": 4, "NUM_CLASSES": 2, "BOX": 12.0})


class DotBackbone(Backbone):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, stride=4, padding=2)
        self.deep = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self._out_features = list(STRIDES)
        self._out_feature_strides = STRIDES
        self._out_feature_channels = dict.fromkeys(STRIDES, width)

    @property
    def size_divisibility(self):
        return 8

    def forward(self, x):
        fine = self.stem(x)
        return {"fine": fine, "coarse": self.deep(F.relu(fine))}


@META_ARCH_REGISTRY.register()
class DotDetector(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = DotBackbone(cfg.MODEL.DOT.WIDTH)
        self.head = nn.Conv2d(cfg.MODEL.DOT.WIDTH, cfg.MODEL.DOT.NUM_CLASSES, 1)
        self.box = cfg.MODEL.DOT.BOX
        self.register_buffer("pixel_mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(cfg.MODEL.PIXEL_STD).view(-1, 1, 1), False)
        self.to(cfg.MODEL.DEVICE)

    @property
    def device(self):
        return self.pixel_mean.device

    def forward(self, batch):
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batch]
        images = ImageList.from_tensors(images, self.backbone.size_divisibility)
        scores = [self.head(level) for level in self.backbone(images.tensor).values()]
        if self.training:
            targets = self.targets([x["instances"].to(self.device) for x in batch], scores)
            losses = map(F.binary_cross_entropy_with_logits, scores, targets)
            return {"loss_dot": sum(losses)}
        return [
            {"instances": detector_postprocess(found, x["height"], x["width"])}
            for x, found in zip(batch, self.decode(scores, images.image_sizes), strict=True)
        ]

    @staticmethod
    def targets(instances, scores):
        maps = [torch.zeros_like(level) for level in scores]
        for stride, level in zip(STRIDES.values(), maps, strict=True):
            for image, item in zip(level, instances, strict=True):
                x, y = (item.gt_boxes.get_centers() / stride).long().T
                image[item.gt_classes, y, x] = 1.0
        return maps

    def decode(self, scores, sizes):
        for index, size in enumerate(sizes):
            values, places = scores[0][index].sigmoid().flatten().topk(5)
            _, rows, columns = scores[0].shape[1:]
            y, x = places % (rows * columns) // columns, places % columns
            centre = (torch.stack([x, y], dim=1) + 0.5) * STRIDES["fine"]
            boxes = Boxes(torch.cat([centre - self.box / 2, centre + self.box / 2], dim=1))
            boxes.clip(size)
            found = Instances(size, pred_boxes=boxes, scores=values)
            found.pred_classes = places // (rows * columns)
            yield found
