"""Pseudo masks on grids small enough to write down, and their invariants."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask import ImageMask
from teacher_student_mask.modeling.pseudo_mask import (
    PSEUDO_MASK_METHODS,
    PseudoMaskGenerator,
    cells_inside_boxes,
    fit_to_boxes,
    generate_pseudo_masks,
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


def test_none_keeps_the_teachers_probabilities():
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="none")
    assert torch.equal(masks, TEACHER)


def test_threshold_is_inclusive():
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="threshold")
    assert same(masks, [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]])


def test_interact_thresholds_the_mean_of_both_probabilities():
    # Sums: 1.0 1.1 .9 .9 | 1.0 .9 1.0 1.1 | .9 1.0 1.0 .9 | 1.0 1.1 .9 .1; foreground from 1.0 on.
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="interact")
    assert same(masks, [[1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])


def test_another_threshold():
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="threshold", threshold=0.9)
    assert same(masks, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_masks_are_clipped_to_the_box_by_cell_centres():
    # Centres lie at .5, 1.5, ..; the edge at 1.5 belongs to the box, the one at 3.4 leaves 3.5 out.
    box = torch.tensor([[1.5, 0.6, 3.4, 4.0]])
    inside = cells_inside_boxes(ROI, box, 4)
    assert inside[0].tolist() == [[False] * 4] + [[False, True, True, False]] * 3
    ones = torch.ones(1, 4, 4)
    masks = generate_pseudo_masks(ones, ones, roi_boxes=ROI, gt_boxes=box)
    assert torch.equal(masks, inside.float())
    whole = generate_pseudo_masks(ones, ones, roi_boxes=ROI, gt_boxes=box, clip_to_box=False)
    assert torch.equal(whole, ones)


def test_box_coordinates_are_those_of_the_image_not_of_the_roi():
    roi, box = torch.tensor([[10.0, 20.0, 18.0, 28.0]]), torch.tensor([[14.0, 20.0, 30.0, 24.0]])
    expected = [[False, False, True, True]] * 2 + [[False] * 4] * 2
    assert cells_inside_boxes(roi, box, 4)[0].tolist() == expected


@pytest.mark.parametrize("method", ["none", "threshold", "interact", "box_fit"])
def test_excluded_cells_are_background_for_every_method(method):
    exclusion = torch.zeros(1, 4, 4, dtype=torch.bool)
    exclusion[0, 1:3, 0:2] = True
    ones = torch.ones(1, 4, 4)
    masks = generate_pseudo_masks(
        ones, ones, method=method, roi_boxes=ROI, gt_boxes=ROI, exclusion_masks=exclusion
    )
    assert torch.equal(masks, (~exclusion).float())


def test_a_finer_teacher_is_averaged_down_before_the_threshold():
    teacher = torch.zeros(1, 4, 4)
    teacher[0, :2, :2] = torch.tensor([[1.0, 1.0], [0.0, 0.0]])  # mean 0.5
    teacher[0, :2, 2:] = torch.tensor([[1.0, 0.9], [0.0, 0.0]])  # mean 0.475
    student = torch.zeros(1, 2, 2)
    masks = generate_pseudo_masks(teacher, student, method="threshold")
    assert same(masks, [[1, 0], [0, 0]])
    soft = generate_pseudo_masks(teacher, student, method="none")
    assert soft[0, 0].tolist() == pytest.approx([0.5, 0.475])


def test_a_teacher_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6-cell masks do not divide into the student's 4"):
        generate_pseudo_masks(torch.zeros(1, 6, 6), torch.zeros(1, 4, 4))


def test_crf_gets_the_teacher_and_the_pixels_and_is_thresholded():
    seen = {}

    def crf(probs, images):
        seen["probs"], seen["images"] = probs, images
        return 1 - probs

    images = torch.rand(1, 3, 4, 4)
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="crf", crf=crf, roi_images=images)
    assert same(masks, [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(seen["probs"], TEACHER) and seen["images"] is images


def test_missing_arguments_and_unknown_methods_are_named():
    with pytest.raises(ValueError, match="'treshold'; allowed: none, threshold, interact"):
        generate_pseudo_masks(TEACHER, STUDENT, method="treshold")
    with pytest.raises(ValueError, match="'crf' needs 'crf' and 'roi_images'"):
        generate_pseudo_masks(TEACHER, STUDENT, method="crf")
    with pytest.raises(ValueError, match="'box_fit' needs 'roi_boxes' and 'gt_boxes'"):
        generate_pseudo_masks(TEACHER, STUDENT, method="box_fit")
    with pytest.raises(ValueError, match="METHOD is 'treshold'"):
        PseudoMaskGenerator(method="treshold")
    with pytest.raises(ValueError, match="needs the argument 'crf'"):
        PseudoMaskGenerator(method="crf")


def test_no_gradient_flows_into_either_head():
    teacher, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    for method in ("none", "threshold", "interact", "box_fit"):
        masks = generate_pseudo_masks(teacher, student, method=method, roi_boxes=ROI, gt_boxes=ROI)
        assert not masks.requires_grad


def test_empty_input():
    empty = torch.zeros(0, 4, 4)
    for method in ("none", "threshold", "interact", "box_fit"):
        boxes = torch.zeros(0, 4)
        masks = generate_pseudo_masks(
            empty, empty, method=method, roi_boxes=boxes, gt_boxes=boxes, exclusion_masks=empty > 0
        )
        assert masks.shape == (0, 4, 4)


ALL_INSIDE = torch.ones(1, 4, 4, dtype=torch.bool)


def test_box_fit_lowers_the_threshold_until_the_mask_touches_all_sides():
    # An under-confident plus: nothing reaches 0.5, at 0.3 the arms reach all four sides.
    probs = torch.tensor(
        [[[0.0, 0.3, 0.0, 0.0], [0.3, 0.4, 0.4, 0.3], [0.0, 0.4, 0.0, 0.0], [0.1, 0.3, 0.1, 0.0]]]
    )
    mask = fit_to_boxes(probs, ALL_INSIDE)
    assert same(mask, [[0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]])


def test_box_fit_takes_the_highest_of_equally_good_thresholds():
    # From 0.05 to 0.6 the mask spans the box; only the corners are left at 0.6.
    probs = torch.full((1, 4, 4), 0.3)
    probs[0, 0, 0] = probs[0, 3, 3] = 0.62
    mask = fit_to_boxes(probs, ALL_INSIDE)
    assert same(mask, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_box_fit_judges_by_the_box_and_not_by_the_roi():
    # Outside the box (left two columns) the teacher is sure of something else.
    probs = torch.zeros(1, 4, 4)
    probs[0, :, :2] = 0.9
    probs[0, :, 2:] = 0.2
    inside = torch.zeros(1, 4, 4, dtype=torch.bool)
    inside[0, :, 2:] = True
    assert torch.equal(fit_to_boxes(probs, inside), inside)


def test_box_fit_falls_back_to_the_whole_box():
    inside = torch.zeros(1, 4, 4, dtype=torch.bool)
    inside[0, 1:3, 1:4] = True
    assert torch.equal(fit_to_boxes(torch.full((1, 4, 4), 0.01), inside), inside)


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


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_interact_is_threshold_when_both_heads_agree(seed):
    probs = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(seed))
    interact = generate_pseudo_masks(probs, probs, method="interact")
    assert torch.equal(interact, generate_pseudo_masks(probs, probs, method="threshold"))


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
