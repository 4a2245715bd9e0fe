"""BoxInst's losses against loops; Lab colours against published values and scikit-image."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.modeling.box_supervision import (
    BoxSupervision,
    color_similarity,
    crop_lab,
    pairwise_loss,
    projection_loss,
    rgb_to_lab,
)
from teacher_student_mask.modeling.mask_targets import masked_dice_loss

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


@given(small_grids, st.integers(1, 3), st.sampled_from([0.1, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_pairwise_is_that_of_a_loop(grid, dilation, threshold):
    logits, lab, valid, box_masks, is_small = random_rois(*grid)
    similarity = similarity_by_hand(lab, valid, dilation, is_small)
    arrays = tensors(logits, similarity, box_masks)
    loss = pairwise_loss(*arrays, threshold, dilation, *tensors(is_small))
    expected = pairwise_by_hand(logits, similarity, box_masks, threshold, dilation, is_small)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.sampled_from([50.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_saturated_logits_have_finite_losses_and_gradients(seed, size):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.choice([-size, size], (2, 8, 8))).float().requires_grad_()
    valid, is_small = torch.ones(2, 8, 8).bool(), torch.zeros(2).bool()
    similarity = color_similarity(torch.zeros(2, 3, 8, 8), valid, 2, is_small)
    box_masks = torch.from_numpy(rng.random((2, 8, 8)) < 0.5)
    pairwise = pairwise_loss(logits, similarity, box_masks, 0.3, 2, is_small)
    loss = pairwise + projection_loss(logits, box_masks)
    loss = loss + masked_dice_loss(logits, box_masks.float(), torch.ones(2).bool())
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    # A pair of opposite labels costs about the size of a logit; it still pulls.
    if pairwise > 1:
        assert logits.grad.any()


def lab_of(*colors, dtype=torch.float32):
    """Lab of a list of RGB colours, one row each."""
    image = torch.tensor(colors, dtype=dtype).T.reshape(1, 3, 1, -1)
    return rgb_to_lab(image)[0, :, 0].T


@pytest.mark.parametrize(
    "rgb, lab",
    [
        # As in published tables for sRGB under D65, which round to 2 digits.
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        # Dark grey, linear on both curves: 116 * 7.787 * (5 / 255 / 12.92) = 1.371.
        ((5, 5, 5), (1.371, 0, 0)),
        # ((119 / 255 + 0.055) / 1.055) ** 2.4 = 0.1845; 116 * 0.1845 ** (1 / 3) - 16 = 50.03.
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_known_colors(rgb, lab):
    np.testing.assert_allclose(lab_of(rgb)[0], lab, atol=0.011)


RED, BLUE = (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)


def two_images():
    """A red one, and one that is red in the left half and blue in the right one; 32 x 64."""
    pixels = torch.tensor(RED).reshape(1, 3, 1, 1).repeat(2, 1, 32, 64)
    pixels[1, :, :, 32:] = torch.tensor(BLUE).reshape(3, 1, 1)
    return pixels


def crop(pixels, boxes, sizes=((32, 64), (32, 64)), side=4, **kwargs):
    boxes = [Boxes(torch.tensor(b, dtype=torch.float32).reshape(-1, 4)) for b in boxes]
    return crop_lab(pixels, list(sizes), boxes, side, **kwargs)


def test_crops_are_the_colors_under_the_cells():
    # Each cell is 8 pixels wide: the second ROI has two red columns and two blue ones.
    lab, valid = crop(two_images(), [[[4, 4, 20, 20]], [[16, 0, 48, 32]]], bottom_rows=0)
    red, blue = lab_of(RED, BLUE)
    assert lab.shape == (2, 3, 4, 4) and valid.shape == (2, 4, 4)
    assert valid.dtype == torch.bool and valid.all()
    torch.testing.assert_close(lab[0], red[:, None, None].expand(3, 4, 4))
    # Cells next to the edge sample up to their border, where ROIAlign interpolates.
    torch.testing.assert_close(lab[1, :, :, 0], red[:, None].expand(3, 4))
    torch.testing.assert_close(lab[1, :, :, 3], blue[:, None].expand(3, 4))


def valid_by_hand(box, height, width, side):
    x0, y0, x1, y1 = box
    valid = np.zeros((side, side), dtype=bool)
    for i in range(side):
        for j in range(side):
            x = x0 + (j + 0.5) * (x1 - x0) / side
            y = y0 + (i + 0.5) * (y1 - y0) / side
            valid[i, j] = 0 <= x < width and 0 <= y < height
    return valid


@pytest.mark.parametrize(
    "box", [[3, 2, 40, 28], [-2, -2, 12, 12], [-9, -7, 11, 9], [30, 10, 61, 35], [70, 3, 90, 9]]
)
def test_cells_outside_the_image_and_in_its_bottom_rows_are_not_valid(box):
    # The second image is padded from 24 x 50 pixels, and 5 rows are taken from its bottom.
    lab, valid = crop(two_images(), [[], [box]], [(32, 64), (24, 50)], side=7, bottom_rows=5)
    np.testing.assert_array_equal(valid[0], valid_by_hand(box, 24 - 5, 50, 7))
    assert lab.isfinite().all()


def make_call(seed=0, num_rois=3, side=8, size=(100, 100)):
    """ROIs at their objects' own boxes on noise: logits, rois, pixels; the first has a mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    rois = Instances((160, 160), proposal_boxes=Boxes(torch.tensor([[9.0, 7, 9, 7]] * num_rois)))
    if num_rois:
        rois.proposal_boxes.tensor[:, 2:] += torch.tensor([float(width), float(height)])
        rois.gt_boxes = Boxes(rois.proposal_boxes.tensor.clone())
        rois.gt_has_mask = torch.tensor([True] + [False] * (num_rois - 1))
    rois.gt_classes = torch.zeros(num_rois, dtype=torch.int64)
    # Patches of near colours, whose neighbours are often similar.
    patches = torch.rand(1, 3, 40, 40, generator=generator).mul(3).floor() * 6 + 100
    pixels = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    logits = torch.randn(num_rois, side, side, generator=generator).requires_grad_()
    return {"logits": logits, "rois": [rois], "pixels": pixels}


