"""Targets and losses against Detectron2's mask_rcnn_loss and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from teacher_student_mask.modeling.mask_loss import (
    crop_gt_masks,
    mask_accuracy,
    masked_bce_loss,
    select_label_channel,
)


def make_rois(masks, has_mask, boxes, classes=None):
    rois = Instances((32, 32))
    rois.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    rois.gt_masks = masks
    rois.gt_has_mask = torch.tensor(has_mask, dtype=torch.bool)
    rois.gt_classes = torch.tensor(classes or [0] * len(has_mask))
    return rois


def rectangle(x0, y0, x1, y1):
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


def test_label_channel_is_selected_and_only_it_gets_gradient():
    logits = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 2, 2).requires_grad_()
    selected = select_label_channel(logits, torch.tensor([2, 0]))
    assert selected.tolist() == [[[8, 9], [10, 11]], [[12, 13], [14, 15]]]
    selected.sum().backward()
    expected = torch.zeros(2, 3, 2, 2)
    expected[0, 2] = expected[1, 0] = 1
    assert torch.equal(logits.grad, expected)


def test_class_agnostic_logits_have_one_channel_for_all_labels():
    logits = torch.rand(2, 1, 2, 2)
    assert torch.equal(select_label_channel(logits, torch.tensor([7, 3])), logits[:, 0])


@pytest.mark.parametrize("mask_type", ["polygon", "bitmask"])
def test_targets_are_the_crops_where_there_is_a_mask_and_zero_elsewhere(mask_type):
    # Two objects: the left half of the ROI, and one whose "mask" must not be looked at.
    polygons = [rectangle(0, 0, 4, 8), rectangle(0, 0, 8, 8)]
    masks = PolygonMasks(polygons)
    if mask_type == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 32, 32)
    rois = make_rois(masks, [True, False], [[0, 0, 8, 8], [0, 0, 8, 8]])
    empty = Instances((32, 32), proposal_boxes=Boxes(torch.zeros(0, 4)))
    targets = crop_gt_masks([rois, empty], 4, torch.device("cpu"))
    assert targets.dtype == torch.float32
    assert targets[0].tolist() == [[1, 1, 0, 0]] * 4
    assert targets[1].tolist() == [[0, 0, 0, 0]] * 4


def test_targets_of_a_batch_without_rois_are_empty():
    empty = Instances((32, 32), proposal_boxes=Boxes(torch.zeros(0, 4)))
    assert crop_gt_masks([empty], 4, torch.device("cpu")).shape == (0, 4, 4)


def test_loss_by_hand():
    # Supervised: one pixel with logit 0 and target 1 (log 2), one with logit log 3 and target 0,
    # whose probability is 3/4 (loss log 4). The other ROI must not count.
    logits = torch.tensor([[[0.0, math.log(3)]], [[100.0, -100.0]]])
    targets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    loss = masked_bce_loss(logits, targets, torch.tensor([True, False]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("num_rois", [0, 3])
def test_loss_without_supervised_rois_is_zero_and_attached(num_rois):
    logits = torch.randn(num_rois, 2, 2, requires_grad=True)
    supervised = torch.zeros(num_rois, dtype=torch.bool)
    loss = masked_bce_loss(logits, torch.zeros(num_rois, 2, 2), supervised)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("mask_type", ["polygon", "bitmask"])
def test_loss_is_detectron2s_when_all_have_masks(num_channels, mask_type):
    torch.manual_seed(0)
    polygons = [rectangle(2, 3, 20, 14), rectangle(9, 4, 30, 31), rectangle(1, 1, 8, 25)]
    masks = PolygonMasks(polygons)
    if mask_type == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 32, 32)
    boxes = [[1, 2, 22, 16], [8, 8, 28, 30], [0, 0, 10, 20]]
    rois = make_rois(masks, [True] * 3, boxes, classes=[2, 0, 1])
    logits = torch.randn(3, num_channels, 28, 28)
    with EventStorage():
        expected = mask_rcnn_loss(logits, [rois])
    selected = select_label_channel(logits, rois.gt_classes)
    targets = crop_gt_masks([rois], 28, logits.device)
    loss = masked_bce_loss(selected, targets, torch.ones(3, dtype=torch.bool))
    assert torch.equal(loss, expected)


def test_accuracy_counts_selected_pixels_only():
    logits = torch.tensor([[[1.0, -1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    targets = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert mask_accuracy(logits, targets, torch.tensor([True, False])).item() == 0.75
    assert mask_accuracy(logits, targets, torch.tensor([True, True])).item() == 0.375
    assert mask_accuracy(logits, targets, torch.tensor([False, False])).isnan()
    assert mask_accuracy(logits[:0], targets[:0], torch.zeros(0, dtype=torch.bool)).isnan()
