"""
Mask losses that need no mask but the object's box, and Dice where there is one.

The losses of BoxInst (Tian et al., CVPR 2021) on the M x M grids of ROIs instead of on whole
images. p is the probability of a cell, B whether its centre lies in the object's own box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F

from .lab_color import crop_lab

__all__ = [
    "BoxSupervision",
    "color_similarity",
    "dice_loss",
    "masked_dice_loss",
    "pairwise_loss",
    "projection_loss",
]

# ROIs with a shorter side have neighbours at distance 1: cells of less than 2 pixels for M = 28.
_SMALL_ROI_SIDE = 56

# (row, column) steps to the neighbours in a 3 x 3 window, row by row.
_STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def dice_loss(probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Dice loss of each row, D(a, b) = 1 - 2 sum(ab) / (sum(a^2) + sum(b^2) + 1e-5).

    Args:
        probs: shape (R, ...), probabilities.
        targets: shape (R, ...), in [0, 1].

    Returns:
        shape (R,), in [0, 1]. An empty target gives 1 without gradient, whatever ``probs``.
    """
    probs, targets = probs.flatten(1), targets.to(probs.dtype).flatten(1)
    intersection = (probs * targets).sum(1)
    return 1 - 2 * intersection / (probs.square().sum(1) + targets.square().sum(1) + 1e-5)


def masked_dice_loss(
    logits: torch.Tensor, targets: torch.Tensor, is_supervised: torch.Tensor
) -> torch.Tensor:
    """
    Mean Dice loss of the supervised ROIs, BoxInst's loss where there is a mask.

    Args:
        logits: shape (R, M, M), logits.
        targets: shape (R, M, M), in [0, 1].
        is_supervised: bool, shape (R,); the other ROIs add nothing, not even to the mean's count.

    Returns:
        A scalar; without a supervised ROI it is 0, but still attached to ``logits``.
    """
    if not is_supervised.any():
        return logits.sum() * 0
    probs = _at_least_float32(logits[is_supervised]).sigmoid()
    return dice_loss(probs, targets[is_supervised]).mean()


def projection_loss(logits: torch.Tensor, box_masks: torch.Tensor) -> torch.Tensor:
    """
    Compare the shadows of mask and box on both axes.

    L_proj = mean over ROIs of D(max_y p, max_y B) + D(max_x p, max_x B), D of :func:`dice_loss`.

    Args:
        logits: shape (R, M, M), logits.
        box_masks: bool, shape (R, M, M), the cells whose centre lies in the object's box. A box
            without a cell adds a constant.

    Returns:
        A scalar in [0, 2]; without ROIs it is 0, but still attached to ``logits``.
    """
    if len(logits) == 0:
        return logits.sum() * 0
    logits = _at_least_float32(logits)
    # The maximum of logits is that of probabilities, but does not tie where these round to 1.
    losses = [dice_loss(logits.amax(d).sigmoid(), box_masks.any(d)) for d in (1, 2)]
    return (losses[0] + losses[1]).mean()


@torch.no_grad()
def color_similarity(
    lab: torch.Tensor,
    valid: torch.Tensor,
    dilation: int = 2,
    is_small: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Compare the colour of each cell with those of its 8 neighbours.

    c_ij = exp(-||Lab_i - Lab_j||_2 / 2), and 0 where neighbour j lies outside the grid or is not
    valid.

    Args:
        lab: shape (R, 3, M, M), CIE Lab.
        valid: bool, shape (R, M, M), see :func:`crop_lab`.
        dilation: distance of the neighbours in cells along each axis.
        is_small: bool, shape (R,); in these ROIs the distance is 1. None = in no ROI.

    Returns:
        shape (R, 8, M, M), in [0, 1]; the neighbours row by row from the upper left one; without
        gradient.
    """

    def similarity(distance: int) -> torch.Tensor:
        difference = lab[:, :, None] - _neighbours(lab, distance)
        is_valid = _neighbours(valid[:, None].to(lab.dtype), distance)[:, 0]
        return torch.exp(-0.5 * difference.square().sum(1).sqrt()) * is_valid

    return _at_distances(similarity, dilation, is_small)


def pairwise_loss(
    logits: torch.Tensor,
    similarity: torch.Tensor,
    box_masks: torch.Tensor,
    threshold: float = 0.3,
    dilation: int = 2,
    is_small: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Ask neighbours of similar colour for the same label, whichever it is.

    L_pair = sum W_ij * (-log(p_i p_j + (1 - p_i)(1 - p_j))) / max(sum W_ij, 1), the sums over the
    cells i of all ROIs and their 8 neighbours j, with W_ij = [c_ij >= threshold] * B_i. As in
    BoxInst only i must lie in the box, so a pair with both ends inside counts twice.

    Args:
        logits: shape (R, M, M), logits.
        similarity: shape (R, 8, M, M), c_ij of :func:`color_similarity` for the same ``dilation``
            and ``is_small``.
        box_masks: bool, shape (R, M, M), the cells whose centre lies in the object's box.
        threshold: similarity from which on (inclusive) a pair counts; above 0, because 0 stands
            for a neighbour that does not exist.
        dilation, is_small: see :func:`color_similarity`.

    Returns:
        A scalar >= 0; without a pair, or without ROIs, it is 0, but still attached to ``logits``.
    """
    if len(logits) == 0:
        return logits.sum() * 0
    logits = _at_least_float32(logits)
    # Probabilities would round to 0 or 1 and their logarithm to infinity.
    log_probs = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)

    def disagreement(distance: int) -> torch.Tensor:
        both_in, both_out = (log_probs[:, :, None] + _neighbours(log_probs, distance)).unbind(1)
        return -torch.logaddexp(both_in, both_out)

    weights = ((similarity >= threshold) & box_masks[:, None]).to(logits.dtype)
    losses = _at_distances(disagreement, dilation, is_small)
    return (weights * losses).sum() / weights.sum().clamp(min=1)


