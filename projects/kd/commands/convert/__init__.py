"""Weights under the names of this project, and data sets in COCO's format.

    kd-convert resnet --architecture resnet18 --output pretrained/resnet18_torchvision.pth
    kd-convert voc --annotations mine/xml --images mine/photos --output mine/train.json

``kd-convert PART -h`` shows a part's flags.
"""

from ..parts import Parts

PARTS = Parts(
    __name__,
    __doc__,
    {
        "resnet": ("resnet", "torchvision's ResNet weights"),
        "conditional_detr": ("conditional_detr", "published weights of Conditional DETR"),
        "voc": ("boxes", "boxes in Pascal VOC's XML files"),
        "yolo": ("boxes", "boxes in YOLO's text files"),
        "visdrone": ("visdrone", "the VisDrone-DET archives"),
    },
)
run = PARTS.run
