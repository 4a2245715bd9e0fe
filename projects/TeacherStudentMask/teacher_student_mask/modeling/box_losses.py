"""Box supervision of the ROIs of a batch: from the config, and on a mask head's logits."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from .box_supervision import BoxSupervision
from .pseudo_mask import cells_inside_boxes
from .roi_pixels import PIXELS
from .training_rois import has_mask_of, rois_without_mask

__all__ = ["box_supervision_from", "compute_box_losses"]


def box_supervision_from(cfg: CfgNode) -> dict:
    """
    The arguments of :class:`PartiallySupervisedROIHeads` that ``MODEL.BOX_SUPERVISION`` sets.

    Raises:
        ValueError: an unknown name.
    """
    settings = cfg.MODEL.BOX_SUPERVISION
    if settings.NAME not in ("", "boxinst"):
        raise ValueError(
            f"MODEL.BOX_SUPERVISION.NAME is {settings.NAME!r}; allowed: '', 'boxinst'."
        )
    if not settings.NAME:
        return {}
    box_supervision = BoxSupervision(
        threshold=settings.COLOR_THRESHOLD,
        dilation=settings.DILATION,
        projection_weight=settings.PROJECTION_WEIGHT,
        pairwise_weight=settings.PAIRWISE_WEIGHT,
        warmup_iters=settings.WARMUP_ITERS,
        bottom_rows=settings.BOTTOM_ROWS,
    )
    return {"box_supervision": box_supervision, "mask_loss": settings.MASK_LOSS}


def compute_box_losses(
    box_supervision: BoxSupervision | None,
    logits: torch.Tensor,
    features: dict[str, torch.Tensor],
    rois: list[Instances],
    weight: float,
) -> dict[str, torch.Tensor]:
    """
    The losses of the ROIs whose object has no human mask.

    Args:
        box_supervision: None = none.
        logits: shape (R, M, M), of all ROIs.
        features: with the pixels of the batch, :data:`PIXELS`.
        rois: one per image, R rows in all.
        weight: of the mask head's losses.

    Returns:
        {name: scalar}.
    """
    if box_supervision is None:
        return {}
    has_mask = torch.cat([has_mask_of(x) for x in rois])
    rois = [rois_without_mask(x) for x in rois]
    boxes, side = [x.proposal_boxes for x in rois], logits.shape[-1]
    image_sizes = [x.image_size for x in rois]
    lab, valid = box_supervision.crop_lab(features[PIXELS], image_sizes, boxes, side)
    roi_boxes = Boxes.cat(boxes).tensor
    # An image without a ROI may lack the field.
    gt_boxes = [x.gt_boxes.tensor for x in rois if len(x) > 0]
    box_masks = cells_inside_boxes(roi_boxes, torch.cat([roi_boxes[:0], *gt_boxes]), side)
    losses = box_supervision(
        logits[~has_mask], box_masks, roi_boxes, lab, valid, get_event_storage().iter
    )
    return {name: loss * weight for name, loss in losses.items()}
