"""A teacher and a student mask head: the method of the paper."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from .mask_heads import build_teacher_mask_head, has_batch_norm
from .mask_targets import (
    crop_gt_masks,
    crop_pixels,
    drop_surplus_rois_without_mask,
    has_mask_of,
    has_model_mask_of,
    mask_accuracy,
    select_label_channel,
)
from .pseudo_masks import EXTERNAL_MASK_USES, PseudoMaskGenerator, make_student_targets
from .roi_heads import (
    PartiallySupervisedROIHeads,
    check_choice,
    pooled_shape,
    put_pictures,
    put_scalars,
)

__all__ = ["TeacherStudentROIHeads"]


@ROI_HEADS_REGISTRY.register()
class TeacherStudentROIHeads(PartiallySupervisedROIHeads):
    """
    The method of the paper: a class-agnostic teacher and a class-specific student on the same ROIs.

    The teacher ``teacher_mask_head`` learns from the ROIs whose object has a mask, Eq. (5); the
    student ``mask_head`` learns from all of them, Eq. (6), with the teacher's cleaned-up output as
    target where there is no mask. Masks that another model made ("external") are the student's
    alone. Only the student runs at inference, and by its name a plain Mask R-CNN's weights load
    into it. One deviation from the paper: before ``warmup_iters`` ROIs without a mask give the
    student no loss, see ``MODEL.PSEUDO_MASK.WARMUP_ITERS``.

    A mask prior enriches what both heads see; box supervision is the teacher's.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher_mask_head: nn.Module,
        pseudo_masks: PseudoMaskGenerator,
        warmup_iters: int = 1000,
        max_rois_without_mask: int = 0,
        external_masks: str = "alone",
        test_mask_head: str = "student",
        **kwargs,
    ):
        """
        Args:
            teacher_mask_head: class-agnostic mask head; its ``layers`` turn ROI features of shape
                (R, D, H, W) into logits (R, 1, M_t, M_t).
            pseudo_masks: makes the student's targets where there is no mask.
            warmup_iters: first iteration at which the teacher's pseudo masks train the student.
            max_rois_without_mask: how many ROIs without a mask an image gives to the mask heads
                at most, chosen at random; 0 = all.
            external_masks: what masks that another model made are to the student, one of
                :data:`EXTERNAL_MASK_USES`, see :func:`make_student_targets`.
            test_mask_head: "student", or "teacher" for analysis.
            **kwargs: of :class:`PartiallySupervisedROIHeads`, but for ``train_on_external_masks``:
                no teacher learns from them.

        Raises:
            ValueError: an unknown test head or use of external masks, a negative number of ROIs, or
                ``train_on_external_masks``.
        """
        super().__init__(**kwargs)
        if self.train_on_external_masks:
            raise ValueError(
                "MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS is True, but the teacher of "
                "TeacherStudentROIHeads learns from human masks alone; set it to False, and "
                "MODEL.PSEUDO_MASK.EXTERNAL to what external masks are to the student."
            )
        check_choice("MODEL.PSEUDO_MASK.EXTERNAL", external_masks, EXTERNAL_MASK_USES)
        check_choice("TEST.MASK_HEAD", test_mask_head, ("student", "teacher"))
        if max_rois_without_mask < 0:
            raise ValueError(
                "MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE must be 0 (all) or more, got "
                f"{max_rois_without_mask}."
            )
        self.teacher_mask_head = teacher_mask_head
        self.pseudo_masks = pseudo_masks
        self.warmup_iters = warmup_iters
        self.max_rois_without_mask = max_rois_without_mask
        self.external_masks = external_masks
        self.test_mask_head = test_mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret["pseudo_masks"] = PseudoMaskGenerator.from_config(cfg)
        ret["warmup_iters"] = cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS
        ret["max_rois_without_mask"] = cfg.MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE
        ret["external_masks"] = cfg.MODEL.PSEUDO_MASK.EXTERNAL
        ret["test_mask_head"] = cfg.TEST.MASK_HEAD
        return ret

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_mask_head(cfg, input_shape)
        if not ret:
            raise ValueError("TeacherStudentROIHeads needs MODEL.MASK_ON True.")
        head_shape = pooled_shape(cfg, input_shape, ret["mask_prior"])
        ret["teacher_mask_head"] = build_teacher_mask_head(cfg, head_shape)
        return ret

    def _needs_pixels(self) -> bool:
        return super()._needs_pixels() or self.pseudo_masks.needs_images

    def _uses_rois_without_mask(self) -> bool:
        return (
            self._has_pseudo_masks()
            # Its pictures show them before they train the student, too.
            or self._is_vis_iteration()
            or has_batch_norm(self.teacher_mask_head)
            or super()._uses_rois_without_mask()
        )

    def _has_pseudo_masks(self) -> bool:
        return get_event_storage().iter >= self.warmup_iters

    def _is_supervised(self, rois: Instances) -> torch.Tensor:
        has_mask = has_mask_of(rois)
        return has_mask | has_model_mask_of(rois) if self.external_masks == "alone" else has_mask

    def _select_training_rois(self, candidates: list[Instances]) -> list[Instances]:
        rois = super()._select_training_rois(candidates)
        if self.max_rois_without_mask > 0:
            return [drop_surplus_rois_without_mask(x, self.max_rois_without_mask) for x in rois]
        return rois

    def predict_masks(self, mask_features: torch.Tensor) -> torch.Tensor:
        """As the parent's, of the head that ``test_mask_head`` names."""
        head = self.mask_head if self.test_mask_head == "student" else self.teacher_mask_head
        return head.layers(mask_features)

    def compute_mask_losses(
        self,
        features: dict[str, torch.Tensor],
        rois: list[Instances],
        sampled: list[Instances],
        pixels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """As the parent's, with "loss_mask_teacher"; "loss_mask" is the student's."""
        has_mask = torch.cat([has_mask_of(x) for x in rois])
        teacher_logits, student_logits, losses = self.compute_mask_logits(
            features, rois, has_mask, sampled
        )
        side, teacher_side = student_logits.shape[-1], teacher_logits.shape[-1]
        gt_masks = teacher_targets = crop_gt_masks(rois, side, has_mask.device)
        if teacher_side != side:
            teacher_targets = crop_gt_masks(rois, teacher_side, has_mask.device)
        targets, is_supervised, scalars = make_student_targets(
            gt_masks,
            rois,
            teacher_logits.detach(),
            student_logits.detach(),
            self.pseudo_masks,
            external=self.external_masks,
            has_pseudo_masks=self._has_pseudo_masks(),
            pixels=pixels,
        )
        loss_student = self.mask_loss(student_logits, targets, is_supervised)
        losses["loss_mask"] = loss_student * self.mask_head.loss_weight
        loss_teacher = self.mask_loss(teacher_logits, teacher_targets, has_mask)
        weight = self.teacher_mask_head.loss_weight
        losses["loss_mask_teacher"] = loss_teacher * weight
        losses.update(self._compute_box_losses(teacher_logits, rois, pixels, weight))

        scalars["teacher_mask/accuracy"] = mask_accuracy(teacher_logits, teacher_targets, has_mask)
        scalars["student_mask/accuracy"] = mask_accuracy(student_logits, gt_masks, has_mask)
        put_scalars(scalars)
        if self._is_vis_iteration():
            self._put_class_activation(features, rois, pixels)
            boxes = [x.proposal_boxes[~has_mask_of(x)] for x in rois]
            crops = crop_pixels(pixels, boxes, 4 * side)
            masks = (teacher_logits.sigmoid(), student_logits.sigmoid(), targets)
            name = "ROIs without a mask: image | teacher | student | target"
            put_pictures(name, crops, [x[~has_mask] for x in masks])
        return losses

    def compute_mask_logits(
        self,
        features: dict[str, torch.Tensor],
        rois: list[Instances],
        has_mask: torch.Tensor | None = None,
        sampled: list[Instances] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Run both heads on the same ROI features, Eq. (2) of the paper.

        Args:
            features: of the backbone.
            rois: one per image, R rows in all, with ``proposal_boxes`` and ``gt_classes``.
            has_mask: bool, shape (R,): the rows that train the teacher. The others' logits get no
                gradient where no loss could use it. None = all.
            sampled: see :meth:`compute_mask_features`.

        Returns:
            The teacher's logits, shape (R, M_t, M_t), the student's of the label channel, shape
            (R, M, M), and the losses of the mask prior.
        """
        labels = torch.cat([x.gt_classes for x in rois])
        mask_features, losses = self.compute_mask_features(features, rois, sampled)
        teacher_logits = self._compute_teacher_logits(mask_features, has_mask)
        student_logits = select_label_channel(self.mask_head.layers(mask_features), labels)
        return teacher_logits, student_logits, losses

    def _compute_teacher_logits(
        self, mask_features: torch.Tensor, has_mask: torch.Tensor | None
    ) -> torch.Tensor:
        head = self.teacher_mask_head
        # With batch statistics all ROIs belong into one batch.
        if has_mask is None or self.box_supervision is not None or has_batch_norm(head):
            return head.layers(mask_features)[:, 0]
        rows = [x.nonzero().squeeze(1) for x in (has_mask, ~has_mask)]
        # First, and attached to the head without any row, too: every rank needs gradients.
        logits = head.layers(mask_features[rows[0]])[:, 0]
        if len(rows[1]) == 0:
            return logits
        with torch.no_grad():
            others = head.layers(mask_features[rows[1]])[:, 0]
        return torch.cat([logits, others])[torch.cat(rows).argsort()]
