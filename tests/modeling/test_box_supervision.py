"""Losses on boxes against loops over cells, values worked out by hand and numerical gradients."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.modeling.box_supervision import (
    BoxSupervision,
    color_similarity,
    dice_loss,
    masked_dice_loss,
    pairwise_loss,
    projection_loss,
)

# Row by row, without the centre.
STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]

small_grids = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))


def random_rois(num_rois, side, seed, scale=3.0):
    """Logits, Lab in which neighbours are often similar, validity, boxes and which are small."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (num_rois, side, side))
    lab = rng.integers(0, 3, (num_rois, 3, side, side)) * 1.5
    valid = rng.random((num_rois, side, side)) < 0.8
    box_masks = rng.random((num_rois, side, side)) < 0.6
    is_small = rng.random(num_rois) < 0.5
    return logits, lab, valid, box_masks, is_small


def tensors(*arrays):
    return tuple(torch.from_numpy(np.asarray(array)) for array in arrays)


def dice_by_hand(a, b):
    return 1 - 2 * sum(x * y for x, y in zip(a, b)) / (
        sum(x * x for x in a) + sum(y * y for y in b) + 1e-5
    )


def projection_by_hand(logits, box_masks):
    total = 0.0
    for p, box in zip(1 / (1 + np.exp(-logits)), box_masks):
        total += dice_by_hand([max(row) for row in p], [float(any(row)) for row in box])
        total += dice_by_hand([max(row) for row in p.T], [float(any(row)) for row in box.T])
    return total / len(logits)


def similarity_by_hand(lab, valid, dilation, is_small):
    num_rois, _, side, _ = lab.shape
    result = np.zeros((num_rois, 8, side, side))
    for r in range(num_rois):
        distance = 1 if is_small[r] else dilation
        for y in range(side):
            for x in range(side):
                for k, (dy, dx) in enumerate(STEPS):
                    v, u = y + distance * dy, x + distance * dx
                    if 0 <= v < side and 0 <= u < side and valid[r, v, u]:
                        difference = lab[r, :, y, x] - lab[r, :, v, u]
                        result[r, k, y, x] = math.exp(-math.sqrt((difference**2).sum()) / 2)
    return result


def pairwise_by_hand(logits, similarity, box_masks, threshold, dilation, is_small):
    num_rois, side, _ = logits.shape
    total, count = 0.0, 0
    probs = 1 / (1 + np.exp(-logits))
    for r in range(num_rois):
        distance = 1 if is_small[r] else dilation
        for y in range(side):
            for x in range(side):
                for k, (dy, dx) in enumerate(STEPS):
                    if box_masks[r, y, x] and similarity[r, k, y, x] >= threshold:
                        p, q = probs[r, y, x], probs[r, y + distance * dy, x + distance * dx]
                        total -= math.log(p * q + (1 - p) * (1 - q))
                        count += 1
    return total / max(count, 1)


def test_dice_by_hand():
    probs = torch.tensor([[0.5, 1.0], [1.0, 0.0]])
    targets = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    # 1 - 2 / (1.25 + 1) = 1/9; disjoint: 1.
    torch.testing.assert_close(
        dice_loss(probs, targets), torch.tensor([1 / 9, 1.0]), atol=1e-5, rtol=0
    )


def test_dice_of_next_to_nothing():
    # The constant in the denominator counts: 1 - 2e-4 / (2e-4 + 1e-5).
    nearly_empty = torch.tensor([[0.01, 0.0]])
    assert dice_loss(nearly_empty, nearly_empty).item() == pytest.approx(1 / 21, rel=1e-4)


