"""What training shows of its pseudo masks: scalars and pictures in the event storage."""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch.nn import functional as F

from .priors import KeptBoxFeatures, cam_of
from .roi_pixels import crop_pixels
from .training_rois import boxes_of

__all__ = ["describe_pseudo_masks", "put_class_activation", "put_mask_images"]

_MAX_IMAGES = 8


def describe_pseudo_masks(
    pseudo_masks: torch.Tensor, teacher_probs: torch.Tensor, student_probs: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    How full the pseudo masks are and how far teacher and student agree.

    ``pseudo_mask/fg_ratio`` near 0 or 1 tells of a collapse. ``pseudo_mask/agreement`` is the share
    of cells that both heads put on the same side of 0.5.

    Args:
        pseudo_masks: shape (R, M, M), in [0, 1].
        teacher_probs: shape (R, M_t, M_t), probabilities; M_t a multiple of M.
        student_probs: shape (R, M, M), probabilities.

    Returns:
        {name of the scalar: tensor of one element}, NaN where R is 0.
    """
    scale = teacher_probs.shape[-1] // student_probs.shape[-1]
    teacher_probs = F.avg_pool2d(teacher_probs[:, None], scale)[:, 0]
    agreement = ((teacher_probs >= 0.5) == (student_probs >= 0.5)).float().mean()
    return {
        "pseudo_mask/fg_ratio": pseudo_masks.float().mean(),
        "pseudo_mask/agreement": agreement,
        "pseudo_mask/num_rois": agreement.new_tensor(len(pseudo_masks)),
    }


@torch.no_grad()
def put_class_activation(
    images: torch.Tensor, rois: list[Instances], kept: KeptBoxFeatures
) -> None:
    """
    Put ROIs with their class activation maps into the event storage, as Fig. 5 of the paper.

    Args:
        images: shape (N, 3, H, W), RGB in 0-255.
        rois: one per image, R rows in all, with boxes and classes.
        kept: of these R rows.
    """
    boxes = [boxes_of(x) for x in rois]
    pixels = crop_pixels(images, boxes, 8 * kept.maps.shape[-1])
    put_mask_images("ROIs: image | class activation", pixels, [cam_of(rois, kept)[:, 0]])


@torch.no_grad()
def put_mask_images(name: str, pixels: torch.Tensor, masks: list[torch.Tensor]) -> None:
    """
    Put strips of a ROI's pixels and masks, side by side, into the event storage (TensorBoard).

    Args:
        name: of the pictures; a running number is added. At most 8 ROIs are shown.
        pixels: shape (R, 3, S, S), RGB in 0-255.
        masks: each of shape (R, M, M), in [0, 1]; M may differ and is resized to S.
    """
    size = pixels.shape[-2:]
    for k in range(min(len(pixels), _MAX_IMAGES)):
        strip = [pixels[k].clamp(0, 255) / 255]
        strip += [
            F.interpolate(m[k][None, None].float(), size=size)[0].expand(3, -1, -1) for m in masks
        ]
        get_event_storage().put_image(f"{name} ({k})", torch.cat(strip, dim=2))
