"""
BoxInst's mask losses (Tian et al., CVPR 2021), on the M x M grids of ROIs, or on h x w cells over
whole images as BoxInst has them.

p is the probability of a cell, B whether its centre lies in the object's own box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from .mask_targets import (
    at_least_float32,
    cells_inside_boxes,
    crop_pixels,
    dice_loss,
    has_mask_of,
    select_rois,
)

__all__ = [
    "BoxSupervision",
    "color_similarity",
    "crop_lab",
    "pairwise_sums",
    "projection_loss",
    "rgb_to_lab",
]

# ROIs with a shorter side have neighbours at distance 1: cells of less than 2 pixels for M = 28.
_SMALL_ROI_SIDE = 56

# Linear sRGB -> CIE XYZ and the white point, for the illuminant D65 and the 2 degree observer.
_RGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)

# Side of the squares of pixels whose colours are averaged before a crop, as in BoxInst.
_STRIDE = 4


def projection_loss(logits: torch.Tensor, box_masks: torch.Tensor) -> torch.Tensor:
    """
    Compare the shadows of mask and box on both axes.

    L_proj = mean over ROIs of D(max_y p, max_y B) + D(max_x p, max_x B), D of :func:`dice_loss`, in
    [0, 2]; without ROIs it is 0, but still attached to ``logits``.

    Args:
        logits: shape (R, M, M).
        box_masks: bool, shape (R, M, M), the cells whose centre lies in the object's box.
    """
    if len(logits) == 0:
        return logits.sum() * 0
    logits = at_least_float32(logits)
    # The maximum of logits is that of probabilities, but does not tie where these round to 1.
    losses = [dice_loss(logits.amax(d).sigmoid(), box_masks.any(d)) for d in (1, 2)]
    return (losses[0] + losses[1]).mean()


@torch.no_grad()
def color_similarity(
    lab: torch.Tensor, valid: torch.Tensor, dilation: int, is_small: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Compare the colour of each cell with those of its 8 neighbours.

    c_ij = exp(-||Lab_i - Lab_j||_2 / 2), and 0 where neighbour j lies outside the grid or is not
    valid.

    Args:
        lab, valid: CIE Lab, shape (R, 3, M, M), and bool, shape (R, M, M), of :func:`crop_lab`.
        dilation: distance of the neighbours in cells along each axis.
        is_small: bool, shape (R,); in these ROIs the distance is 1. None: in none of them.

    Returns:
        shape (R, 8, M, M), in [0, 1]; the neighbours row by row from the upper left one.
    """
    difference = lab[:, :, None] - _neighbours(lab, dilation, is_small)
    is_valid = _neighbours(valid[:, None].to(lab.dtype), dilation, is_small)[:, 0]
    return torch.exp(-0.5 * difference.square().sum(1).sqrt()) * is_valid


