"""Which ROIs the mask heads are trained on, and which of these have a mask."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

__all__ = [
    "boxes_of",
    "drop_surplus_rois_without_mask",
    "has_external_mask_of",
    "has_mask_of",
    "one_roi_per_object",
    "rois_with_mask",
    "rois_without_mask",
    "take",
]


def has_mask_of(rois: Instances) -> torch.Tensor:
    """
    Which ROIs have an object with a human mask.

    Args:
        rois: of one image, with ``gt_has_mask``; an image without ROIs may lack it.

    Returns:
        bool, shape (R_i,).
    """
    return rois.gt_has_mask if len(rois) > 0 else rois.gt_classes.to(torch.bool)


def has_external_mask_of(rois: Instances) -> torch.Tensor:
    """
    Which ROIs have an object with a mask that another model made, and none of a human.

    Args:
        rois: of one image, with ``gt_classes``; without ``gt_external_masks`` there is none.

    Returns:
        bool, shape (R_i,).
    """
    if len(rois) == 0 or not rois.has("gt_external_masks"):
        return torch.zeros_like(rois.gt_classes, dtype=torch.bool)
    return rois.gt_has_external_mask & ~rois.gt_has_mask


def rois_with_mask(rois: Instances) -> Instances:
    """The ROIs of :func:`has_mask_of`, in their order."""
    return take(rois, has_mask_of(rois))


def rois_without_mask(rois: Instances) -> Instances:
    """The other ROIs, in their order."""
    return take(rois, ~has_mask_of(rois))


def drop_surplus_rois_without_mask(rois: Instances, limit: int) -> Instances:
    """
    Keep all ROIs with a mask, and of the others a random choice.

    Args:
        rois: of one image.
        limit: how many ROIs without a mask to keep at most, > 0.

    Returns:
        The kept ROIs, in their order.
    """
    has_mask = has_mask_of(rois)
    candidates = (~has_mask).nonzero().squeeze(1)
    if len(candidates) <= limit:
        return rois
    chosen = torch.randperm(len(candidates), device=candidates.device)[:limit]
    keep = has_mask.clone()
    keep[candidates[chosen]] = True
    return take(rois, keep)


def one_roi_per_object(rois: Instances) -> Instances:
    """
    Replace the proposals of an image by the boxes of their objects, each object once.

    Args:
        rois: with ``gt_boxes`` and ``gt_index``, the row of the object in the image's targets.

    Returns:
        ROIs by ascending ``gt_index``; without ``box_features``, which belong to the proposals.
    """
    index, order = rois.gt_index.sort(stable=True)
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = index[1:] != index[:-1]
    rois = rois[order[is_first]]
    rois.proposal_boxes = Boxes(rois.gt_boxes.tensor.clone())
    if rois.has("box_features"):
        rois.remove("box_features")
    return rois


def boxes_of(instances: Instances) -> Boxes:
    """``pred_boxes`` of detections, ``proposal_boxes`` of ROIs in training."""
    name = "pred_boxes" if instances.has("pred_boxes") else "proposal_boxes"
    return instances.get(name)


def take(rois: Instances, selected: torch.Tensor) -> Instances:
    """The ROIs where ``selected``, bool of shape (R_i,), is True, in their order."""
    # By index: with a bool mask every field would wait for the device to count its True.
    return rois[selected.nonzero().squeeze(1)]
