"""From the teacher's output on objects without a mask to the student's targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from .crf import DenseCRF
from .mask_targets import (
    cells_inside_boxes,
    check_choice,
    crop_gt_masks,
    crop_pixels,
    has_mask_of,
    has_model_mask_of,
    select_rois,
)

__all__ = [
    "EXTERNAL_MASK_USES",
    "INTERACT_BALANCES",
    "PSEUDO_MASK_METHODS",
    "PseudoMaskGenerator",
    "balance_foreground",
    "describe_targets",
    "fit_to_boxes",
    "generate_pseudo_masks",
    "make_student_targets",
]

PSEUDO_MASK_METHODS = ("none", "threshold", "interact", "crf", "box_fit", "self")
# Of MODEL.PSEUDO_MASK.INTERACT_BALANCE.
INTERACT_BALANCES = ("none", "share")

# Of MODEL.PSEUDO_MASK.EXTERNAL.
EXTERNAL_MASK_USES = ("alone", "mean", "ignore")


@torch.no_grad()
def generate_pseudo_masks(
    teacher_probs: torch.Tensor,
    student_probs: torch.Tensor,
    *,
    method: str = "interact",
    threshold: float = 0.5,
    balance: str = "none",
    roi_boxes: torch.Tensor | None = None,
    gt_boxes: torch.Tensor | None = None,
    box_masks: torch.Tensor | None = None,
    clip_to_box: bool = True,
    exclusion_masks: torch.Tensor | None = None,
    crf: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    roi_images: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Post-process the teacher's masks into targets for the student: sigma of Eq. (4), then cleaning.

    The methods, with p_t and p_s the probabilities of teacher and student:

    * ``"none"``: p_t as it is, a soft target.
    * ``"threshold"``: p_t >= threshold.
    * ``"interact"``: (p_t + p_s) / 2 >= threshold; the paper's choice. With ``balance`` "share"
      p_s is first shifted as :func:`balance_foreground` says, which is ours.
    * ``"crf"``: CRF(p_t) >= threshold.
    * ``"box_fit"``: per ROI the threshold whose mask fills the object's box best, see
      :func:`fit_to_boxes`; not in the paper.
    * ``"self"``: p_s >= threshold, without a teacher: of a class-agnostic student the right-hand
      model of Fig. 3 of the paper.

    Cleaning (Sec. 5.1 of the paper, whatever the method): cells whose centre lies outside the
    object's own box are background, and so are cells inside annotated masks of other objects.

    Args:
        teacher_probs: shape (R, M_t, M_t), probabilities; M_t is a multiple of M (56 for 28), and
            is averaged down to M.
        student_probs: shape (R, M, M), probabilities of the label channel. Any grid will do, such
            as (R, h, w) of the whole image, if both have it.
        method: one of :data:`PSEUDO_MASK_METHODS`.
        threshold: probability from which on (inclusive) a cell is foreground.
        balance: one of :data:`INTERACT_BALANCES`.
        roi_boxes, gt_boxes: shape (R, 4), XYXY, of one frame; the ROIs, over which the M x M grid
            lies, and the matched objects. Needed by ``"box_fit"`` and for ``clip_to_box``.
        box_masks: bool, shape (R, M, M), instead of these two: the cells in the object's box.
        clip_to_box: if there are boxes, cells outside the object's become background.
        exclusion_masks: bool, shape (R, M, M); if given, these cells become background.
        crf: called with (R, M, M) probabilities and ``roi_images``; needed by ``"crf"``.
        roi_images: shape (R, 3, M, M), RGB in 0-255; needed by ``"crf"``.

    Returns:
        shape (R, M, M), in {0, 1}, or in [0, 1] for ``"none"``; without gradient.

    Raises:
        ValueError: an unknown method, or M_t is not a multiple of M.
    """
    check_choice("The pseudo-mask method", method, PSEUDO_MASK_METHODS)
    side, inside = student_probs.shape[-1], box_masks
    probs = _average_down(teacher_probs, side)
    if roi_boxes is not None and gt_boxes is not None:
        inside = cells_inside_boxes(roi_boxes, gt_boxes, side)
    if method == "none":
        masks = probs
    elif method == "threshold":
        masks = probs >= threshold
    elif method == "interact":
        if balance == "share":
            student_probs = balance_foreground(student_probs, probs)
        masks = (probs + student_probs) / 2 >= threshold
    elif method == "crf":
        masks = crf(probs, roi_images) >= threshold
    elif method == "self":
        masks = student_probs >= threshold
    else:
        masks = fit_to_boxes(probs, inside)
    masks = masks.to(teacher_probs.dtype)
    if inside is not None and clip_to_box:
        masks = masks * inside
    if exclusion_masks is not None:
        masks = masks * ~exclusion_masks
    return masks


