"""Which ROIs train the mask heads, their targets, and the losses of those that have one."""

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch.nn import functional as F

from ..errors import InputError

__all__ = [
    "MASK_LOSSES",
    "all_channels_bce_loss",
    "at_least_float32",
    "boxes_of",
    "cells_inside_boxes",
    "check_choice",
    "check_targets",
    "classes_of",
    "crop_gt_masks",
    "crop_pixels",
    "dice_loss",
    "drop_surplus_rois_without_mask",
    "find_rois",
    "has_mask_of",
    "has_model_mask_of",
    "mask_accuracy",
    "masked_bce_loss",
    "masked_dice_loss",
    "put_scalars",
    "select_rois",
    "to_rgb",
]


def has_mask_of(rois: Instances) -> torch.Tensor:
    """bool, shape (R_i,): which ROIs of an image have an object with a human mask."""
    # An image without ROIs may lack the field.
    return rois.gt_has_mask if len(rois) > 0 else rois.gt_classes.to(torch.bool)


def has_model_mask_of(rois: Instances) -> torch.Tensor:
    """bool, shape (R_i,): which have a mask that a model made, and none of a human."""
    if len(rois) == 0 or not rois.has("gt_has_model_mask"):
        return torch.zeros_like(rois.gt_classes, dtype=torch.bool)
    return rois.gt_has_model_mask & ~rois.gt_has_mask


def check_targets(targets: list[Instances]) -> None:
    """Raise a ValueError unless the training targets say which objects have a mask."""
    if any(len(x) > 0 and not x.has("gt_has_mask") for x in targets):
        raise ValueError(
            "The training targets have no 'gt_has_mask', which says which objects have a mask: "
            "build the train loader with TeacherStudentDatasetMapper(cfg, is_train=True)."
        )


def select_rois(rois: Instances, selected: torch.Tensor) -> Instances:
    """The ROIs where ``selected``, bool of shape (R_i,), is True, in their order."""
    # By index: with a bool mask every field would wait for the device to count its True.
    return rois[selected.nonzero().squeeze(1)]


def drop_surplus_rois_without_mask(rois: Instances, limit: int) -> Instances:
    """Keep an image's ROIs with a human mask, and a random choice of ``limit`` of the others."""
    has_mask = has_mask_of(rois)
    candidates = (~has_mask).nonzero().squeeze(1)
    if len(candidates) <= limit:
        return rois
    chosen = torch.randperm(len(candidates), device=candidates.device)[:limit]
    keep = has_mask.clone()
    keep[candidates[chosen]] = True
    return select_rois(rois, keep)


def find_rois(rois: list[Instances], sampled: list[Instances]) -> torch.Tensor | None:
    """
    Where R ROIs of the mask heads stand among the sampled ones of their images, by their boxes.

    Returns int64, shape (R,), rows of the concatenated ``sampled``; of equal boxes of an image the
    first. None if a box is not there, as an object's own box may not be.
    """
    rows, offset = [rois[0].gt_classes[:0]], 0
    for x, candidates in zip(rois, sampled, strict=True):
        boxes, others = boxes_of(x).tensor, boxes_of(candidates).tensor
        is_equal = (boxes[:, None] == others[None]).all(dim=2)
        if not is_equal.any(dim=1).all():
            return None
        if len(boxes) > 0:
            # Of a bool tensor argmax is not defined everywhere.
            rows.append(is_equal.to(torch.int32).argmax(dim=1) + offset)
        offset += len(others)
    return torch.cat(rows)


def boxes_of(rois: Instances) -> Boxes:
    """``pred_boxes`` of detections, ``proposal_boxes`` of ROIs in training."""
    return rois.pred_boxes if rois.has("pred_boxes") else rois.proposal_boxes


def classes_of(instances: list[Instances]) -> torch.Tensor:
    """``pred_classes`` of detections, ``gt_classes`` of ROIs in training; int64, shape (R,)."""
    return torch.cat([x.pred_classes if x.has("pred_classes") else x.gt_classes for x in instances])


def crop_gt_masks(
    rois: list[Instances],
    mask_side_len: int,
    device: torch.device,
    has_mask: Callable[[Instances], torch.Tensor] = has_mask_of,
) -> torch.Tensor:
    """
    Crop the masks of the annotations to the ROIs; only of ROIs that have one.

    Args:
        rois: one per image, R rows in all, with ``proposal_boxes``, ``gt_masks`` and
            ``gt_has_mask``; an image without ROIs may lack the last two.
        mask_side_len: side M of the targets.
        device: of the result.
        has_mask: which ROIs of an image have one, e.g. :func:`has_model_mask_of`.

    Returns:
        float32, shape (R, M, M), in {0, 1}; zeros where ``has_mask`` is False, whatever
        ``gt_masks`` holds there.
    """
    targets = []
    for x in rois:
        targets.append(torch.zeros(len(x), mask_side_len, mask_side_len, device=device))
        selected = has_mask(x)
        annotated = select_rois(x, selected)
        if len(annotated) > 0:
            boxes = annotated.proposal_boxes.tensor
            crops = annotated.gt_masks.crop_and_resize(boxes, mask_side_len)
            targets[-1][selected] = crops.to(device=device, dtype=torch.float32)
    return torch.cat(targets)


