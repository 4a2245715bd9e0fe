"""Pseudo masks on grids small enough to write down, their invariants, and the student's targets."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from roi_heads_factory import WITH_MODEL_MASKS, add_model_masks, make_proposals, targets_of

from teacher_student_mask import ImageMask
from teacher_student_mask.modeling.mask_targets import cells_inside_boxes, has_model_mask_of
from teacher_student_mask.modeling.pseudo_masks import (
    PSEUDO_MASK_METHODS,
    PseudoMaskGenerator,
    fit_to_boxes,
    generate_pseudo_masks,
    make_student_targets,
)

TEACHER = torch.tensor(
    [[[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 0.0, 0.5], [0.4, 0.3, 0.2, 0.1]]]
)
STUDENT = torch.tensor(
    [[[0.9, 0.9, 0.6, 0.5], [0.5, 0.3, 0.3, 0.3], [0.0, 0.0, 1.0, 0.4], [0.6, 0.8, 0.7, 0.0]]]
)
# A 4 x 4 ROI, one unit a cell.
ROI = torch.tensor([[0.0, 0.0, 4.0, 4.0]])


def same(masks, expected):
    return masks[0].tolist() == [[float(v) for v in row] for row in expected]


def test_threshold_is_inclusive():
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="threshold")
    assert same(masks, [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="threshold", threshold=0.9)
    assert same(masks, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(generate_pseudo_masks(TEACHER, STUDENT, method="none"), TEACHER)


def test_interact_thresholds_the_mean_of_both_probabilities():
    # Sums: 1.0 1.1 .9 .9 | 1.0 .9 1.0 1.1 | .9 1.0 1.0 .9 | 1.0 1.1 .9 .1; foreground from 1.0 on.
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="interact")
    assert same(masks, [[1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])


def test_a_finer_teacher_is_averaged_down_before_the_threshold():
    teacher = torch.zeros(1, 4, 4)
    teacher[0, :2, :2] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # mean 0.5
    teacher[0, :2, 2:] = torch.tensor([[1.0, 0.9], [0.0, 0.0]])  # mean 0.475
    student = torch.zeros(1, 2, 2)
    masks = generate_pseudo_masks(teacher, student, method="threshold")
    assert same(masks, [[1, 0], [0, 0]])
    soft = generate_pseudo_masks(teacher, student, method="none")
    assert soft[0, 0].tolist() == pytest.approx([0.5, 0.475])


def test_crf_gets_the_teacher_and_the_pixels_and_is_thresholded():
    seen = {}

    def crf(probs, images):
        seen["probs"], seen["images"] = probs, images
        return 1 - probs

    images = torch.rand(1, 3, 4, 4)
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="crf", crf=crf, roi_images=images)
    assert same(masks, [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(seen["probs"], TEACHER) and seen["images"] is images


def test_no_gradient_flows_into_either_head():
    teacher, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    for method in ("none", "threshold", "interact", "box_fit"):
        masks = generate_pseudo_masks(teacher, student, method=method, roi_boxes=ROI, gt_boxes=ROI)
        assert not masks.requires_grad
        empty, boxes = torch.zeros(0, 4, 4), torch.zeros(0, 4)
        masks = generate_pseudo_masks(empty, empty, method=method, roi_boxes=boxes, gt_boxes=boxes)
        assert masks.shape == (0, 4, 4)


def brute_force_box_fit(probs, inside):
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    box_area = len(rows) * len(columns)
    best, best_iou = inside, 0.0
    for k in range(1, 20):
        mask = (probs >= round(0.05 * k, 2)) & inside
        if not mask.any():
            continue
        r, c = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        iou = ((r.max() - r.min() + 1) * (c.max() - c.min() + 1)).item() / box_area
        if iou >= best_iou:
            best, best_iou = mask, iou
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9))
def test_box_fit_agrees_with_a_loop_over_thresholds(seed, side):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(3, side, side, generator=generator) ** 3
    inside = torch.zeros(3, side, side, dtype=torch.bool)
    for k in range(3):
        low = torch.randint(0, side - 1, (2,), generator=generator)
        high = [int(torch.randint(int(v) + 1, side + 1, (1,), generator=generator)) for v in low]
        inside[k, low[0] : high[0], low[1] : high[1]] = True
    masks = fit_to_boxes(probs, inside)
    for k in range(3):
        assert torch.equal(masks[k], brute_force_box_fit(probs[k], inside[k]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([m for m in PSEUDO_MASK_METHODS if m != "crf"]))
def test_masks_stay_inside_the_box_off_the_exclusion_and_binary(seed, method):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.rand(2, 5, 8, 8, generator=generator)
    corner, size = torch.rand(2, 5, 2, generator=generator)
    rois = torch.cat([corner * 50, corner * 50 + 10 + size * 50], dim=1)
    gt_boxes = rois + torch.rand(5, 4, generator=generator) * 6 - 3
    exclusion = torch.rand(5, 8, 8, generator=generator) < 0.2
    masks = generate_pseudo_masks(
        teacher,
        student,
        method=method,
        roi_boxes=rois,
        gt_boxes=gt_boxes,
        exclusion_masks=exclusion,
    )
    assert not masks[exclusion].any()
    assert not masks[~cells_inside_boxes(rois, gt_boxes, 8)].any()
    assert ((masks >= 0) & (masks <= 1)).all()
    if method != "none":
        assert ((masks == 0) | (masks == 1)).all()


def test_generator_reads_boxes_and_exclusion_from_the_rois():
    rois = Instances((8, 8))
    rois.proposal_boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]))
    rois.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 2.0], [4.0, 0.0, 8.0, 4.0]]))
    image_map = torch.zeros(8, 8, dtype=torch.bool)
    image_map[:, 6:] = True
    rois.gt_exclusion_masks = ImageMask(image_map, 2)
    empty = Instances((8, 8), proposal_boxes=Boxes(torch.zeros(0, 4)))
    ones = torch.ones(2, 4, 4)
    masks = PseudoMaskGenerator(method="threshold")(ones, ones, [empty, rois])
    assert masks[0].tolist() == [[1, 1, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2
    assert masks[1].tolist() == [[1, 1, 0, 0]] * 4
    settings_off = PseudoMaskGenerator(method="threshold", clip_to_box=False, exclude_seen=False)
    assert torch.equal(settings_off(ones, ones, [rois]), ones)


SIDE = 28


def test_mean_takes_the_place_of_the_teachers_probabilities():
    torch.manual_seed(0)
    rois = make_proposals(add_model_masks(targets_of(WITH_MODEL_MASKS)))
    teacher, student = torch.randn(2, 10, SIDE, SIDE) * 2
    masks = [x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, SIDE).float() for x in rois]
    is_external = torch.cat([has_model_mask_of(x) for x in rois])
    probs = teacher.sigmoid()
    mixed = torch.where(is_external[:, None, None], (probs + torch.cat(masks)) / 2, probs)
    # A finer teacher is averaged before the mean.
    finer = teacher.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    for method in ("none", "threshold", "interact"):
        generator = PseudoMaskGenerator(method=method)
        expected = generator(mixed, student.sigmoid(), rois)
        for logits in (teacher, finer):
            made, has_target, _ = make_student_targets(
                torch.zeros(10, SIDE, SIDE), rois, logits, student, generator, external="mean"
            )
            assert has_target.tolist() == [True] * 10
            unmasked = ~torch.cat([x.gt_has_mask for x in rois])
            torch.testing.assert_close(made[unmasked], expected[unmasked])


def test_scalars_by_hand():
    rois = Instances((4, 4), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 4, 4]])))
    rois.gt_boxes, rois.gt_classes = rois.proposal_boxes, torch.tensor([0])
    rois.gt_has_mask = torch.tensor([False])
    rois.gt_exclusion_masks = ImageMask(torch.zeros(4, 4), 1)
    teacher = torch.tensor([[[0.9, 0.5], [0.1, 0.4]]]).logit()
    student = torch.tensor([[[0.6, 0.4], [0.2, 0.3]]]).logit()  # the second cell differs
    generator = PseudoMaskGenerator(method="threshold", threshold=0.6)
    _, _, scalars = make_student_targets(torch.zeros(1, 2, 2), [rois], teacher, student, generator)
    logged = {name: value.item() for name, value in scalars.items()}
    assert logged == {
        "pseudo_mask/fg_ratio": 0.25,
        "pseudo_mask/agreement": 0.75,
        "pseudo_mask/num_rois": 1,
    }