class BoxSupervision(nn.Module):
    """
    BoxInst's two losses of ROIs whose object has a box but no mask. Has no parameters.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.3,
        dilation: int = 2,
        projection_weight: float = 1.0,
        pairwise_weight: float = 1.0,
        warmup_iters: int = 10000,
        bottom_rows: float = 10,
    ):
        """
        Args:
            threshold, dilation: see :func:`pairwise_loss`. ROIs whose short side is below 56
                pixels have neighbours at distance 1, whatever the dilation.
            projection_weight, pairwise_weight: of the two losses.
            warmup_iters: the pairwise loss grows linearly from 0 at iteration 0 to its full weight
                at this one; 0 = full weight from the start. An empty mask has no pairwise loss, so
                the projection gets a head start.
            bottom_rows: see :func:`crop_lab`.

        Raises:
            ValueError: a value outside its range.
        """
        super().__init__()
        _check("COLOR_THRESHOLD", threshold, 0 < threshold <= 1, "above 0, at most 1")
        _check("DILATION", dilation, dilation >= 1 and dilation == int(dilation), "1, 2, ...")
        _check("PROJECTION_WEIGHT", projection_weight, projection_weight >= 0, "0 or more")
        _check("PAIRWISE_WEIGHT", pairwise_weight, pairwise_weight >= 0, "0 or more")
        _check("WARMUP_ITERS", warmup_iters, warmup_iters >= 0, "0 or more")
        _check("BOTTOM_ROWS", bottom_rows, bottom_rows >= 0, "0 or more")
        self.threshold = threshold
        self.dilation = int(dilation)
        self.projection_weight = projection_weight
        self.pairwise_weight = pairwise_weight
        self.warmup_iters = warmup_iters
        self.bottom_rows = bottom_rows

    def crop_lab(
        self,
        pixels: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]],
        roi_boxes: list[Boxes],
        mask_side_len: int,
        original_heights: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`crop_lab` with this object's ``bottom_rows``."""
        return crop_lab(
            pixels, image_sizes, roi_boxes, mask_side_len, self.bottom_rows, original_heights
        )

    def forward(
        self,
        logits: torch.Tensor,
        box_masks: torch.Tensor,
        roi_boxes: torch.Tensor,
        roi_lab: torch.Tensor,
        valid: torch.Tensor,
        iteration: int,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            logits: shape (R, M, M), logits, of the ROIs without a mask.
            box_masks: bool, shape (R, M, M), the cells whose centre lies in the object's own box.
            roi_boxes: shape (R, 4), XYXY, the ROIs, in pixels of the model's input.
            roi_lab, valid: shapes (R, 3, M, M) and (R, M, M), of :meth:`crop_lab`.
            iteration: of the training, from 0.

        Returns:
            "loss_mask_projection" and "loss_mask_pairwise"; without ROIs both are 0, but still
            attached to ``logits``.
        """
        is_small = (roi_boxes[:, 2:] - roi_boxes[:, :2]).amin(1) < _SMALL_ROI_SIDE
        similarity = color_similarity(roi_lab, valid, self.dilation, is_small)
        pairwise = pairwise_loss(
            logits, similarity, box_masks, self.threshold, self.dilation, is_small
        )
        warmup = min(iteration / self.warmup_iters, 1.0) if self.warmup_iters > 0 else 1.0
        return {
            "loss_mask_projection": projection_loss(logits, box_masks) * self.projection_weight,
            "loss_mask_pairwise": pairwise * (warmup * self.pairwise_weight),
        }


def _check(key: str, value: float, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"MODEL.BOX_SUPERVISION.{key} is {value!r}; allowed: {allowed}.")


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    # Under autocast logits come in half precision, for which Dice's 1e-5 is nothing.
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _neighbours(values: torch.Tensor, distance: int) -> torch.Tensor:
    # (R, K, M, M) -> (R, K, 8, M, M), 0 outside the grid.
    height, width = values.shape[-2:]
    padded = F.pad(values, [distance] * 4)
    shifts = [(distance * (1 + dy), distance * (1 + dx)) for dy, dx in _STEPS]
    return torch.stack([padded[..., y : y + height, x : x + width] for y, x in shifts], dim=2)


def _at_distances(
    function: Callable[[int], torch.Tensor], dilation: int, is_small: torch.Tensor | None
) -> torch.Tensor:
    # function(1) in the small ROIs, function(dilation) in the others: both for all, no loop.
    values = function(dilation)
    if is_small is None or dilation == 1:
        return values
    return torch.where(is_small[:, None, None, None], function(1), values)