def test_dice_is_over_all_dimensions_but_the_first():
    probs, targets = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    expected = [
        dice_by_hand(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(probs, targets)
    ]
    np.testing.assert_allclose(dice_loss(probs, targets), expected, atol=1e-6)


def test_dice_of_an_empty_target_is_one_without_gradient():
    probs = torch.rand(1, 9, requires_grad=True)
    loss = dice_loss(probs, torch.zeros(1, 9))
    loss.sum().backward()
    assert loss.tolist() == [1] and not probs.grad.any()


def test_masked_dice_is_the_mean_of_the_supervised_rois():
    logits = torch.tensor([[[0.0, 50.0]], [[3.0, -2.0]], [[50.0, 50.0]]], requires_grad=True)
    targets = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]])
    loss = masked_dice_loss(logits, targets, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx((1 / 9 + 0) / 2, abs=1e-5)
    loss.backward()
    assert logits.grad[0].any() and not logits.grad[1].any()


@pytest.mark.parametrize("num_rois", [0, 3])
def test_masked_dice_without_supervised_rois_is_zero_and_attached(num_rois):
    logits = torch.randn(num_rois, 2, 2, requires_grad=True)
    loss = masked_dice_loss(logits, torch.zeros(num_rois, 2, 2), torch.zeros(num_rois).bool())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


@given(small_grids)
@settings(max_examples=40, deadline=None)
def test_projection_is_that_of_a_loop(grid):
    logits, _, _, box_masks, _ = random_rois(*grid)
    loss = projection_loss(*tensors(logits, box_masks))
    assert loss.item() == pytest.approx(projection_by_hand(logits, box_masks), abs=1e-9)


def rectangle(side, y0, y1, x0, x1):
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("box", [(5, 20, 3, 9), (0, 28, 0, 28), (7, 8, 11, 12)])
def test_projection_of_the_box_itself_is_zero(box):
    box_masks = rectangle(28, *box)
    logits = torch.where(box_masks, 50.0, -50.0)
    assert 0 <= projection_loss(logits, box_masks).item() < 1e-4
    # A cross that touches all four sides casts the same shadows.
    y0, y1, x0, x1 = box
    cross = rectangle(28, y0, y0 + 1, x0, x1) | rectangle(28, y0, y1, x0, x0 + 1)
    assert projection_loss(torch.where(cross, 50.0, -50.0), box_masks).item() < 1e-4
    assert projection_loss(-logits, box_masks).item() > 0.5


def test_projection_sees_a_row_that_is_missing():
    box_masks = rectangle(4, 0, 4, 0, 4)
    logits = torch.full((1, 4, 4), 50.0)
    logits[:, 0] = -50
    # Rows: 1 - 2 * 3 / (3 + 4); columns all there.
    assert projection_loss(logits, box_masks).item() == pytest.approx(1 / 7, abs=1e-5)


def test_projection_of_a_box_without_a_cell_is_a_constant():
    logits = torch.randn(2, 4, 4, requires_grad=True)
    box_masks = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).bool()
    loss = projection_loss(logits, box_masks)
    alone = projection_loss(logits[1:], box_masks[1:])
    assert loss.item() == pytest.approx((2 + alone.item()) / 2)
    loss.backward()
    assert not logits.grad[0].any() and logits.grad[1].any()