def pairwise_sums(
    logits: torch.Tensor,
    similarity: torch.Tensor,
    box_masks: torch.Tensor,
    threshold: float,
    dilation: int,
    is_small: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ask neighbours of similar colour for the same label, whichever it is.

    L_pair = sum W_ij * (-log(p_i p_j + (1 - p_i)(1 - p_j))) / max(sum W_ij, 1), the sums over the
    cells i of all ROIs and their 8 neighbours j, with W_ij = [c_ij >= threshold] * B_i. As in
    BoxInst only i must lie in the box, so a pair with both ends inside counts twice.

    Args:
        logits, box_masks: see :func:`projection_loss`.
        similarity: shape (R, 8, M, M), of :func:`color_similarity`.
        threshold: similarity from which on (inclusive) a pair counts; above 0, because 0 stands
            for a neighbour that does not exist.
        dilation, is_small: see :func:`color_similarity`.

    Returns:
        The numerator and sum W_ij, which parts of a batch can add up.
    """
    logits = at_least_float32(logits)
    # Probabilities would round to 0 or 1 and their logarithm to infinity.
    log_probs = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], dim=1)
    others = _neighbours(log_probs, dilation, is_small)
    both_in, both_out = (log_probs[:, :, None] + others).unbind(1)
    weights = ((similarity >= threshold) & box_masks[:, None]).to(logits.dtype)
    return -(weights * torch.logaddexp(both_in, both_out)).sum(), weights.sum()


def _neighbours(values: torch.Tensor, dilation: int, is_small: torch.Tensor | None) -> torch.Tensor:
    # (R, K, M, M) -> (R, K, 8, M, M), 0 outside the grid. Both distances of all: no loop.
    at_distance = []
    for d in (dilation,) if is_small is None else (1, dilation):
        padded = F.pad(values, [d] * 4).unfold(2, values.shape[2], d).unfold(3, values.shape[3], d)
        cells = padded.flatten(2, 3)
        at_distance.append(torch.cat([cells[:, :, :4], cells[:, :, 5:]], dim=2))
    if is_small is None:
        return at_distance[0]
    return torch.where(is_small[:, None, None, None, None], *at_distance)


@torch.no_grad()
def rgb_to_lab(images: torch.Tensor) -> torch.Tensor:
    """
    Convert sRGB images, (N, 3, H, W) in 0-255, to CIE Lab, D65, as ``skimage.color.rgb2lab``.

    Returns L in [0, 100], a and b roughly in [-110, 110], in the same shape, without gradient.
    """
    # Rounding may have left 0-255.
    images = at_least_float32(images).clamp(0, 255) / 255
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    # Written out, because autocast would round a matrix product to half precision.
    channels = linear.unbind(1)
    xyz = [
        sum(weight * channel for weight, channel in zip(row, channels)) / white
        for row, white in zip(_RGB_TO_XYZ, _WHITE)
    ]
    x, y, z = (torch.where(t > 0.008856, t ** (1 / 3), 7.787 * t + 16 / 116) for t in xyz)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


@torch.no_grad()
def crop_lab(
    pixels: torch.Tensor,
    valid_sizes: Sequence[tuple[float, float]],
    roi_boxes: list[Boxes],
    mask_side_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cut the colours of each ROI's cells out of the images: averaged over 4 x 4 pixels and converted,
    as in BoxInst, then ROIAlign.

    Args:
        pixels: shape (N, 3, H, W), RGB in 0-255, padded at the right and at the bottom.
        valid_sizes: (height, width) of the part of each image, from its upper left corner, whose
            colours count: without padding and the rows at the bottom.
        roi_boxes: XYXY in the frame of ``pixels``, one :class:`Boxes` per image, R boxes in all.
        mask_side_len: M.

    Returns:
        The colours, shape (R, 3, M, M), CIE Lab, and whether they are valid, bool, shape
        (R, M, M): the cell's centre lies in the part that counts.
    """
    limits = [x.tensor.new_tensor([w, h]) for (h, w), x in zip(valid_sizes, roi_boxes)]
    limits = torch.cat([limit.expand(len(boxes), 2) for limit, boxes in zip(limits, roi_boxes)])
    corners = Boxes.cat(roi_boxes).tensor

    # Without FPN the padded size need not be a multiple of the stride.
    averaged = F.avg_pool2d(pixels, _STRIDE, ceil_mode=True)
    lab = crop_pixels(rgb_to_lab(averaged), roi_boxes, mask_side_len, _STRIDE)

    # Shape (R, 2, M): x and y of the centres of columns and rows.
    cells = (torch.arange(mask_side_len, device=corners.device) + 0.5) / mask_side_len
    centres = corners[:, :2, None] + cells * (corners[:, 2:, None] - corners[:, :2, None])
    in_columns, in_rows = ((centres >= 0) & (centres < limits[:, :, None])).unbind(1)
    return lab, in_rows[:, :, None] & in_columns[:, None, :]


@dataclass(frozen=True)
class BoxSupervision:
    """
    BoxInst's two losses of objects that have a box but no mask, on ROIs of their own.

    Attributes:
        roi_scale: at least 1. BoxInst's losses are of the whole image; on a grid that ends at the
            box no pair lies across its edge.
        warmup_iters: an empty mask has no pairwise loss; 0 = full weight from the start.
        The others: ``MODEL.BOX_SUPERVISION`` of config.py, in lower case.
    """

    roi_scale: float = 1.5
    color_threshold: float = 0.3
    dilation: int = 2
    projection_weight: float = 1.0
    pairwise_weight: float = 1.0
    warmup_iters: int = 10000
    bottom_rows: float = 10

    @classmethod
    def from_config(cls, cfg: CfgNode) -> BoxSupervision:
        """That of ``cfg.MODEL.BOX_SUPERVISION``, whose keys are the attributes."""
        names = cls.__dataclass_fields__
        return cls(**{name: cfg.MODEL.BOX_SUPERVISION[name.upper()] for name in names})

    def rois_of(
        self,
        foreground: list[Instances],
        has_mask: Callable[[Instances], torch.Tensor] = has_mask_of,
    ) -> list[Instances]:
        """
        The ROIs of the objects without a mask, each object once, at its box scaled by ``roi_scale``
        about its centre and clipped to the image.

        Args:
            foreground: one per image, with ``gt_boxes``, ``gt_classes`` and ``gt_has_mask``, which
                an image without ROIs may lack; the result has the same fields, but for
                ``box_features``, which were not those of these boxes.
            has_mask: which ROIs of an image have one, see :func:`crop_gt_masks`.
        """
        rois = []
        for x in foreground:
            x = select_rois(x, ~has_mask(x))
            if len(x) > 0:
                boxes = x.gt_boxes.tensor
                objects = torch.cat([boxes, x.gt_classes[:, None]], dim=1).tolist()
                x = x[list({tuple(key): i for i, key in enumerate(objects)}.values())]
                boxes = x.gt_boxes.tensor
                margin = (boxes[:, 2:] - boxes[:, :2]) * ((self.roi_scale - 1) / 2)
                boxes = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)
                x.proposal_boxes = Boxes(boxes)
                x.proposal_boxes.clip(x.image_size)
            if x.has("box_features"):
                x.remove("box_features")
            rois.append(x)
        return rois

    def __call__(
        self, logits: torch.Tensor, rois: list[Instances], pixels: torch.Tensor, iteration: int
    ) -> dict[str, torch.Tensor]:
        """
        "loss_mask_projection" and "loss_mask_pairwise", attached to ``logits`` in any case.

        Args:
            logits: shape (R, M, M).
            rois: of :meth:`rois_of`, R rows in all; ``gt_resize_factor``, (R_i,), is the height of
                the model's image in that of the original one, 1 where it is missing.
            pixels: shape (N, 3, H, W), RGB in 0-255, of the model's input.
            iteration: of the training, from 0.
        """
        boxes, side = [x.proposal_boxes for x in rois], logits.shape[-1]
        lab, valid = crop_lab(pixels, self.valid_sizes(rois), boxes, side)
        roi_boxes = Boxes.cat(boxes).tensor
        gt_boxes = torch.cat([roi_boxes[:0], *(x.gt_boxes.tensor for x in rois if len(x) > 0)])
        box_masks = cells_inside_boxes(roi_boxes, gt_boxes, side)
        is_small = (roi_boxes[:, 2:] - roi_boxes[:, :2]).amin(1) < _SMALL_ROI_SIDE
        similarity = color_similarity(lab, valid, self.dilation, is_small)
        total, count = pairwise_sums(
            logits, similarity, box_masks, self.color_threshold, self.dilation, is_small
        )
        projection = projection_loss(logits, box_masks)
        return self.weigh(projection, total / count.clamp(min=1), iteration)

    def valid_sizes(self, instances: list[Instances]) -> list[tuple[float, float]]:
        """(height, width) of the part of each image whose colours count, see :func:`crop_lab`."""
        sizes = []
        for x in instances:
            is_resized = len(x) > 0 and x.has("gt_resize_factor")
            factor = x.gt_resize_factor[0].item() if is_resized else 1.0
            sizes.append((x.image_size[0] - self.bottom_rows * factor, x.image_size[1]))
        return sizes

    def weigh(
        self, projection: torch.Tensor, pairwise: torch.Tensor, iteration: int
    ) -> dict[str, torch.Tensor]:
        """The two losses by their names and times their weights at an iteration, from 0."""
        warmup = min(iteration / self.warmup_iters, 1.0) if self.warmup_iters > 0 else 1.0
        return {
            "loss_mask_projection": projection * self.projection_weight,
            "loss_mask_pairwise": pairwise * (warmup * self.pairwise_weight),
        }
