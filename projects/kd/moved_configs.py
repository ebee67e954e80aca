"""Config files of earlier versions that are gone, and what to use in their place."""

from __future__ import annotations

import os
import re

_METHODS = {
    "distilled": "CWD",
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
    "shapes/faster_rcnn": "shapes_faster_rcnn or scalekd_shapes_faster_rcnn",
    "shapes/conditional_detr": "d3etr",
    "shapes/semseg": "semseg",
    "shapes": "shapes_detectors",
    "aerial_cars": "aerial_cars_methods",
    "VisDrone": "visdrone",
    "Cityscapes": "cityscapes",
}
_STUDENT = r"(?P<stem>\w+)_student(?P<r50>_from_r50)?_(?P<method>\w+?)(?P<kind>_2x|_inherit|)"
_FROM = r"(?P<net>\w+?)_(?P<size>R\d+|MobileNetV2)(?P<fpn>_FPN)?_from_R101_(?P<method>\w+?)"
_GONE = (
    (r"shapes|aerial_cars", _STUDENT),
    (r"VisDrone", _FROM + r"(?P<kind>_hires|_querydet|)"),
    (r"Cityscapes", _FROM + r"(?P<kind>)"),
)


def moved(path: str) -> str:
    """What to use in place of a config that an earlier version had, "" for any other name.

    Args:
        path: of the missing file; its last folder counts as well.
    """
    folder, stem = os.path.split(os.path.splitext(path)[0])
    place = os.path.basename(folder)
    for folders, names in _GONE:
        found = re.fullmatch(names, stem) if re.fullmatch(folders, place) else None
        if found:
            return "; it is gone: " + _in_words(place, found.groupdict())
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
        f"use configs/{place}/{student}.yaml with --teacher configs/{place}/{teacher}.yaml "
        f"--method {method}, or its row in configs/suites ({suite}){variant}"
    )
