"""Pseudo masks on grids small enough to write down, their invariants, and the student's targets."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from roi_heads_factory import WITH_MODEL_MASKS, add_model_masks, make_proposals, targets_of

from teacher_student_mask import ImageMask
from teacher_student_mask.modeling.mask_targets import (
    cells_inside_boxes,
    has_model_mask_of,
    masked_bce_loss,
    masked_dice_loss,
)
from teacher_student_mask.modeling.pseudo_masks import (
    PSEUDO_MASK_METHODS,
    PseudoMaskGenerator,
    balance_foreground,
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
    masks = generate_pseudo_masks(TEACHER, STUDENT, method="self")
    assert same(masks, [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]])


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
    rois = Instances((4, 4), proposal_boxes=Boxes(torch.tensor([[0.0, 0, 4, 4]] * 3)))
    rois.gt_boxes, rois.gt_classes = rois.proposal_boxes, torch.tensor([0, 2, 2])
    rois.gt_has_mask = torch.tensor([False] * 3)
    rois.gt_exclusion_masks = ImageMask(torch.zeros(4, 4), 3)
    full = [[0.9, 0.9], [0.9, 0.9]]
    teacher = torch.tensor([[[0.9, 0.5], [0.1, 0.4]], full, [[0.9, 0.9], [0.1, 0.1]]]).logit()
    student = torch.tensor([[[0.6, 0.4], [0.2, 0.3]], full, full]).logit()  # three cells differ
    generator = PseudoMaskGenerator(method="threshold", threshold=0.6)
    _, _, scalars = make_student_targets(torch.zeros(3, 2, 2), [rois], teacher, student, generator)
    logged = {name: value.item() for name, value in scalars.items()}
    assert logged == {
        "pseudo_mask/fg_ratio": pytest.approx(7 / 12),
        "pseudo_mask/agreement": 0.75,
        "pseudo_mask/num_rois": 3,
    }


# ---- "interact" and the share of foreground ----


def test_balanced_students_have_the_foreground_of_the_teacher():
    student = torch.tensor([[[0.40, 0.30], [0.20, 0.10]]]).expand(4, 2, 2)
    teacher = torch.zeros(4, 4)
    for num_cells in range(4):  # none, one, two, three; and all below
        teacher[num_cells, :num_cells] = 0.9
    balanced = balance_foreground(student, teacher.view(4, 2, 2))
    assert (balanced >= 0.5).flatten(1).sum(1).tolist() == [0, 1, 2, 3]
    full = balance_foreground(student[:1], torch.ones(1, 2, 2))
    assert (full >= 0.5).all()
    shifts = balanced.logit() - student.logit()
    assert (shifts - shifts[:, :1, :1]).abs().max() < 1e-5
    assert balanced[1, 0, 1] < 0.5 < balanced[1, 0, 0]
    # Half-way between the logits of 0.4 and 0.3.
    border = (math.log(0.4 / 0.6) + math.log(0.3 / 0.7)) / 2
    assert balanced[1, 0, 0].logit().item() == pytest.approx(math.log(0.4 / 0.6) - border, abs=1e-5)


def train_a_linear_student(share, loss=masked_bce_loss, **settings):
    """
    Of features with cosine 0.45 between foreground and background, on one ROI: the share of the
    foreground in the last target.
    """
    side, rho = 20, 0.45
    truth = torch.zeros(1, side, side)
    truth.view(-1)[: int(share * side**2)] = 1
    foreground, background = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]])
    features = torch.where(truth[..., None] > 0, foreground, background)
    # Right everywhere, and unsure about the foreground, as of a class without masks.
    noise = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    teacher = torch.where(truth > 0, 0.5 + 0.15 * noise, 0.5 - 0.3 * noise)
    weights = torch.zeros(2, requires_grad=True)
    for _ in range(200):
        student = features @ weights
        target = generate_pseudo_masks(teacher, student.detach().sigmoid(), **settings)
        (gradient,) = torch.autograd.grad(loss(student, target, torch.tensor([True])), weights)
        weights = (weights - 5 * gradient).detach().requires_grad_()
    return target[truth > 0].mean().item()


@pytest.mark.parametrize("share, left", [(0.25, 0.0), (0.32, 1.0), (0.60, 1.0)])
def test_interact_collapses_where_an_object_fills_little_of_its_box(share, left):
    """
    The student sets the threshold of its own targets, 1 - p_s, and BCE makes the foreground's first
    logit negative where the share is below rho / (1 + rho), here 0.31.
    """
    assert train_a_linear_student(share) == pytest.approx(left)


@pytest.mark.parametrize(
    "cure", [{"loss": masked_dice_loss}, {"balance": "share"}, {"method": "threshold"}]
)
def test_cures_of_the_collapse(cure):
    assert train_a_linear_student(0.25, **cure) == pytest.approx(1.0)