def balance_foreground(probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """
    Shift the logits of each mask by a constant, so that it has as much foreground as another.

    With k the number of cells of ``others`` at or above 0.5, the constant lies half-way between the
    k-th and the next highest logit: the k most probable cells end above 0.5.

    Args:
        probs, others: shape (R, M, M), probabilities.

    Returns:
        The shifted probabilities, shape (R, M, M).
    """
    logits = probs.flatten(1).logit(eps=1e-6)
    # One more at each end: no foreground, and nothing else.
    ordered = F.pad(logits.sort(dim=1, descending=True).values, (1, 1))
    ordered[:, 0], ordered[:, -1] = ordered[:, 1] + 1, ordered[:, -2] - 1
    k = (others >= 0.5).flatten(1).sum(dim=1, keepdim=True)
    border = (ordered.gather(1, k) + ordered.gather(1, k + 1)) / 2
    return (logits - border).sigmoid().view_as(probs)


def fit_to_boxes(probs: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """
    Binarise each mask at the threshold whose mask spans the object's box best ("box_fit").

    A good mask touches all four sides of its box. For t = 0.05, 0.10 .. 0.95 the extent (first to
    last occupied row and column) of {p >= t} inside the box is compared with the box; the t of the
    highest IoU wins, ties go to the higher t. If no t leaves a cell, the whole box is the mask.

    Args:
        probs: shape (R, M, M), probabilities.
        inside: bool, shape (R, M, M), the cells inside each ROI's matched box: a rectangle.

    Returns:
        bool, shape (R, M, M), a subset of ``inside``.
    """
    thresholds = probs.new_tensor([round(0.05 * k, 2) for k in range(20)])
    # Shape (T, R, M, M).
    candidates = (probs[None] >= thresholds[:, None, None, None]) & inside[None]
    # Inside the box, IoU with it is the covered share; t = 0 covers all, but is the last resort.
    area = torch.ones_like(candidates[:, :, 0, 0], dtype=torch.float32)
    for dim in (2, 3):
        is_occupied = candidates.any(dim=dim).float()
        # First and last True, counted from both ends; nothing is as long as it is: 0.
        ends = is_occupied.argmax(dim=-1) + is_occupied.flip(-1).argmax(dim=-1)
        area *= torch.where(is_occupied.any(dim=-1), is_occupied.shape[-1] - ends, 0)
    area[0] = area[0].clamp(max=0.5)
    # Of equal maxima the last one, the highest threshold: look for it in reversed order.
    best = len(thresholds) - 1 - area.flip(0).argmax(dim=0)
    return candidates[best, torch.arange(len(probs), device=probs.device)]


@dataclass(frozen=True)
class PseudoMaskGenerator:
    """
    :func:`generate_pseudo_masks` with its settings, for the ROIs of a batch.

    Attributes:
        method, threshold, balance, clip_to_box, crf: see :func:`generate_pseudo_masks`.
        exclude_seen: cells inside the image's ``gt_exclusion_masks`` become background.
    """

    method: str = "interact"
    threshold: float = 0.5
    balance: str = "none"
    clip_to_box: bool = True
    exclude_seen: bool = True
    crf: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("MODEL.PSEUDO_MASK.METHOD", self.method, PSEUDO_MASK_METHODS)
        check_choice("MODEL.PSEUDO_MASK.INTERACT_BALANCE", self.balance, INTERACT_BALANCES)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PseudoMaskGenerator:
        """The generator of ``cfg.MODEL.PSEUDO_MASK``."""
        settings = cfg.MODEL.PSEUDO_MASK
        return cls(
            method=settings.METHOD,
            threshold=settings.THRESHOLD,
            balance=settings.INTERACT_BALANCE,
            clip_to_box=settings.CLIP_TO_BOX,
            exclude_seen=settings.EXCLUDE_SEEN,
            crf=DenseCRF.from_config(settings.CRF) if settings.METHOD == "crf" else None,
        )

    def __call__(
        self,
        teacher_probs: torch.Tensor,
        student_probs: torch.Tensor,
        rois: list[Instances],
        roi_images: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            teacher_probs, student_probs: see :func:`generate_pseudo_masks`.
            roi_images: likewise; where there is a ``crf``.
            rois: one per image, R rows in all, with ``proposal_boxes``, ``gt_boxes`` and
                ``gt_exclusion_masks``; an image without ROIs may lack the last two.
        """
        rois = [x for x in rois if len(x) > 0]
        if not rois:
            return student_probs
        settings, side = dict(vars(self)), student_probs.shape[-1]
        if settings.pop("exclude_seen"):
            settings["exclusion_masks"] = torch.cat(
                [x.gt_exclusion_masks.crop_and_resize(x.proposal_boxes.tensor, side) for x in rois]
            )
        return generate_pseudo_masks(
            teacher_probs,
            student_probs,
            roi_boxes=Boxes.cat([x.proposal_boxes for x in rois]).tensor,
            gt_boxes=Boxes.cat([x.gt_boxes for x in rois]).tensor,
            roi_images=roi_images,
            **settings,
        )


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

    An object with a human mask has that one, an object without any mask a pseudo mask of the
    teacher, one with a mask of another model what ``external`` says.

    Args:
        gt_masks: shape (R, M, M), of :func:`crop_gt_masks`.
        rois: one per image, R rows in all, with ``gt_has_mask``, ``proposal_boxes``, ``gt_boxes``
            and ``gt_exclusion_masks``; an image without ROIs may lack them.
        teacher_logits: shape (R, M_t, M_t).
        student_logits: shape (R, M, M), of the label channel.
        generator: makes the pseudo masks, and cleans.
        external: ``MODEL.PSEUDO_MASK.EXTERNAL`` of config.py.
        has_pseudo_masks: False before ``warmup_iters``: no target comes from the teacher.
        pixels: shape (N, 3, H, W), RGB in 0-255; where the generator has a CRF.

    Returns:
        The targets, shape (R, M, M), in [0, 1], without gradient; which ROIs have one, bool, shape
        (R,); and :func:`describe_targets` of external masks, beside the teacher, and of pseudo
        masks, by both heads and by class. ``pseudo_mask/fg_ratio`` near 0 or 1 is a collapse.
    """
    has_target = torch.cat([has_mask_of(x) for x in rois])
    is_external = torch.cat([has_model_mask_of(x) for x in rois])
    side, targets, scalars = gt_masks.shape[-1], gt_masks, {}
    teacher_probs = _average_down(teacher_logits.sigmoid(), side)
    if external == "alone" and is_external.any():
        rows = is_external.nonzero().squeeze(1)
        chosen = [select_rois(x, has_model_mask_of(x)) for x in rois]
        masks = crop_gt_masks(chosen, side, gt_masks.device, has_model_mask_of)
        masks = replace(generator, method="none")(masks, masks, chosen)
        targets = targets.index_copy(0, rows, masks)
        scalars.update(describe_targets("external_mask", masks, teacher_probs[rows], masks))
        has_target = has_target | is_external
    rows = (~has_target).nonzero().squeeze(1)
    if not has_pseudo_masks or len(rows) == 0:
        return targets, has_target, scalars
    is_chosen = (~has_target).split([len(x) for x in rois])
    chosen = [select_rois(x, selected) for x, selected in zip(rois, is_chosen)]
    base, student_probs = teacher_probs[rows], student_logits[rows].sigmoid()
    if external == "mean":
        masks = crop_gt_masks(chosen, side, gt_masks.device, has_model_mask_of)
        mixed = (base + masks.to(base.dtype)) / 2
        base = torch.where(is_external[rows, None, None], mixed, base)
    roi_images = None
    if generator.crf is not None:
        roi_images = crop_pixels(pixels, [x.proposal_boxes for x in chosen], side)
    masks = generator(base, student_probs, chosen, roi_images)
    own = (masks, teacher_probs[rows], student_probs)
    scalars.update(describe_targets("pseudo_mask", *own))
    targets = targets.index_copy(0, rows, masks.to(gt_masks.dtype))
    return targets, torch.ones_like(has_target), scalars


@torch.no_grad()
def describe_targets(
    name: str,
    targets: torch.Tensor,
    probs: torch.Tensor,
    others: torch.Tensor,
    inside: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    Scalars about targets that are not ground truth, as means over R > 0 of them.

    Args:
        name: the scalars begin with it and a slash.
        targets: shape (R, h, w), in [0, 1]; "fg_ratio" is their mean.
        probs, others: shape (R, h, w), in [0, 1]; "agreement" is the share of the cells on the same
            side of 0.5.
        inside: bool, shape (R, h, w), the cells that count; None: all.
    """
    if inside is None:
        inside = torch.ones_like(targets, dtype=torch.bool)
    size = inside.sum((1, 2)).clamp(min=1)
    ratios = (targets * inside).sum((1, 2)) / size
    is_same = ((probs >= 0.5) == (others >= 0.5)) & inside
    return {
        f"{name}/fg_ratio": ratios.mean(),
        f"{name}/agreement": (is_same.sum((1, 2)) / size).mean(),
        f"{name}/num_rois": ratios.new_tensor(len(targets)),
    }


def _average_down(probs: torch.Tensor, side: int) -> torch.Tensor:
    # (R, M_t, M_t) -> (R, M, M), the mean over the cells of the finer grid.
    if probs.shape[-1] % side:
        raise ValueError(f"Masks of {probs.shape[-1]} cells (teacher) are not a multiple of {side}")
    return F.avg_pool2d(probs[:, None], probs.shape[-1] // side)[:, 0]
