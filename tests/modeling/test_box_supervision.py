"""BoxInst's losses against loops; Lab colours against published values and scikit-image."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.modeling.box_supervision import (
    BoxSupervision,
    color_similarity,
    crop_lab,
    pairwise_sums,
    projection_loss,
    rgb_to_lab,
)
from teacher_student_mask.modeling.mask_targets import cells_inside_boxes, masked_dice_loss

# Row by row, without the centre.
STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


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


@given(st.integers(0, 2**32 - 1), st.sampled_from([50.0, 1e3]))
@settings(max_examples=20, deadline=None)
def test_saturated_logits_have_finite_losses_and_gradients(seed, size):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.choice([-size, size], (2, 8, 8))).float().requires_grad_()
    valid, is_small = torch.ones(2, 8, 8).bool(), torch.zeros(2).bool()
    similarity = color_similarity(torch.zeros(2, 3, 8, 8), valid, 2, is_small)
    box_masks = torch.from_numpy(rng.random((2, 8, 8)) < 0.5)
    pairwise, count = pairwise_sums(logits, similarity, box_masks, 0.3, 2, is_small)
    pairwise = pairwise / count.clamp(min=1)
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


RED, BLUE = (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)


def two_images():
    """A red one, and one that is red in the left half and blue in the right one; 32 x 64."""
    pixels = torch.tensor(RED).reshape(1, 3, 1, 1).repeat(2, 1, 32, 64)
    pixels[1, :, :, 32:] = torch.tensor(BLUE).reshape(3, 1, 1)
    return pixels


def crop(pixels, boxes, sizes=((32, 64), (32, 64)), side=4):
    boxes = [Boxes(torch.tensor(b, dtype=torch.float32).reshape(-1, 4)) for b in boxes]
    return crop_lab(pixels, list(sizes), boxes, side)


def test_crops_are_the_colors_under_the_cells():
    # Each cell is 8 pixels wide: the second ROI has two red columns and two blue ones.
    lab, valid = crop(two_images(), [[[4, 4, 20, 20]], [[16, 0, 48, 32]]])
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
def test_cells_outside_the_part_that_counts_are_not_valid(box):
    lab, valid = crop(two_images(), [[], [box]], [(32, 64), (18.5, 50)], side=7)
    np.testing.assert_array_equal(valid[0], valid_by_hand(box, 18.5, 50, 7))
    assert lab.isfinite().all()


def make_rois(boxes, classes=None, has_mask=None, size=160):
    """ROIs a little beside their objects, in an image of ``size`` x ``size``."""
    rois = Instances((size, size), proposal_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4) + 2.0))
    rois.gt_classes = torch.arange(len(boxes)) if classes is None else torch.tensor(classes)
    if len(boxes):
        rois.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        rois.gt_has_mask = torch.tensor(has_mask or [False] * len(boxes))
    return rois


def test_rois_are_the_scaled_boxes_of_the_objects_without_a_mask_each_once():
    boxes = [[20, 30, 60, 50], [0, 0, 20, 40], [20, 30, 60, 50], [20, 30, 60, 50], [1, 1, 9, 9]]
    rois = make_rois(boxes, [0, 1, 0, 2, 1], [False] * 4 + [True])
    rois.box_features = torch.zeros(5, 2)
    wide, empty = BoxSupervision(roi_scale=1.5).rois_of([rois, make_rois([])])
    # 40 x 20 pixels become 60 x 30; the second is cut at the left and at the top.
    expected = [[10, 25, 70, 55], [0, 0, 25, 50], [10, 25, 70, 55]]
    assert wide.proposal_boxes.tensor.tolist() == expected
    assert wide.gt_boxes.tensor.tolist() == [boxes[0], boxes[1], boxes[0]]
    assert wide.gt_classes.tolist() == [0, 1, 2] and not wide.has("box_features")
    assert len(empty) == 0
    assert rois.proposal_boxes.tensor[0].tolist() == [22, 32, 62, 52] and rois.has("box_features")


def make_call(boxes=((9, 7, 109, 107), (9, 7, 109, 107)), side=8, **kwargs):
    """Of ``BoxSupervision(**kwargs)`` with the objects of an image of noise as its ROIs."""
    supervision = BoxSupervision(**{"roi_scale": 1.0, "warmup_iters": 0, **kwargs})
    generator = torch.Generator().manual_seed(0)
    # Patches of near colours, whose neighbours are often similar.
    patches = torch.rand(1, 3, 40, 40, generator=generator).mul(3).floor() * 6 + 100
    pixels = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    logits = torch.randn(len(boxes), side, side, generator=generator).requires_grad_()
    rois = supervision.rois_of([make_rois(boxes)])
    return supervision, {"logits": logits, "rois": rois, "pixels": pixels, "iteration": 0}


@pytest.mark.parametrize("size", [(100, 100), (56, 100), (55.9, 100), (100, 55.9)])
@pytest.mark.parametrize("settings_", [{}, {"color_threshold": 0.8}, {"dilation": 3}])
def test_the_two_losses_against_loops(size, settings_):
    """ROIs with a side under 56 pixels have near neighbours."""
    weights = {"projection_weight": 3.0, "pairwise_weight": 0.5}
    boxes = [[9.0, 7, 9 + size[1], 7 + size[0]], [9.0, 7, 109, 107]]
    supervision, call = make_call(boxes, **weights, **settings_)
    losses = supervision(**call)

    lab, valid = crop_lab(call["pixels"], [(150, 160)], [call["rois"][0].proposal_boxes], 8)
    logits, box_masks = call["logits"].detach().double().numpy(), np.ones((2, 8, 8), dtype=bool)
    threshold, dilation = supervision.color_threshold, supervision.dilation
    is_small = [min(size) < 56, False]
    similarity = similarity_by_hand(lab.double().numpy(), valid.numpy(), dilation, is_small)
    pairwise = pairwise_by_hand(logits, similarity, box_masks, threshold, dilation, is_small)
    assert pairwise > 0 and set(losses) == {"loss_mask_projection", "loss_mask_pairwise"}
    projection = projection_by_hand(logits, box_masks)
    assert losses["loss_mask_projection"].item() == pytest.approx(3 * projection, rel=1e-5)
    assert losses["loss_mask_pairwise"].item() == pytest.approx(pairwise / 2, rel=1e-4)


@pytest.mark.parametrize("factor, num_rows", [(None, 7), (1.0, 7), (2.0, 6), (3.0, 5)])
def test_bottom_rows_are_those_of_the_original_image(factor, num_rows):
    # 8 rows of cells, 20 pixels high each; 20 rows of the original are 20 * factor of these.
    supervision, call = make_call([[0.0, 0, 160, 160]], bottom_rows=20.0, dilation=1)
    call["pixels"] = torch.full((1, 3, 160, 160), 100.0)
    if factor:
        call["rois"][0].gt_resize_factor = torch.tensor([factor])
    valid = np.arange(8)[None, :, None].repeat(8, 2) < num_rows
    similarity = similarity_by_hand(np.zeros((1, 3, 8, 8)), valid, 1, [False])
    logits = call["logits"].detach().double().numpy()
    expected = pairwise_by_hand(logits, similarity, np.ones((1, 8, 8), bool), 0.3, 1, [False])
    assert supervision(**call)["loss_mask_pairwise"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("roi_scale, truth_wins", [(1.0, False), (1.2, True), (1.5, True)])
def test_the_full_box_loses_to_the_truth_where_the_grid_shows_its_surroundings(
    roi_scale, truth_wins
):
    """A red disk on blue; without cells around the box the full box has no loss at all."""
    y, x = torch.meshgrid(torch.arange(160), torch.arange(160), indexing="ij")
    disk = (y - 79.5) ** 2 + (x - 79.5) ** 2 < 40**2
    supervision, call = make_call([[40.0, 40, 120, 120]], roi_scale=roi_scale, side=28)
    colors = torch.where(disk, torch.tensor(RED)[:, None, None], torch.tensor(BLUE)[:, None, None])
    (rois,), call["pixels"] = call["rois"], colors[None]
    truth = BitMasks(disk[None]).crop_and_resize(rois.proposal_boxes.tensor, 28)
    box = cells_inside_boxes(rois.proposal_boxes.tensor, rois.gt_boxes.tensor, 28)
    losses = []
    for mask in truth, box:
        losses.append(sum(supervision(**{**call, "logits": mask * 20.0 - 10}).values()))
    assert (losses[0] < losses[1]) == truth_wins


@pytest.mark.parametrize(
    "warmup_iters, iteration, factor",
    [(100, 0, 0), (100, 25, 0.25), (100, 100, 1), (100, 999, 1), (0, 7, 1)],
)
def test_warm_up_is_of_the_pairwise_loss_alone(warmup_iters, iteration, factor):
    supervision, call = make_call()
    full = supervision(**call)
    call["iteration"] = iteration
    losses = BoxSupervision(roi_scale=1.0, warmup_iters=warmup_iters)(**call)
    assert losses["loss_mask_projection"].item() == full["loss_mask_projection"].item()
    expected = factor * full["loss_mask_pairwise"].item()
    assert losses["loss_mask_pairwise"].item() == pytest.approx(expected)


def test_without_rois_both_losses_are_zero_and_attached():
    supervision, call = make_call([])
    losses = supervision(**call)
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert call["logits"].grad is not None


def test_a_box_without_a_cell_has_no_pairs_and_no_gradient():
    supervision, call = make_call()
    call["rois"][0].gt_boxes.tensor[:] = torch.tensor([150.0, 150, 151, 151])
    losses = supervision(**call)
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
