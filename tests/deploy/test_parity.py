"""Differences between two detectors, counted by hand."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from projects.kd.deploy.parity import differences, pair


def found(boxes, scores, classes, **more):
    fields = {k: torch.tensor(v) for k, v in more.items()}
    return Instances(
        (40, 40),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
        **fields,
    )


def says(instances, **more):
    return lambda batch: [{"instances": instances, **more}]


def test_pairs_are_of_one_class_and_the_nearest():
    ours = found([[0, 0, 10, 10], [0.4, 0, 10, 10], [20, 20, 30, 30]], [0.9, 0.8, 0.7], [0, 0, 1])
    theirs = found([[0.4, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]], [0.8, 0.7, 0.9], [0, 2, 0])
    rows, columns = pair(ours, theirs)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 2), (1, 0)]


def test_the_largest_differences_and_what_is_alone():
    masks = [[[True] * 10 + [False] * 30] * 10 + [[False] * 40] * 30] * 2
    changed = [[list(row) for row in mask] for mask in masks]
    changed[0][0][:5] = [False] * 5
    ours = found([[0, 0, 10, 10], [20, 20, 30, 30]], [0.9, 0.6], [0, 1], pred_masks=masks)
    theirs = found([[0, 0.25, 10, 10], [20, 20, 39, 30]], [0.7, 0.5], [0, 1], pred_masks=changed)
    labels = torch.zeros(2, 4, 4)
    labels[1, 0, 0] = 0.5
    result = differences(
        says(ours, sem_seg=labels), says(theirs, sem_seg=torch.zeros(2, 4, 4)), [{}]
    )
    assert (result.images, result.detections, result.alone) == (1, 1, 2)
    assert result.boxes == pytest.approx(0.25) and result.scores == pytest.approx(0.2)
    assert result.masks == pytest.approx(0.05) and result.sem_seg == pytest.approx(1 / 16)
    assert result.best_alone == pytest.approx(0.6)
    labels[:, 3, 3] = torch.tensor([2.0, -1.0])  # softmax 0.953, here 0.5
    other = {"sem_seg": torch.zeros(2, 4, 4)}
    result = differences(lambda _: [{"sem_seg": labels}], lambda _: [other], [{}])
    assert result.scores == pytest.approx(1 / (1 + math.exp(-3)) - 0.5)


def test_nothing_found_is_no_difference():
    empty = found([], [], [])
    empty.pred_boxes = Boxes(torch.zeros(0, 4))
    result = differences(says(empty), says(empty), [{}, {}])
    assert (result.images, result.detections, result.alone, result.boxes) == (2, 0, 0, 0.0)
