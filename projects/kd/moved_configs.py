"""Config files of earlier versions that are gone, and what to use in their place."""

from __future__ import annotations

import os
import re

# by name alone
_NAMES = {
    "Base-RCNN-FPN": "COCO-Detection/faster_rcnn_R50_FPN_1x.yaml",
    "Base-RetinaNet": "COCO-Detection/retinanet_R50_FPN_1x.yaml",
    "Base-ConditionalDETR": "COCO-DETR/conditional_detr_R50_C5_50ep.yaml",
    "Base-own_data": "own_data/teacher.yaml",
    "Base-aerial_cars": "aerial_cars/retinanet_student.yaml",
    "Base-FCOS": "COCO-Detection/fcos_R50_FPN_1x.yaml",
    "Base-GFL": "COCO-Detection/gfl_R50_FPN_1x.yaml",
    "Base-RepPoints": "COCO-Detection/reppoints_R50_FPN_1x.yaml",
    "Base-Cityscapes": "Cityscapes/PSPNet_R101.yaml",
    "Base-PSPNet": "Cityscapes/PSPNet_R101.yaml",
    "Base-DeepLabV3plus": "Cityscapes/DeepLabV3plus_R101.yaml",
    "Base-RCNN-VisDrone": "VisDrone/faster_rcnn_R50_FPN.yaml",
    "Base-RCNN-QueryDet": "VisDrone/faster_rcnn_R50_FPN_querydet.yaml",
    "Base-RetinaNet-VisDrone": "VisDrone/retinanet_R50_FPN.yaml",
    "Base-RetinaNet-QueryDet": "VisDrone/retinanet_R50_FPN_querydet.yaml",
    "Base-Cascade-RCNN-shapes": "shapes/cascade_rcnn_teacher.yaml",
    "Base-ConditionalDETR-shapes": "shapes/conditional_detr_teacher.yaml",
    "Base-FCOS-shapes": "shapes/fcos_teacher.yaml",
    "Base-Faster-RCNN-shapes": "shapes/faster_rcnn_teacher.yaml",
    "Base-GFL-shapes": "shapes/gfl_teacher.yaml",
    "Base-Keypoint-RCNN-shapes": "shapes/keypoint_rcnn_teacher.yaml",
    "Base-Mask-RCNN-shapes": "shapes/mask_rcnn_teacher.yaml",
    "Base-Panoptic-FPN-shapes": "shapes/panoptic_fpn_teacher.yaml",
    "Base-RepPoints-shapes": "shapes/reppoints_teacher.yaml",
    "Base-SemSeg-shapes": "shapes/semseg_teacher.yaml",
    "retinanet_mobilenetv2_student": (
        "aerial_cars/retinanet_student.yaml with MODEL.TIMM.NAME mobilenetv2_050"
    ),
    "student_distilled": (
        "own_data/student.yaml with --teacher configs/own_data/teacher.yaml --method PKD"
    ),
}
_METHODS = {
    "fgfi_cwd": "FGFI,CWD",
    "d3etr_adaptive": "D3ETR and KD.D3ETR.FIXED False",
    "d3etr_fixed": "D3ETR and KD.D3ETR.ADAPTIVE False",
}
_VARIANTS = {
    "_2x": "; KD.TEACHER.INPUT_SCALE 2.0 and KD.LEVEL_MAP as in that suite",
    "_hires": "; KD.TEACHER.INPUT_SCALE 2.0 and KD.LEVEL_MAP as in that suite",
    "_inherit": "; KD.INIT_FROM_TEACHER as in that suite",
}
_SUITES = {
    "shapes/retinanet": "shapes_methods",
    "shapes/faster_rcnn": "shapes_faster_rcnn",
    "shapes/conditional_detr": "d3etr",
    "shapes/semseg": "semseg",
    "shapes": "shapes_detectors",
    "aerial_cars": "aerial_cars_methods",
    "VisDrone": "visdrone",
    "Cityscapes": "cityscapes",
}
_NAME = (
    r"(?P<method>(?:fgfi_cwd|sdf_csa|cwd|pkd|fgfi|icd|sdf|csa|output_kd|mimic|at|pi|local|pa|ifvd|"
    r"d3etr)(?:_logits|_masks|_keypoints|_adaptive|_fixed)?)"
)
_STUDENT = r"(?P<stem>\w+)_student(?P<r50>_from_r50)?_" + _NAME + r"(?P<kind>_2x|_inherit|)"
_FROM = r"(?P<net>\w+?)_(?P<size>R\d+|MobileNetV2)(?P<fpn>_FPN)?_from_R101_" + _NAME
_GONE = (
    (r"shapes|aerial_cars", _STUDENT),
    (r"VisDrone", _FROM + r"(?P<kind>_hires|_querydet|)"),
    (r"Cityscapes", _FROM + r"(?P<kind>)"),
)
_COCO = r"(?P<student>\w+)_from_\w+?_" + _NAME + "_1x"


def moved(path: str) -> str:
    """What to use in place of a config that an earlier version had, "" for any other name.

    Args:
        path: of the missing file; its last folder counts as well.
    """
    folder, stem = os.path.split(os.path.splitext(path)[0])
    place = os.path.basename(folder)
    start = "; it is gone: use configs/"
    if stem in _NAMES:
        return start + _NAMES[stem]
    for folders, names in _GONE:
        found = re.fullmatch(names, stem) if re.fullmatch(folders, place) else None
        if found:
            return start + _in_words(place, found.groupdict())
    if re.fullmatch(r"VisDrone/\w+_(R18|MobileNetV2)_FPN_querydet", f"{place}/{stem}"):
        return f"{start}suites/visdrone_querydet.yaml, which has it as a row"
    found = re.fullmatch(_COCO, stem) if place.startswith("COCO-") else None
    if found:
        student = f"{place}/{found['student']}_1x.yaml"
        return f"{start}{student} with --teacher TEACHER --method {found['method']}"
    return ""


def _in_words(place: str, name: dict[str, str]) -> str:
    if "stem" in name:
        twice = "_2x" if name["kind"] == "_2x" else ""
        student = f"{name['stem']}_student"
        teacher = (
            f"{'retinanet_r50' if name['r50'] else name['stem'].split('_mobile')[0]}_teacher{twice}"
        )
        suite = _SUITES.get(f"{place}/{name['stem']}", _SUITES[place])
    else:
        protocol = "_querydet" if name["kind"] == "_querydet" else ""
        end = (name["fpn"] or "") + protocol
        student = f"{name['net']}_{name['size']}{end}"
        high = "_1600" if name["kind"] == "_hires" else ""
        teacher = f"{name['net']}_R101{end}{high}"
        suite = _SUITES[place] + protocol
    method = _METHODS.get(name["method"], name["method"])
    variant = _VARIANTS.get(name["kind"], "")
    return (
        f"{place}/{student}.yaml with --teacher configs/{place}/{teacher}.yaml "
        f"--method {method}, or its row in configs/suites ({suite}){variant}"
    )