def expected_losses(call, color_threshold=0.3, dilation=2):
    """Of the ROIs of a call without a mask, by the loops above."""
    (rois,) = call["rois"]
    side = call["logits"].shape[-1]
    unmasked = rois[~rois.gt_has_mask]
    lab, valid = crop_lab(call["pixels"], [(160, 160)], [unmasked.proposal_boxes], side)
    logits = call["logits"][~rois.gt_has_mask].detach().double().numpy()
    sizes = unmasked.proposal_boxes.tensor[:, 2:] - unmasked.proposal_boxes.tensor[:, :2]
    is_small = (sizes.amin(1) < 56).tolist()
    box_masks = np.ones(logits.shape, dtype=bool)
    similarity = similarity_by_hand(lab.double().numpy(), valid.numpy(), dilation, is_small)
    pairwise = pairwise_by_hand(logits, similarity, box_masks, color_threshold, dilation, is_small)
    return projection_by_hand(logits, box_masks), pairwise


@pytest.mark.parametrize("size", [(100, 100), (56, 100), (55.9, 100), (100, 55.9)])
@pytest.mark.parametrize("settings_", [{}, {"color_threshold": 0.8}, {"dilation": 3}])
def test_the_two_losses_of_rois_without_a_mask(size, settings_):
    """ROIs with a side under 56 pixels have near neighbours."""
    call = make_call(size=size)
    projection, pairwise = expected_losses(call, **settings_)
    assert pairwise > 0
    weights = {"projection_weight": 3.0, "pairwise_weight": 0.5}
    supervision = BoxSupervision(warmup_iters=0, **weights, **settings_)
    losses = supervision(**call, iteration=0)
    assert set(losses) == {"loss_mask_projection", "loss_mask_pairwise"}
    assert losses["loss_mask_projection"].item() == pytest.approx(3 * projection, rel=1e-5)
    assert losses["loss_mask_pairwise"].item() == pytest.approx(pairwise / 2, rel=1e-4)
    sum(losses.values()).backward()
    assert not call["logits"].grad[0].any() and call["logits"].grad[1:].any()


@pytest.mark.parametrize(
    "warmup_iters, iteration, factor",
    [(100, 0, 0), (100, 25, 0.25), (100, 100, 1), (100, 999, 1), (0, 7, 1)],
)
def test_warm_up_is_of_the_pairwise_loss_alone(warmup_iters, iteration, factor):
    call = make_call()
    full = BoxSupervision(warmup_iters=0)(**call, iteration=0)
    losses = BoxSupervision(warmup_iters=warmup_iters)(**call, iteration=iteration)
    assert losses["loss_mask_projection"].item() == full["loss_mask_projection"].item()
    expected = factor * full["loss_mask_pairwise"].item()
    assert losses["loss_mask_pairwise"].item() == pytest.approx(expected)


@pytest.mark.parametrize("num_rois", [0, 1])
def test_without_rois_without_a_mask_both_losses_are_zero_and_attached(num_rois):
    call = make_call(num_rois=num_rois)
    losses = BoxSupervision()(**call, iteration=5)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert call["logits"].grad is not None


def test_a_box_without_a_cell_has_no_pairs_and_no_gradient():
    call = make_call()
    call["rois"][0].gt_boxes.tensor[:] = torch.tensor([150.0, 150, 151, 151])
    losses = BoxSupervision(warmup_iters=0)(**call, iteration=0)
    assert [losses[f"loss_mask_{x}"].item() for x in ("projection", "pairwise")] == [2, 0]
    sum(losses.values()).backward()
    assert not call["logits"].grad.any()


def test_scikit_image_agrees():
    color = pytest.importorskip("skimage.color", reason="needs scikit-image")
    rng = np.random.default_rng(0)
    # Dark colours too, for the linear pieces, and all corners of the cube.
    corners = np.stack(np.meshgrid([0, 255], [0, 255], [0, 255]), axis=-1).reshape(-1, 3)
    rgb = np.concatenate([rng.uniform(0, 255, (500, 3)), rng.uniform(0, 25, (200, 3)), corners])
    expected = color.rgb2lab(rgb[None] / 255, illuminant="D65", observer="2")[0]
    np.testing.assert_allclose(lab_of(*rgb.tolist()), expected, atol=1e-3)
