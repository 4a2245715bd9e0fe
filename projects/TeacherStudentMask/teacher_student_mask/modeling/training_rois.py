"""Which ROIs the mask heads are trained on, and which of these have a mask."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances

__all__ = [
    "OBJECT_ROIS",
    "boxes_of",
    "drop_surplus_rois_without_mask",
    "has_external_mask_of",
    "has_mask_of",
    "rois_of_objects",
    "rois_with_mask",
    "rois_without_mask",
    "rows_in_sampled",
    "take",
]

# Key under which the batch's objects stand as ROIs, one Instances per image, beside the feature
# maps: the mask branch is given feature maps and sampled proposals only, and of an image with many
# objects not all are sampled.
OBJECT_ROIS = "object_rois"


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


def rois_of_objects(targets: Instances) -> Instances:
    """
    All objects of an image as ROIs, each once and at its own box, whatever was sampled.

    Args:
        targets: with ``gt_boxes`` and the other ``gt_*`` fields; not changed; may be empty.

    Returns:
        ROIs in the order of the targets, with all their ``gt_*`` fields, and as ``proposal_boxes``
        a copy of ``gt_boxes``.
    """
    rois = Instances(targets.image_size)
    rois.proposal_boxes = Boxes(targets.gt_boxes.tensor.clone())
    for name, value in targets.get_fields().items():
        if name.startswith("gt_"):
            rois.set(name, value)
    return rois


def rows_in_sampled(instances: list[Instances], sampled: list[Instances]) -> torch.Tensor | None:
    """
    Where the ROIs of the mask heads stand among sampled ones, found by their boxes.

    Args:
        instances: one per image, R rows in all, with ``proposal_boxes``.
        sampled: one per image, in the same order.

    Returns:
        int64, shape (R,), rows of the concatenated ``sampled``; of equal boxes of an image the
        first. None if a box is not there, as an object's own box may not be.
    """
    rows, offset = [], 0
    for rois, candidates in zip(instances, sampled, strict=True):
        boxes, others = boxes_of(rois).tensor, boxes_of(candidates).tensor
        if len(boxes) > 0:
            is_equal = (boxes[:, None] == others[None]).all(dim=2)
            if not is_equal.any(dim=1).all():
                return None
            # Of a bool tensor argmax is not defined everywhere.
            rows.append(is_equal.to(torch.int32).argmax(dim=1) + offset)
        offset += len(others)
    if not rows:
        return torch.zeros(0, dtype=torch.int64, device=instances[0].gt_classes.device)
    return torch.cat(rows)


def boxes_of(instances: Instances) -> Boxes:
    """``pred_boxes`` of detections, ``proposal_boxes`` of ROIs in training."""
    name = "pred_boxes" if instances.has("pred_boxes") else "proposal_boxes"
    return instances.get(name)


def take(rois: Instances, selected: torch.Tensor) -> Instances:
    """The ROIs where ``selected``, bool of shape (R_i,), is True, in their order."""
    # By index: with a bool mask every field would wait for the device to count its True.
    return rois[selected.nonzero().squeeze(1)]
