"""Mask targets and losses of ROIs of which only some have a ground-truth mask."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch.nn import functional as F

__all__ = [
    "crop_external_masks",
    "crop_gt_masks",
    "mask_accuracy",
    "masked_bce_loss",
    "select_label_channel",
]


def select_label_channel(pred_mask_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Take from each ROI's prediction the channel of its class.

    Args:
        pred_mask_logits: shape (R, C, M, M), or (R, 1, M, M) if class-agnostic; logits.
        labels: shape (R,), int64, the class of each ROI in [0, C).

    Returns:
        shape (R, M, M), logits; the gradient flows to the selected channels only.
    """
    if pred_mask_logits.shape[1] == 1:
        return pred_mask_logits[:, 0]
    # 0, 1, 2, ...: in a traced graph, unlike arange, of as many ROIs as there are then.
    rows = torch.ones_like(labels).cumsum(0) - 1
    return pred_mask_logits[rows, labels]


def crop_gt_masks(
    instances: list[Instances], mask_side_len: int, device: torch.device
) -> torch.Tensor:
    """
    Crop the ground-truth masks to the ROIs; only of ROIs that have one.

    Args:
        instances: one per image, with ``proposal_boxes``, ``gt_masks`` and ``gt_has_mask``; an
            image without ROIs may lack the last two.
        mask_side_len: side M of the targets.
        device: of the result.

    Returns:
        float32, shape (R, M, M), in {0, 1}; zeros where ``gt_has_mask`` is False, whatever
        ``gt_masks`` holds there.
    """
    targets = []
    for instances_per_image in instances:
        target = torch.zeros(len(instances_per_image), mask_side_len, mask_side_len, device=device)
        if len(instances_per_image) > 0:
            has_mask = instances_per_image.gt_has_mask
            # By index: with a bool mask every field would wait for the device to count its True.
            annotated = instances_per_image[has_mask.nonzero().squeeze(1)]
            if len(annotated) > 0:
                crops = annotated.gt_masks.crop_and_resize(
                    annotated.proposal_boxes.tensor, mask_side_len
                )
                target[has_mask] = crops.to(device=device, dtype=target.dtype)
        targets.append(target)
    return torch.cat(targets)


def crop_external_masks(
    instances: list[Instances], mask_side_len: int, device: torch.device
) -> torch.Tensor:
    """
    Crop the masks that another model made to the ROIs; only of ROIs that have one.

    Args:
        instances: one per image, with ``proposal_boxes``, and ``gt_external_masks`` where there is
            one.
        mask_side_len: side M of the targets.
        device: of the result.

    Returns:
        bool, shape (R, M, M); False where there is no external mask.
    """
    targets = []
    for x in instances:
        if len(x) > 0 and x.has("gt_external_masks"):
            boxes = x.proposal_boxes.tensor
            targets.append(x.gt_external_masks.crop_and_resize(boxes, mask_side_len).to(device))
        else:
            shape = (len(x), mask_side_len, mask_side_len)
            targets.append(torch.zeros(shape, dtype=torch.bool, device=device))
    return torch.cat(targets)


def masked_bce_loss(
    pred_mask_logits: torch.Tensor, targets: torch.Tensor, is_supervised: torch.Tensor
) -> torch.Tensor:
    """
    Mean binary cross entropy over the pixels of the supervised ROIs, Eq. (5) and (6) of the paper.

    The mean is over the ROIs of this process, as in all losses of Detectron2. In training with W
    processes DistributedDataParallel averages their gradients, so each of the n_r supervised ROIs
    of process r weighs 1 / (W * n_r): as in one process with all images where all n_r are equal,
    else not, and a process without one still counts in W.

    Args:
        pred_mask_logits: shape (R, M, M), logits.
        targets: shape (R, M, M), in [0, 1].
        is_supervised: bool, shape (R,); the other ROIs add nothing, not even to the mean's count.

    Returns:
        A scalar. Without a supervised ROI it is 0, but still attached to ``pred_mask_logits``:
        in multi-GPU training every rank must give every parameter a gradient.
    """
    if not is_supervised.any():
        return pred_mask_logits.sum() * 0
    return F.binary_cross_entropy_with_logits(
        pred_mask_logits[is_supervised], targets[is_supervised], reduction="mean"
    )


def mask_accuracy(
    pred_mask_logits: torch.Tensor, targets: torch.Tensor, selected: torch.Tensor
) -> torch.Tensor:
    """
    The share of the selected ROIs' pixels that are on the right side of 0.5.

    Args:
        pred_mask_logits: shape (R, M, M), logits.
        targets: shape (R, M, M), in [0, 1].
        selected: bool, shape (R,).

    Returns:
        A scalar without gradient, NaN without a selected ROI.
    """
    is_right = (pred_mask_logits.detach() > 0) == (targets > 0.5)
    num_right = (is_right.flatten(1).sum(1) * selected).sum()
    return num_right / (selected.sum() * is_right[:1].numel())