@given(small_grids, st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_similarity_is_that_of_a_loop(grid, dilation):
    _, lab, valid, _, is_small = random_rois(*grid)
    similarity = color_similarity(*tensors(lab, valid), dilation, *tensors(is_small))
    expected = similarity_by_hand(lab, valid, dilation, is_small)
    np.testing.assert_allclose(similarity, expected, atol=1e-9)


def test_similarity_by_hand():
    # Lab distance 2 to the right neighbour: exp(-1). Everything else lies outside the grid.
    lab = torch.zeros(1, 3, 1, 2)
    lab[0, :, 0, 1] = torch.tensor([2.0, 0.0, 0.0])
    similarity = color_similarity(lab, torch.ones(1, 1, 2).bool(), dilation=1)
    assert similarity[0, 4, 0].tolist() == pytest.approx([math.exp(-1), 0])
    assert similarity[0, 3, 0].tolist() == pytest.approx([0, math.exp(-1)])
    assert similarity.sum().item() == pytest.approx(2 * math.exp(-1))


def test_similarity_to_an_invalid_neighbour_is_zero_but_not_from_an_invalid_cell():
    valid = torch.tensor([[[True, False]]])
    similarity = color_similarity(torch.zeros(1, 3, 1, 2), valid, dilation=1)
    assert similarity[0, 4, 0].tolist() == [0, 0]
    assert similarity[0, 3, 0].tolist() == [0, 1]


def test_similarity_has_no_gradient():
    lab = torch.rand(1, 3, 4, 4, requires_grad=True)
    assert not color_similarity(lab, torch.ones(1, 4, 4).bool()).requires_grad


@given(small_grids, st.integers(1, 3), st.sampled_from([0.1, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_pairwise_is_that_of_a_loop(grid, dilation, threshold):
    logits, lab, valid, box_masks, is_small = random_rois(*grid)
    similarity = similarity_by_hand(lab, valid, dilation, is_small)
    arrays = tensors(logits, similarity, box_masks)
    loss = pairwise_loss(*arrays, threshold, dilation, *tensors(is_small))
    expected = pairwise_by_hand(logits, similarity, box_masks, threshold, dilation, is_small)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_pairwise_by_hand():
    # Two cells of one colour, p = 3/4 and 1/2, the left one in the box: -log(3/8 + 1/8) once.
    logits = torch.tensor([[[math.log(3), 0.0]]])
    similarity = torch.zeros(1, 8, 1, 2)
    similarity[0, 4, 0, 0] = similarity[0, 3, 0, 1] = 1
    box_masks = torch.tensor([[[True, False]]])
    loss = pairwise_loss(logits, similarity, box_masks, dilation=1)
    assert loss.item() == pytest.approx(math.log(2))


def test_the_threshold_is_inclusive():
    logits = torch.tensor([[[50.0, -50.0]]])
    similarity = torch.zeros(1, 8, 1, 2)
    similarity[0, 4] = 0.5
    similarity[0, 4, 0, 1] = 0
    everywhere = torch.ones(1, 1, 2).bool()
    assert pairwise_loss(logits, similarity, everywhere, 0.5, 1).item() == pytest.approx(50, abs=1)
    assert pairwise_loss(logits, similarity, everywhere, 0.51, 1).item() == 0


def one_color(num_rois, side, dilation=2):
    valid = torch.ones(num_rois, side, side, dtype=torch.bool)
    return color_similarity(torch.zeros(num_rois, 3, side, side), valid, dilation), valid


@pytest.mark.parametrize("logit", [50.0, -50.0, 1e4, -1e4])
def test_pairwise_is_zero_when_all_cells_agree(logit):
    similarity, everywhere = one_color(2, 28)
    logits = torch.full((2, 28, 28), logit)
    assert pairwise_loss(logits, similarity, everywhere).item() == pytest.approx(0, abs=1e-6)


def test_pairwise_does_not_mind_which_label_it_is():
    logits, lab, valid, box_masks, _ = tensors(*random_rois(3, 6, 0))
    similarity = color_similarity(lab, valid)
    loss = pairwise_loss(logits, similarity, box_masks)
    assert loss > 0.1
    torch.testing.assert_close(pairwise_loss(-logits, similarity, box_masks), loss)


@given(st.integers(0, 2**32 - 1), st.sampled_from([50.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_saturated_logits_have_finite_losses_and_gradients(seed, size):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.choice([-size, size], (2, 8, 8))).float().requires_grad_()
    similarity, _ = one_color(2, 8)
    box_masks = torch.from_numpy(rng.random((2, 8, 8)) < 0.5)
    pairwise = pairwise_loss(logits, similarity, box_masks)
    loss = pairwise + projection_loss(logits, box_masks)
    loss = loss + masked_dice_loss(logits, box_masks.float(), torch.ones(2).bool())
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # A pair of opposite labels costs about the size of a logit; it still pulls.
    if pairwise > 1:
        assert logits.grad.any()


def test_gradients_are_the_numerical_ones():
    logits, lab, valid, box_masks, _ = tensors(*random_rois(3, 5, 0, scale=2.0))
    logits.requires_grad_()
    is_small = torch.tensor([True, False, True])
    similarity = color_similarity(lab, valid, 2, is_small)
    targets = box_masks.double()
    functions = [
        lambda x: projection_loss(x, box_masks),
        lambda x: pairwise_loss(x, similarity, box_masks, 0.3, 2, is_small),
        lambda x: masked_dice_loss(x, targets, is_small),
    ]
    for function in functions:
        assert function(logits).item() > 0
        assert torch.autograd.gradcheck(function, (logits,))


def test_half_precision_logits_give_the_losses_of_single_precision():
    logits, lab, valid, box_masks, is_small = tensors(*random_rois(3, 28, 0))
    logits = logits.half()
    similarity = color_similarity(lab, valid)
    for function in (
        lambda x: projection_loss(x, box_masks),
        lambda x: pairwise_loss(x, similarity, box_masks),
        lambda x: masked_dice_loss(x, box_masks, torch.ones(3).bool()),
    ):
        assert function(logits).dtype == torch.float32
        torch.testing.assert_close(function(logits), function(logits.float()))


def make_call(side=8, num_rois=2, roi_side=100.0, requires_grad=True):
    """Arguments of BoxSupervision.forward but the iteration: one colour, all valid."""
    torch.manual_seed(0)
    return {
        "logits": torch.randn(num_rois, side, side, requires_grad=requires_grad),
        "box_masks": torch.ones(num_rois, side, side, dtype=torch.bool),
        "roi_boxes": torch.tensor([[0.0, 0.0, roi_side, roi_side]]).repeat(num_rois, 1),
        "roi_lab": torch.zeros(num_rois, 3, side, side),
        "valid": torch.ones(num_rois, side, side, dtype=torch.bool),
    }


def test_the_two_losses_and_their_weights():
    call = make_call()
    losses = BoxSupervision(warmup_iters=0)(**call, iteration=0)
    assert set(losses) == {"loss_mask_projection", "loss_mask_pairwise"}
    similarity = color_similarity(call["roi_lab"], call["valid"], 2)
    projection = projection_loss(call["logits"], call["box_masks"])
    pairwise = pairwise_loss(call["logits"], similarity, call["box_masks"])
    assert losses["loss_mask_projection"].item() == pytest.approx(projection.item())
    assert losses["loss_mask_pairwise"].item() == pytest.approx(pairwise.item())
    weighted = BoxSupervision(warmup_iters=0, projection_weight=3.0, pairwise_weight=0.5)
    losses = weighted(**call, iteration=0)
    assert losses["loss_mask_projection"].item() == pytest.approx(3 * projection.item())
    assert losses["loss_mask_pairwise"].item() == pytest.approx(pairwise.item() / 2)


@pytest.mark.parametrize(
    "warmup_iters, iteration, factor",
    [(100, 0, 0), (100, 25, 0.25), (100, 100, 1), (100, 999, 1), (0, 0, 1), (0, 7, 1)],
)
def test_warm_up_is_of_the_pairwise_loss_alone(warmup_iters, iteration, factor):
    call = make_call()
    full = BoxSupervision(warmup_iters=0)(**call, iteration=0)
    losses = BoxSupervision(warmup_iters=warmup_iters)(**call, iteration=iteration)
    assert losses["loss_mask_projection"].item() == full["loss_mask_projection"].item()
    expected = factor * full["loss_mask_pairwise"].item()
    assert losses["loss_mask_pairwise"].item() == pytest.approx(expected)
    losses["loss_mask_pairwise"].backward()
    assert call["logits"].grad.any() == (factor > 0)


def test_defaults_are_boxinsts():
    supervision = BoxSupervision()
    assert (supervision.threshold, supervision.dilation, supervision.warmup_iters) == (
        0.3,
        2,
        10000,
    )
    assert (supervision.projection_weight, supervision.pairwise_weight) == (1, 1)
    assert supervision.bottom_rows == 10
    assert not supervision.state_dict() and not list(supervision.parameters())


@pytest.mark.parametrize(
    "size, distance", [((56, 100), 2), ((55.9, 100), 1), ((100, 55.9), 1), ((20, 20), 1)]
)
def test_rois_with_a_short_side_below_56_pixels_have_near_neighbours(size, distance):
    call = make_call(num_rois=3)
    # Stripes 1 cell wide: neighbours at distance 2 in x have the same colour, at distance 1 not.
    call["roi_lab"][:, :, :, ::2] = 100
    call["roi_boxes"][1] = torch.tensor([7.0, 9.0, 7 + size[0], 9 + size[1]])
    # Only the ROI in question counts.
    call["box_masks"][0] = call["box_masks"][2] = False
    loss = BoxSupervision(warmup_iters=0)(**call, iteration=0)["loss_mask_pairwise"]
    arrays = [x.detach().double().numpy() for x in (call["logits"], call["roi_lab"])]
    is_small = [False, distance == 1, False]
    similarity = similarity_by_hand(arrays[1], call["valid"].numpy(), 2, is_small)
    expected = pairwise_by_hand(arrays[0], similarity, call["box_masks"].numpy(), 0.3, 2, is_small)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_threshold_and_dilation_reach_the_pairwise_loss():
    call = make_call()
    torch.manual_seed(1)
    call["roi_lab"] = torch.rand(2, 3, 8, 8)
    for settings_ in ({"threshold": 0.8}, {"dilation": 3}):
        loss = BoxSupervision(warmup_iters=0, **settings_)(**call, iteration=0)
        dilation, threshold = settings_.get("dilation", 2), settings_.get("threshold", 0.3)
        similarity = color_similarity(call["roi_lab"], call["valid"], dilation)
        expected = pairwise_loss(call["logits"], similarity, call["box_masks"], threshold, dilation)
        assert loss["loss_mask_pairwise"].item() == pytest.approx(expected.item())


def test_without_rois_both_losses_are_zero_and_attached():
    call = make_call(num_rois=0)
    losses = BoxSupervision()(**call, iteration=5)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert call["logits"].grad is not None


def test_a_roi_outside_the_valid_area_has_no_pairs():
    call = make_call()
    call["valid"][:] = False
    loss = BoxSupervision(warmup_iters=0)(**call, iteration=0)["loss_mask_pairwise"]
    loss.backward()
    assert loss.item() == 0
    assert not call["logits"].grad.any()


def test_a_box_without_a_cell_has_no_pairs_and_no_gradient():
    call = make_call()
    call["box_masks"][:] = False
    losses = BoxSupervision(warmup_iters=0)(**call, iteration=0)
    assert losses["loss_mask_pairwise"].item() == 0
    assert losses["loss_mask_projection"].item() == 2
    sum(losses.values()).backward()
    assert not call["logits"].grad.any()


def test_from_pixels_to_losses():
    # The object is the red left half of the ROI, whose box is the whole ROI: a mask that follows
    # the colours is cheaper than one whose edge runs through the red.
    pixels = torch.full((1, 3, 128, 128), 255.0)
    pixels[:, 1:, :, :64] = 0
    boxes = Boxes(torch.tensor([[0.0, 0.0, 128.0, 112.0]]))
    supervision = BoxSupervision(warmup_iters=0)
    lab, valid = supervision.crop_lab(pixels, [(128, 128)], [boxes], 28)
    assert valid.sum() == 28 * 28

    def loss_of(num_columns):
        logits = torch.full((1, 28, 28), -9.0)
        logits[:, :, :num_columns] = 9
        losses = supervision(logits, valid, boxes.tensor, lab, valid, iteration=0)
        return losses["loss_mask_pairwise"].item()

    assert loss_of(14) < 0.05 < 0.2 < loss_of(8)


def test_crops_leave_out_the_bottom_rows_of_the_settings():
    pixels = torch.zeros(1, 3, 64, 64)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, 64.0, 64.0]]))]
    rows = [
        BoxSupervision(bottom_rows=n).crop_lab(pixels, [(64, 64)], boxes, 64, heights)[1][0].any(1)
        for n, heights in [(0, None), (7, None), (7, [32])]
    ]
    assert [row.sum().item() for row in rows] == [64, 57, 50]


@pytest.mark.parametrize(
    "argument, value, message",
    [
        ("threshold", 0, "COLOR_THRESHOLD is 0; allowed: above 0, at most 1"),
        ("threshold", 1.5, "COLOR_THRESHOLD is 1.5"),
        ("threshold", float("nan"), "COLOR_THRESHOLD is nan"),
        ("dilation", 0, "DILATION is 0; allowed: 1, 2, ..."),
        ("dilation", 1.5, "DILATION is 1.5"),
        ("projection_weight", -1, "PROJECTION_WEIGHT is -1; allowed: 0 or more"),
        ("pairwise_weight", -1, "PAIRWISE_WEIGHT is -1"),
        ("warmup_iters", -1, "WARMUP_ITERS is -1"),
        ("bottom_rows", -1, "BOTTOM_ROWS is -1"),
    ],
)
def test_settings_outside_their_range_are_named(argument, value, message):
    with pytest.raises(ValueError, match=f"MODEL.BOX_SUPERVISION.{message}"):
        BoxSupervision(**{argument: value})