def crop_pixels(
    images: torch.Tensor, boxes: list[Boxes], side: int, stride: int = 1
) -> torch.Tensor:
    """
    Crop images (N, 3, H, W), whose cells are ``stride`` pixels wide, with R boxes in pixels, a
    :class:`Boxes` for each image: (R, 3, side, side).
    """
    pooler = ROIPooler(side, scales=(1 / stride,), sampling_ratio=0, pooler_type="ROIAlignV2")
    return pooler([images], boxes)


def cells_inside_boxes(
    roi_boxes: torch.Tensor, boxes: torch.Tensor, mask_side_len: int
) -> torch.Tensor:
    """
    Mark the cells of each ROI's grid whose centre lies in another box; bool, shape (R, M, M).

    Args:
        roi_boxes: shape (R, 4), XYXY; M x M cells lie over each.
        boxes: shape (R, 4), XYXY, same frame; edges belong to the box.
        mask_side_len: M.
    """
    centres = (torch.arange(mask_side_len, device=roi_boxes.device) + 0.5) / mask_side_len
    xs = roi_boxes[:, 0:1] + centres * (roi_boxes[:, 2:3] - roi_boxes[:, 0:1])
    ys = roi_boxes[:, 1:2] + centres * (roi_boxes[:, 3:4] - roi_boxes[:, 1:2])
    in_columns = (xs >= boxes[:, 0:1]) & (xs <= boxes[:, 2:3])
    in_rows = (ys >= boxes[:, 1:2]) & (ys <= boxes[:, 3:4])
    return in_rows[:, :, None] & in_columns[:, None, :]


def masked_bce_loss(
    pred_mask_logits: torch.Tensor, targets: torch.Tensor, is_supervised: torch.Tensor
) -> torch.Tensor:
    """
    Mean binary cross entropy over the pixels of the supervised ROIs, Eq. (5) and (6) of the paper.

    The mean is over the ROIs of this process, as in all losses of Detectron2. Without a supervised
    ROI it is 0, but still attached to ``pred_mask_logits``: in multi-GPU training every rank must
    give every parameter a gradient.

    Args:
        pred_mask_logits: shape (R, M, M), logits.
        targets: shape (R, M, M), in [0, 1].
        is_supervised: bool, shape (R,); the other ROIs add nothing, not even to the mean's count.
    """
    if not is_supervised.any():
        return pred_mask_logits.sum() * 0
    return F.binary_cross_entropy_with_logits(
        pred_mask_logits[is_supervised], targets[is_supervised], reduction="mean"
    )


def all_channels_bce_loss(
    logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor, is_supervised: torch.Tensor
) -> torch.Tensor:
    """
    Loss of Eq. (3) of the paper as printed: the channels of all other classes should be empty.

    The sum of :func:`masked_bce_loss` over the channels of logits (R, C, M, M); by their mean the
    one of ``labels``, int64 (R,), would learn C times as slowly. ``targets`` are of that one.
    """
    is_label = F.one_hot(labels, logits.shape[1])[:, :, None, None]
    loss = masked_bce_loss(logits, is_label * targets[:, None], is_supervised)
    return loss * logits.shape[1]


def dice_loss(probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Dice loss of each row, D(a, b) = 1 - 2 sum(ab) / (sum(a^2) + sum(b^2) + 1e-5): shape (R,).

    Of probabilities and of targets in [0, 1], both of shape (R, ...); in [0, 1]. An empty target
    gives 1 without gradient.
    """
    probs, targets = probs.flatten(1), targets.to(probs.dtype).flatten(1)
    intersection = (probs * targets).sum(1)
    return 1 - 2 * intersection / (probs.square().sum(1) + targets.square().sum(1) + 1e-5)


def masked_dice_loss(
    pred_mask_logits: torch.Tensor, targets: torch.Tensor, is_supervised: torch.Tensor
) -> torch.Tensor:
    """Mean :func:`dice_loss` of the supervised ROIs, in the form of :func:`masked_bce_loss`."""
    if not is_supervised.any():
        return pred_mask_logits.sum() * 0
    probs = at_least_float32(pred_mask_logits[is_supervised]).sigmoid()
    return dice_loss(probs, targets[is_supervised]).mean()


def mask_accuracy(
    logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """
    The share of the counted cells on the right side of 0.5; NaN without such a cell.

    Of logits and targets, (R, h, w); ``counted`` is bool, of that shape or (R, 1, 1).
    """
    is_right = (logits.detach() > 0) == (targets > 0.5)
    return (is_right & counted).sum() / counted.expand_as(is_right).sum()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, in float32 if it is of half precision, for what autocast would not protect."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise InputError if ``value``, of the setting ``name``, is not ``allowed``."""
    if value not in allowed:
        raise InputError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def put_scalars(scalars: dict[str, torch.Tensor]) -> None:
    """Log scalars in the event storage; NaN means that there is nothing to log."""
    # Together, so that a GPU is waited for once.
    numbers = torch.stack([x.detach().float() for x in scalars.values()]).tolist()
    for name, number in zip(scalars, numbers):
        if not math.isnan(number):
            get_event_storage().put_scalar(name, number)


def to_rgb(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, image_format: str
) -> torch.Tensor:
    """RGB in 0-255 of normalised images, (N, 3, H, W), mean and std of shape (3, 1, 1)."""
    pixels = images * std + mean
    return pixels.flip(1) if image_format == "BGR" else pixels


# By their names in the config.
MASK_LOSSES = {"bce": masked_bce_loss, "dice": masked_dice_loss}
