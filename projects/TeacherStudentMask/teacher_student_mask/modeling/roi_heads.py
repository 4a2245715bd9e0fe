"""ROI heads that learn masks where only some objects have one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from .dense_crf import DenseCRF
from .mask_head import build_teacher_mask_head
from .mask_loss import crop_gt_masks, log_mask_accuracy, masked_bce_loss, select_label_channel
from .pseudo_mask import PseudoMaskGenerator
from .visualization import log_pseudo_masks, put_mask_images

__all__ = ["PartiallySupervisedROIHeads", "TeacherStudentROIHeads"]

# Key under which the batch's RGB pixels stand beside the feature maps.
_PIXELS = "pixels"


@ROI_HEADS_REGISTRY.register()
class PartiallySupervisedROIHeads(StandardROIHeads):
    """
    Mask R-CNN's ROI heads with one mask head that learns from the objects that have a mask.

    With ``CLS_AGNOSTIC_MASK`` the baseline of the field, with ``SEEN_CLASSES "all"`` and class-
    specific masks the oracle. RPN and box head learn from all objects. Expects the targets of
    :class:`TeacherStudentDatasetMapper`.
    """

    @configurable
    def __init__(self, *, train_on_gt_boxes: bool = False, **kwargs):
        """
        Args:
            train_on_gt_boxes: train masks on the ground-truth boxes of the sampled objects, each
                once, instead of on the foreground proposals.
            **kwargs: of :class:`StandardROIHeads`. The mask head must have a ``layers`` method
                that returns logits, as every :class:`BaseMaskRCNNHead` has.

        Raises:
            ValueError: a mask head without a pooler.
        """
        super().__init__(**kwargs)
        if self.mask_on and self.mask_pooler is None:
            raise ValueError('MODEL.ROI_MASK_HEAD.POOLER_TYPE is ""; name a pooler, "ROIAlignV2".')
        self.train_on_gt_boxes = train_on_gt_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret["train_on_gt_boxes"] = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_GT_BOXES
        return ret

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`ROIHeads`; with ``train_on_gt_boxes`` the sampled proposals also get
        ``gt_index``, int64, the row of their object in the image's targets.

        Raises:
            ValueError: the targets lack the fields of :class:`TeacherStudentDatasetMapper`.
        """
        for targets_per_image in targets:
            if self.mask_on and len(targets_per_image) > 0:
                for field in ("gt_masks", "gt_has_mask"):
                    if not targets_per_image.has(field):
                        raise ValueError(
                            f"The training targets have no {field!r}: build the train loader with "
                            "mapper=TeacherStudentDatasetMapper(cfg, is_train=True), as "
                            "train_net.py does. Detectron2's default mapper cannot say which "
                            "objects have a mask."
                        )
            if self.train_on_gt_boxes:
                targets_per_image.gt_index = torch.arange(
                    len(targets_per_image), device=targets_per_image.gt_classes.device
                )
        return super().label_and_sample_proposals(proposals, targets)

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        if not self.mask_on or not self.training:
            return super()._forward_mask(features, instances)
        instances = self._select_training_rois(instances)
        # A ROI without a mask adds nothing to the loss, so it need not be computed.
        instances = [x[_has_mask(x)] for x in instances]
        mask_features = self._pool_mask_features(features, instances)
        logits = self.mask_head.layers(mask_features)
        labels = torch.cat([x.gt_classes for x in instances])
        logits = select_label_channel(logits, labels)
        targets = crop_gt_masks(instances, logits.shape[-1], logits.device)
        everywhere = torch.ones(len(labels), dtype=torch.bool, device=logits.device)
        log_mask_accuracy("mask_head/accuracy", logits, targets, everywhere)
        loss = masked_bce_loss(logits, targets, everywhere)
        return {"loss_mask": loss * self.mask_head.loss_weight}

    def _select_training_rois(self, proposals: list[Instances]) -> list[Instances]:
        rois, _ = select_foreground_proposals(proposals, self.num_classes)
        if self.train_on_gt_boxes:
            rois = [_one_roi_per_object(x) if len(x) > 0 else x for x in rois]
        return rois

    def _pool_mask_features(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> torch.Tensor:
        boxes = [x.proposal_boxes if self.training else x.pred_boxes for x in instances]
        return self.mask_pooler([features[f] for f in self.mask_in_features], boxes)


@ROI_HEADS_REGISTRY.register()
class TeacherStudentROIHeads(PartiallySupervisedROIHeads):
    """
    A class-agnostic teacher and a class-specific student on the same ROI features.

    The teacher ``teacher_mask_head`` learns from the ROIs whose object has a mask, Eq. (5); the
    student ``mask_head`` learns from all of them, Eq. (6), with the teacher's cleaned-up output as
    target where there is no mask. Only the student runs at inference, and by its name a plain
    Mask R-CNN's weights load into it. One deviation from the paper: before ``warmup_iters`` ROIs
    without a mask give the student no loss, see ``MODEL.PSEUDO_MASK.WARMUP_ITERS``.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher_mask_head: nn.Module,
        pseudo_masks: PseudoMaskGenerator,
        warmup_iters: int = 1000,
        test_mask_head: str = "student",
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        image_format: str = "BGR",
        vis_period: int = 0,
        **kwargs,
    ):
        """
        Args:
            teacher_mask_head: class-agnostic mask head; its ``layers`` turn ROI features of shape
                (R, D, H, W) into logits (R, 1, M_t, M_t).
            pseudo_masks: makes the student's targets where there is no mask.
            warmup_iters: first iteration at which ROIs without a mask train the student.
            test_mask_head: "student", or "teacher" for analysis.
            pixel_mean, pixel_std, image_format: the model's input normalisation and channel order
                ("BGR" or "RGB"), to get the pixels back for the CRF and for pictures.
            vis_period: iterations between pictures in the event storage; 0 = none.
            **kwargs: of :class:`PartiallySupervisedROIHeads`.

        Raises:
            ValueError: an unknown test head or image format.
        """
        super().__init__(**kwargs)
        if test_mask_head not in ("student", "teacher"):
            raise ValueError(
                f"TEST.MASK_HEAD is {test_mask_head!r}; allowed: 'student', 'teacher'."
            )
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT is {image_format!r}; allowed: 'BGR', 'RGB'.")
        self.teacher_mask_head = teacher_mask_head
        self.pseudo_masks = pseudo_masks
        self.warmup_iters = warmup_iters
        self.test_mask_head = test_mask_head
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)
        self.image_format = image_format
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        settings = cfg.MODEL.PSEUDO_MASK
        ret.update(
            pseudo_masks=PseudoMaskGenerator(
                method=settings.METHOD,
                threshold=settings.THRESHOLD,
                clip_to_box=settings.CLIP_TO_BOX,
                exclude_seen=settings.EXCLUDE_SEEN,
                crf=DenseCRF.from_config(settings.CRF) if settings.METHOD == "crf" else None,
            ),
            warmup_iters=settings.WARMUP_ITERS,
            test_mask_head=cfg.TEST.MASK_HEAD,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            image_format=cfg.INPUT.FORMAT,
            vis_period=cfg.VIS_PERIOD,
        )
        return ret

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_mask_head(cfg, input_shape)
        if not ret:
            raise ValueError("TeacherStudentROIHeads needs MODEL.MASK_ON True.")
        channels = input_shape[ret["mask_in_features"][0]].channels
        side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        roi_shape = ShapeSpec(channels=channels, height=side, width=side)
        ret["teacher_mask_head"] = build_teacher_mask_head(cfg, roi_shape)
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See :meth:`StandardROIHeads.forward`."""
        if self.training and (self.pseudo_masks.needs_images or self._is_vis_iteration()):
            # The mask branch is given feature maps only; the pixels travel among them.
            features = {**features, _PIXELS: self._to_rgb(images.tensor)}
        return super().forward(images, features, proposals, targets)

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        if not self.training:
            head = self.mask_head if self.test_mask_head == "student" else self.teacher_mask_head
            mask_features = self._pool_mask_features(features, instances)
            mask_rcnn_inference(head.layers(mask_features), instances)
            return instances

        rois = self._select_training_rois(instances)
        labels = torch.cat([x.gt_classes for x in rois])
        has_mask = torch.cat([_has_mask(x) for x in rois])
        mask_features = self._pool_mask_features(features, rois)
        teacher_logits = self.teacher_mask_head.layers(mask_features)[:, 0]
        student_logits = select_label_channel(self.mask_head.layers(mask_features), labels)

        side, teacher_side = student_logits.shape[-1], teacher_logits.shape[-1]
        gt_masks = crop_gt_masks(rois, side, labels.device)
        # Rasterised again only for a teacher with a finer grid.
        teacher_targets = (
            gt_masks if teacher_side == side else crop_gt_masks(rois, teacher_side, labels.device)
        )
        loss_teacher = masked_bce_loss(teacher_logits, teacher_targets, has_mask)

        targets, is_supervised = gt_masks, has_mask
        if get_event_storage().iter >= self.warmup_iters:
            targets = self._fill_in_pseudo_masks(
                gt_masks, has_mask, features, rois, teacher_logits, student_logits
            )
            is_supervised = torch.ones_like(has_mask)
        loss_student = masked_bce_loss(student_logits, targets, is_supervised)

        log_mask_accuracy("teacher_mask/accuracy", teacher_logits, teacher_targets, has_mask)
        log_mask_accuracy("student_mask/accuracy", student_logits, gt_masks, has_mask)
        if self._is_vis_iteration():
            self._put_images(features, rois, teacher_logits, student_logits, targets)
        return {
            "loss_mask": loss_student * self.mask_head.loss_weight,
            "loss_mask_teacher": loss_teacher * self.teacher_mask_head.loss_weight,
        }

    @torch.no_grad()
    def _fill_in_pseudo_masks(
        self,
        gt_masks: torch.Tensor,
        has_mask: torch.Tensor,
        features: dict[str, torch.Tensor],
        rois: list[Instances],
        teacher_logits: torch.Tensor,
        student_logits: torch.Tensor,
    ) -> torch.Tensor:
        # The student's targets, shape (R, M, M): gt_masks, and pseudo masks in the other rows.
        if has_mask.all():
            return gt_masks
        rois = [x[~_has_mask(x)] for x in rois]
        teacher_probs = teacher_logits[~has_mask].sigmoid()
        student_probs = student_logits[~has_mask].sigmoid()
        roi_images = None
        if self.pseudo_masks.needs_images:
            roi_images = _crop_pixels(features[_PIXELS], rois, gt_masks.shape[-1])
        masks = self.pseudo_masks(teacher_probs, student_probs, rois, roi_images)
        log_pseudo_masks(masks, teacher_probs, student_probs)
        targets = gt_masks.clone()
        targets[~has_mask] = masks.to(targets.dtype)
        return targets

    def _is_vis_iteration(self) -> bool:
        return self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0

    def _put_images(self, features, rois, teacher_logits, student_logits, targets) -> None:
        unmasked = ~torch.cat([_has_mask(x) for x in rois])
        rois = [x[~_has_mask(x)] for x in rois]
        put_mask_images(
            "ROIs without a mask: image | teacher | student | target",
            _crop_pixels(features[_PIXELS], rois, 4 * targets.shape[-1]),
            [teacher_logits[unmasked].sigmoid(), student_logits[unmasked].sigmoid()]
            + [targets[unmasked]],
        )

    def _to_rgb(self, images: torch.Tensor) -> torch.Tensor:
        # (N, 3, H, W) as the model sees it -> RGB in 0-255.
        mean, std = images.new_tensor(self.pixel_mean), images.new_tensor(self.pixel_std)
        pixels = images * std[:, None, None] + mean[:, None, None]
        return pixels.flip(1) if self.image_format == "BGR" else pixels


def _has_mask(rois: Instances) -> torch.Tensor:
    # An image without objects has no gt_* field but gt_classes.
    return rois.gt_has_mask if len(rois) > 0 else rois.gt_classes.to(torch.bool)


def _one_roi_per_object(rois: Instances) -> Instances:
    index, order = rois.gt_index.sort(stable=True)
    is_first = torch.ones_like(index, dtype=torch.bool)
    is_first[1:] = index[1:] != index[:-1]
    rois = rois[order[is_first]]
    rois.proposal_boxes = Boxes(rois.gt_boxes.tensor.clone())
    return rois


def _crop_pixels(images: torch.Tensor, rois: list[Instances], side: int) -> torch.Tensor:
    # (N, 3, H, W) -> (R, 3, side, side), one crop a ROI.
    boxes = [x.proposal_boxes for x in rois]
    return ROIPooler(side, scales=(1.0,), sampling_ratio=0, pooler_type="ROIAlignV2")(
        [images], boxes
    )
