"""Targets and losses against Detectron2's mask_rcnn_loss and values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from teacher_student_mask.modeling.mask_targets import (
    cells_inside_boxes,
    crop_gt_masks,
    drop_surplus_rois_without_mask,
    find_rois,
    has_model_mask_of,
    mask_accuracy,
    masked_bce_loss,
    masked_dice_loss,
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


@pytest.mark.parametrize("mask_type", ["polygon", "bitmask"])
def test_targets_are_the_crops_where_there_is_a_mask_and_zero_elsewhere(mask_type):
    # Two objects: the left half of the ROI, and one whose "mask" must not be looked at.
    polygons = [rectangle(0, 0, 4, 8), rectangle(0, 0, 8, 8)]
    masks = PolygonMasks(polygons)
    if mask_type == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 32, 32)
    rois = make_rois(masks, [True, False], [[0, 0, 8, 8], [0, 0, 8, 8]])
    empty = Instances((32, 32), proposal_boxes=Boxes(torch.zeros(0, 4)))
    empty.gt_classes = torch.zeros(0, dtype=torch.int64)
    targets = crop_gt_masks([rois, empty], 4, torch.device("cpu"))
    assert targets.dtype == torch.float32
    assert targets[0].tolist() == [[1, 1, 0, 0]] * 4
    assert targets[1].tolist() == [[0, 0, 0, 0]] * 4
    # A model's mask counts where it is asked for.
    rois.gt_has_model_mask = torch.tensor([False, True])
    targets = crop_gt_masks([rois, empty], 4, torch.device("cpu"), has_model_mask_of)
    assert not targets[0].any() and targets[1].all()
    assert crop_gt_masks([empty], 4, torch.device("cpu")).shape == (0, 4, 4)


def test_loss_by_hand():
    # Supervised: one pixel with logit 0 and target 1 (log 2), one with logit log 3 and target 0,
    # whose probability is 3/4 (loss log 4). The other ROI must not count.
    logits = torch.tensor([[[0.0, math.log(3)]], [[100.0, -100.0]]])
    targets = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    loss = masked_bce_loss(logits, targets, torch.tensor([True, False]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("function", [masked_bce_loss, masked_dice_loss])
@pytest.mark.parametrize("num_rois", [0, 3])
def test_loss_without_supervised_rois_is_zero_and_attached(function, num_rois):
    logits = torch.randn(num_rois, 2, 2, requires_grad=True)
    supervised = torch.zeros(num_rois, dtype=torch.bool)
    loss = function(logits, torch.zeros(num_rois, 2, 2), supervised)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_accuracy_counts_selected_cells_only():
    logits = torch.tensor([[[1.0, -1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    targets = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]])
    for rows, expected in (
        ([True, False], 0.75),
        ([True, True], 0.375),
        ([False, False], math.nan),
    ):
        counted = torch.tensor(rows)[:, None, None]
        found = mask_accuracy(logits, targets, counted).item()
        assert found == pytest.approx(expected, nan_ok=True)
    assert mask_accuracy(logits, targets, targets > 0.5).item() == 1
    assert mask_accuracy(logits[:0], targets[:0], counted[:0]).isnan()


def plain_rois(has_mask):
    n = len(has_mask)
    rois = Instances((20, 20), proposal_boxes=Boxes(torch.arange(4.0 * n).reshape(n, 4)))
    rois.gt_classes = torch.arange(n)
    if n:
        rois.gt_has_mask = torch.tensor(has_mask)
    return rois


def test_a_human_mask_is_never_taken_for_a_models():
    rois = plain_rois([True, False, False])
    assert not has_model_mask_of(rois).any()
    rois.gt_has_model_mask = torch.tensor([True, True, False])
    assert has_model_mask_of(rois).tolist() == [False, True, False]


def test_box_cells_are_those_whose_centre_lies_in_the_box():
    # Centres lie at .5, 1.5, ..; the edge at 1.5 belongs to the box, the one at 3.4 leaves 3.5 out.
    rois = torch.tensor([[0.0, 0.0, 4.0, 4.0], [10.0, 20.0, 18.0, 28.0]])
    boxes = torch.tensor([[1.5, 0.6, 3.4, 4.0], [14.0, 20.0, 30.0, 24.0]])
    first, second = cells_inside_boxes(rois, boxes, 4).int().tolist()
    assert first == [[0] * 4] + [[0, 1, 1, 0]] * 3
    # Coordinates are those of the image, not of the ROI.
    assert second == [[0, 0, 1, 1]] * 2 + [[0] * 4] * 2


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_all_with_a_mask_stay_and_some_of_the_others(limit):
    rois = plain_rois([False, True, False, False, True])
    kept = drop_surplus_rois_without_mask(rois, limit).gt_classes.tolist()
    assert kept == sorted(kept) and {1, 4} <= set(kept)
    assert len(kept) == 2 + min(limit, 3)


def test_rois_are_found_among_sampled_ones_by_their_boxes():
    def boxes(*corners):
        box = [[float(x), 0.0, x + 9.0, 5.0] for x in corners]
        classes = torch.zeros(len(corners), dtype=torch.int64)
        tensor = torch.tensor(box).reshape(-1, 4)
        return Instances((64, 64), proposal_boxes=Boxes(tensor), gt_classes=classes)

    # Box 3 is in both images, and twice in the first.
    sampled = [boxes(8, 3, 5, 3), boxes(), boxes(3, 7)]
    rows = find_rois([boxes(3, 8), boxes(), boxes(7, 3, 7)], sampled)
    assert rows.tolist() == [1, 0, 5, 4, 5]
    assert find_rois([boxes(3), boxes(3), boxes()], sampled) is None
    assert find_rois([boxes(), boxes(), boxes(7, 8)], sampled) is None
    assert find_rois([boxes(), boxes(), boxes()], sampled).tolist() == []


def test_masked_dice_is_the_mean_of_the_supervised_rois():
    logits = torch.tensor([[[0.0, 50.0]], [[3.0, -2.0]], [[50.0, 50.0]]], requires_grad=True)
    targets = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]])
    loss = masked_dice_loss(logits, targets, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx((1 / 9 + 0) / 2, abs=1e-5)
    loss.backward()
    assert logits.grad[0].any() and not logits.grad[1].any()
