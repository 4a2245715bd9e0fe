"""Which ROIs are trained on: taken by hand from small lists."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from roi_heads_factory import MIXED, NO_OBJECT, targets_of

from teacher_student_mask.modeling.training_rois import (
    boxes_of,
    drop_surplus_rois_without_mask,
    has_mask_of,
    rois_of_objects,
    rois_with_mask,
    rois_without_mask,
)


def make_rois(has_mask):
    n = len(has_mask)
    rois = Instances((20, 20), proposal_boxes=Boxes(torch.arange(4.0 * n).reshape(n, 4)))
    rois.gt_classes = torch.arange(n)
    if n:
        rois.gt_has_mask = torch.tensor(has_mask)
    return rois


def test_split_keeps_the_order():
    rois = make_rois([True, False, False, True])
    assert has_mask_of(rois).tolist() == [True, False, False, True]
    assert rois_with_mask(rois).gt_classes.tolist() == [0, 3]
    assert rois_without_mask(rois).gt_classes.tolist() == [1, 2]
    assert rois_without_mask(rois).proposal_boxes.tensor[0].tolist() == [4, 5, 6, 7]


def test_an_image_without_rois_may_lack_the_field():
    rois = make_rois([])
    for part in (rois_with_mask(rois), rois_without_mask(rois)):
        assert len(part) == 0
    assert has_mask_of(rois).dtype == torch.bool
    assert len(drop_surplus_rois_without_mask(rois, 1)) == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
def test_all_with_a_mask_stay_and_some_of_the_others(limit):
    rois = make_rois([False, True, False, False, True])
    kept = drop_surplus_rois_without_mask(rois, limit).gt_classes.tolist()
    assert kept == sorted(kept) and {1, 4} <= set(kept)
    assert len(kept) == 2 + min(limit, 3)


def test_the_choice_is_random_and_even():
    rois = make_rois([False, True, False, False])
    torch.manual_seed(0)
    chosen = [drop_surplus_rois_without_mask(rois, 1).gt_classes.tolist() for _ in range(300)]
    counts = {k: sum(k in kept for kept in chosen) for k in (0, 2, 3)}
    assert sum(counts.values()) == 300
    # Binomial with p = 1/3: 100 +- 8; five deviations.
    assert all(60 < count < 140 for count in counts.values())


def test_each_object_is_a_roi_at_its_own_box_with_all_its_fields():
    (targets,) = targets_of(MIXED[:1])
    targets.gt_has_external_mask = torch.tensor([False, True])
    targets.other = torch.zeros(2)
    fields = targets.get_fields().copy()
    rois = rois_of_objects(targets)
    assert rois.image_size == targets.image_size
    assert set(rois.get_fields()) == {*fields, "proposal_boxes"} - {"other"}
    assert rois.proposal_boxes.tensor.tolist() == [[4, 4, 30, 30], [20, 20, 50, 56]]
    assert rois.gt_classes.tolist() == [0, 2] and rois.gt_has_mask.tolist() == [True, False]
    assert rois.gt_has_external_mask.tolist() == [False, True]
    assert rois.gt_masks is targets.gt_masks and targets.get_fields() == fields
    # Who clips the boxes of ROIs does not move the targets.
    rois.proposal_boxes.clip((10, 10))
    assert targets.gt_boxes.tensor.tolist() == [[4, 4, 30, 30], [20, 20, 50, 56]]


@pytest.mark.parametrize("bitmask", [False, True])
def test_an_image_without_objects_has_no_roi_but_the_fields(bitmask):
    (targets,) = targets_of(NO_OBJECT, bitmask)
    rois = rois_of_objects(targets)
    assert set(rois.get_fields()) == {*targets.get_fields(), "proposal_boxes"}
    assert len(rois) == 0 and rois.proposal_boxes.tensor.shape == (0, 4)
    for part in (rois_with_mask(rois), rois_without_mask(rois)):
        assert len(part) == 0 and part.gt_has_mask.dtype == torch.bool
    assert len(drop_surplus_rois_without_mask(rois, 1)) == 0


def test_detections_have_their_own_boxes():
    rois = make_rois([True])
    assert boxes_of(rois) is rois.proposal_boxes
    rois.pred_boxes = Boxes(torch.zeros(1, 4))
    assert boxes_of(rois) is rois.pred_boxes
