"""Losses and pseudo masks on planes: h x w cells over the whole image, one plane per location."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..box_supervision import (
    BoxSupervision,
    color_similarity,
    pairwise_sums,
    projection_loss,
    rgb_to_lab,
)
from ..pseudo_masks import PseudoMaskGenerator, describe_targets, generate_pseudo_masks
from .targets import PlaneTargets

__all__ = ["box_losses", "make_student_planes"]

# A CRF connects all pairs of cells: the longer side of what it works on.
_MAX_CRF_SIDE = 56


def box_losses(
    logits: torch.Tensor,
    objects: torch.Tensor,
    targets: PlaneTargets,
    pixels: torch.Tensor,
    stride: int,
    supervision: BoxSupervision,
    iteration: int,
) -> dict[str, torch.Tensor]:
    """
    BoxInst's "loss_mask_projection" and "loss_mask_pairwise" of objects without a mask.

    Args:
        logits: shape (R, h, w), of one location each.
        objects: int64, shape (R,), rows of ``targets``.
        targets: of the batch.
        pixels: shape (N, 3, H, W), RGB in 0-255.
        stride: side of a cell in pixels.
        supervision: thresholds and weights; its ``roi_scale`` is for ROIs.
        iteration: of the training, from 0.
    """
    projection = projection_loss(logits, targets.box_masks[objects])
    lab = rgb_to_lab(F.avg_pool2d(pixels, stride))
    similarity = color_similarity(lab, targets.valid, supervision.dilation)
    # Only pairs that begin in the box count, so its surroundings as far as a neighbour suffice.
    windows = _windows(targets.box_masks, supervision.dilation)
    total, count = logits.sum() * 0, logits.new_zeros(())
    for o in objects.unique().tolist():
        if windows[o] is None:
            continue
        y, x = windows[o]
        of_object = logits[(objects == o).nonzero()[:, 0], y, x]
        sums = pairwise_sums(
            of_object,
            similarity[targets.images[o], :, y, x][None],
            targets.box_masks[o, y, x][None],
            supervision.color_threshold,
            supervision.dilation,
        )
        # The weights are those of one plane.
        total, count = total + sums[0], count + sums[1] * len(of_object)
    return supervision.weigh(projection, total / count.clamp(min=1), iteration)


@torch.no_grad()
def make_student_planes(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    objects: torch.Tensor,
    targets: PlaneTargets,
    generator: PseudoMaskGenerator,
    *,
    external: str,
    has_pseudo_masks: bool,
    pixels: torch.Tensor,
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """
    Choose each location's target, as :func:`make_student_targets` does for ROIs.

    A pseudo mask comes from teacher and student at the same location; the CRF runs once per object,
    on the mean of the teacher over its locations.

    Args:
        teacher_logits, student_logits: shape (R, h, w).
        objects, targets, pixels, stride: see :func:`box_losses`; of objects with a mask, too.
        generator: makes the pseudo masks, and cleans.
        external, has_pseudo_masks: see :func:`make_student_targets`.

    Returns:
        The planes, shape (R, h, w), in [0, 1]; which locations have one, bool, shape (R,); and
        scalars of the same names, over the cells in the objects' boxes.
    """
    has_target, is_external = targets.has_mask[objects], targets.has_model_mask[objects]
    masks, scalars = targets.masks[objects], {}
    planes = (masks & has_target[:, None, None]).to(teacher_logits.dtype)
    if external == "alone":
        cleaned = masks & is_external[:, None, None]
        if generator.clip_to_box:
            cleaned &= targets.box_masks[objects]
        if generator.exclude_seen:
            cleaned &= ~targets.exclusion_masks[targets.images[objects]]
        planes, has_target = planes + cleaned, has_target | is_external
        rows = is_external.nonzero()[:, 0]
        if len(rows) > 0:
            own = (planes[rows], teacher_logits[rows].sigmoid(), planes[rows])
            inside = targets.box_masks[objects[rows]]
            scalars.update(describe_targets("external_mask", *own, inside))
    if not has_pseudo_masks or has_target.all():
        return planes, has_target, scalars
    settings = dict(vars(generator))
    settings.pop("exclude_seen")
    if generator.crf is not None:
        settings["crf"] = functools.partial(_crf_of_object, generator.crf)
    colours = F.avg_pool2d(pixels, stride) if generator.crf is not None else None
    teacher_probs, student_probs = teacher_logits.sigmoid(), student_logits.sigmoid()
    windows = _windows(targets.box_masks)
    for o in objects[~has_target].unique().tolist():
        if windows[o] is None:  # a box between two cells: the target is empty
            continue
        y, x = windows[o] if generator.clip_to_box else (slice(None), slice(None))
        rows = (objects == o).nonzero()[:, 0]
        base = teacher_probs[rows, y, x]
        if external == "mean" and targets.has_model_mask[o]:
            base = (base + targets.masks[o, y, x].to(base.dtype)) / 2
        image = targets.images[o]
        excluded = targets.exclusion_masks[image, y, x][None] if generator.exclude_seen else None
        planes[rows, y, x] = generate_pseudo_masks(
            base,
            student_probs[rows, y, x],
            box_masks=targets.box_masks[o, y, x][None],
            exclusion_masks=excluded,
            roi_images=None if colours is None else colours[image, :, y, x][None],
            **settings,
        )
    rows = (~has_target).nonzero()[:, 0]
    own = (planes[rows], teacher_probs[rows], student_probs[rows])
    scalars.update(describe_targets("pseudo_mask", *own, targets.box_masks[objects[rows]]))
    return planes, torch.ones_like(has_target), scalars


def _crf_of_object(
    crf: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    probs: torch.Tensor,
    colours: torch.Tensor,
) -> torch.Tensor:
    # (K, h, w) of the object's locations, (1, 3, h, w) -> (K, h, w), all equal.
    mean, size = probs.mean(0)[None], probs.shape[-2:]
    scale = min(1.0, _MAX_CRF_SIDE / max(size))
    small = [max(1, round(scale * x)) for x in size]
    resize = functools.partial(F.interpolate, size=small, mode="bilinear", antialias=True)
    refined = crf(resize(mean[None])[0], resize(colours))
    refined = F.interpolate(refined[None], size=size, mode="bilinear")[0]
    return refined.expand_as(probs)


def _windows(box_masks: torch.Tensor, margin: int = 0) -> list[tuple[slice, slice] | None]:
    """Rows and columns of each box, (G, h, w), and of ``margin`` cells around it; None: no cell."""
    ends = []
    for dim, size in ((2, box_masks.shape[1]), (1, box_masks.shape[2])):
        is_occupied = box_masks.any(dim).to(torch.int32)
        first, last = is_occupied.argmax(1), size - is_occupied.flip(1).argmax(1)
        ends += [(first - margin).clamp(min=0), (last + margin).clamp(max=size)]
    has_cells = box_masks.flatten(1).any(1).tolist()
    return [
        (slice(y0, y1), slice(x0, x1)) if has else None
        for has, (y0, y1, x0, x1) in zip(has_cells, torch.stack(ends, 1).tolist())
    ]
