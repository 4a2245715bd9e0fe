"""What the student learns from: ground truth, masks of other models, the teacher's pseudo masks."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch.nn import functional as F

from .mask_loss import crop_external_masks
from .pseudo_mask import PseudoMaskGenerator
from .roi_pixels import crop_pixels
from .training_rois import has_external_mask_of, has_mask_of, take
from .visualization import describe_pseudo_masks

__all__ = ["EXTERNAL_MASK_USES", "make_student_targets", "with_external_masks"]

# Of MODEL.PSEUDO_MASK.EXTERNAL.
EXTERNAL_MASK_USES = ("alone", "mean", "ignore")


@torch.no_grad()
def make_student_targets(
    gt_masks: torch.Tensor,
    rois: list[Instances],
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    generator: PseudoMaskGenerator,
    *,
    external: str = "alone",
    has_pseudo_masks: bool = True,
    pixels: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """
    Choose each ROI's target, for the loss of Eq. (6) of the paper.

    An object with a human mask has that one. Of the others, those with an external mask have, for
    ``external``

    * ``"alone"``: the external mask, cleaned like a pseudo mask;
    * ``"mean"``: a pseudo mask made from the mean of external mask and teacher, see
      :func:`with_external_masks`;
    * ``"ignore"``: what objects without any mask have, a pseudo mask of the teacher.

    Args:
        gt_masks: shape (R, M, M), of :func:`crop_gt_masks`; not changed.
        rois: one per image, R rows in all, with ``gt_has_mask``, ``proposal_boxes``, ``gt_boxes``
            and ``gt_exclusion_masks``; an image without ROIs may lack them.
        teacher_logits: shape (R, M_t, M_t).
        student_logits: shape (R, M, M), of the label channel.
        generator: makes the pseudo masks, and cleans.
        external: one of :data:`EXTERNAL_MASK_USES`.
        has_pseudo_masks: False before ``warmup_iters``: no target comes from the teacher.
        pixels: shape (N, 3, H, W), RGB in 0-255; where the generator needs images.

    Returns:
        The targets, shape (R, M, M), in [0, 1], without gradient; which ROIs have one, bool, shape
        (R,); and scalars about the targets that are no ground truth.
    """
    has_target = torch.cat([has_mask_of(x) for x in rois])
    side, targets, scalars = gt_masks.shape[-1], gt_masks, {}
    # What the CPU knows comes first: without external masks nothing waits for the device.
    if external == "alone" and any(x.has("gt_external_masks") for x in rois):
        is_external = torch.cat([has_external_mask_of(x) for x in rois])
        rows = is_external.nonzero().squeeze(1)
        if len(rows) > 0:
            chosen = [take(x, has_external_mask_of(x)) for x in rois]
            masks = crop_external_masks(chosen, side, gt_masks.device).to(gt_masks.dtype)
            targets = targets.index_copy(0, rows, generator.clean(masks, chosen))
            scalars = _describe_external_masks(targets[rows], teacher_logits[rows].sigmoid())
        has_target = has_target | is_external
    rows = (~has_target).nonzero().squeeze(1)
    if not has_pseudo_masks or len(rows) == 0:
        return targets, has_target, scalars
    is_chosen = (~has_target).split([len(x) for x in rois])
    chosen = [take(x, selected) for x, selected in zip(rois, is_chosen)]
    teacher_probs, student_probs = teacher_logits[rows].sigmoid(), student_logits[rows].sigmoid()
    base = teacher_probs
    if external == "mean":
        base = with_external_masks(teacher_probs, chosen, side)
    roi_images = None
    if generator.needs_images:
        roi_images = crop_pixels(pixels, [x.proposal_boxes for x in chosen], side)
    masks = generator(base, student_probs, chosen, roi_images)
    scalars.update(describe_pseudo_masks(masks, teacher_probs, student_probs))
    targets = targets.index_copy(0, rows, masks.to(gt_masks.dtype))
    return targets, torch.ones_like(has_target), scalars


def with_external_masks(
    teacher_probs: torch.Tensor, rois: list[Instances], mask_side_len: int
) -> torch.Tensor:
    """
    Replace the teacher's probabilities by their mean with the external mask, where there is one.

    Args:
        teacher_probs: shape (R, M_t, M_t); not changed.
        rois: one per image, R rows in all.
        mask_side_len: M, of which M_t is a multiple.

    Returns:
        ``teacher_probs`` itself where no ROI has an external mask, else their mean over the M x M
        cells: shape (R, M, M), in [0, 1].
    """
    is_external = torch.cat([has_external_mask_of(x) for x in rois])
    if not is_external.any():
        return teacher_probs
    probs = F.avg_pool2d(teacher_probs[:, None], teacher_probs.shape[-1] // mask_side_len)[:, 0]
    masks = crop_external_masks(rois, mask_side_len, probs.device).to(probs.dtype)
    return torch.where(is_external[:, None, None], (probs + masks) / 2, probs)


def _describe_external_masks(
    targets: torch.Tensor, teacher_probs: torch.Tensor
) -> dict[str, torch.Tensor]:
    # An "agreement" near 0.5 tells of masks of something else, or of a teacher that is lost.
    scale = teacher_probs.shape[-1] // targets.shape[-1]
    teacher_probs = F.avg_pool2d(teacher_probs[:, None], scale)[:, 0]
    return {
        "external_mask/fg_ratio": targets.mean(),
        "external_mask/agreement": ((teacher_probs >= 0.5) == (targets >= 0.5)).float().mean(),
        "external_mask/num_rois": targets.new_tensor(len(targets)),
    }
