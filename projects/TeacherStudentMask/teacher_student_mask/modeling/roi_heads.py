"""ROI heads that learn masks where only some objects have one: a mask head, or two."""

from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import build_mask_head, mask_rcnn_inference
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from .box_supervision import BoxSupervision
from .mask_heads import (
    build_teacher_mask_head,
    has_batch_norm,
    init_predictor,
    mask_features_shape,
    predict_for_teaching,
    predict_label_channel,
    select_label_channel,
)
from .mask_targets import (
    MASK_LOSSES,
    all_channels_bce_loss,
    boxes_of,
    check_choice,
    check_targets,
    crop_gt_masks,
    crop_pixels,
    drop_surplus_rois_without_mask,
    has_mask_of,
    has_model_mask_of,
    mask_accuracy,
    put_scalars,
    select_rois,
    to_rgb,
)
from .mask_x_rcnn import WeightTransferMaskHead
from .pair import TeacherStudentPair
from .priors import ROI_MASK_PRIOR_REGISTRY, ROIContext
from .priors.contrastmask import TwoBranchBoxHead
from .priors.opmask import FeatureMapBoxHead, PooledFastRCNNOutputLayers
from .pseudo_masks import make_student_targets

__all__ = ["PartiallySupervisedROIHeads", "TeacherStudentROIHeads"]


@ROI_HEADS_REGISTRY.register()
class PartiallySupervisedROIHeads(StandardROIHeads):
    """
    Mask R-CNN's ROI heads with one mask head that learns from the objects that have a mask.

    With ``CLS_AGNOSTIC_MASK`` the baseline of the field, with ``SEEN_CLASSES "all"`` and class-
    specific masks the oracle; a mask prior and box supervision make other base methods of it. RPN
    and box head learn from all objects.
    """

    heads_at_test = ("student",)

    @configurable
    def __init__(
        self,
        *,
        train_on_gt_boxes: bool = False,
        train_on_external_masks: bool = False,
        mask_prior: nn.Module | None = None,
        repool_box_features: bool = False,
        box_supervision: BoxSupervision | None = None,
        mask_loss: str = "bce",
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        image_format: str = "BGR",
        **kwargs,
    ):
        """
        Args:
            train_on_gt_boxes, train_on_external_masks: ``MODEL.ROI_MASK_HEAD`` of config.py, in
                lower case.
            mask_prior: enriches the mask features, see ``ROI_MASK_PRIOR_REGISTRY``.
            repool_box_features: ``MODEL.ROI_MASK_PRIOR.REPOOL``.
            box_supervision: losses of ROIs whose object has no mask.
            mask_loss: of those whose object has one, "bce" or "dice".
            pixel_mean, pixel_std, image_format: how the model's input was normalised.
            **kwargs: of :class:`StandardROIHeads`, with a :class:`BaseMaskRCNNHead`.

        Raises:
            ValueError: an unknown loss, a prior that needs the box head's map of a box head that
                has none, or a :class:`WeightTransferMaskHead` with class-agnostic box regression.
        """
        super().__init__(**kwargs)
        check_choice("The mask loss", mask_loss, tuple(MASK_LOSSES))
        has_maps = isinstance(self.box_predictor, PooledFastRCNNOutputLayers)
        if mask_prior is not None and mask_prior.needs_class_maps and not has_maps:
            raise ValueError(
                f"{type(mask_prior).__name__} needs the box head's feature map: set "
                'MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead" or "TwoBranchBoxHead".'
            )
        if has_maps and self.train_on_pred_boxes:
            raise ValueError("A box head with a feature map has no TRAIN_ON_PRED_BOXES.")
        if self.mask_on and isinstance(self.mask_head, WeightTransferMaskHead):
            self.mask_head.use_box_predictor(self.box_predictor)
        self.train_on_gt_boxes = train_on_gt_boxes
        self.train_on_external_masks = train_on_external_masks
        self.mask_prior = mask_prior
        self.repool_box_features = repool_box_features
        self.box_supervision = box_supervision
        self.mask_loss = MASK_LOSSES[mask_loss]
        # As those of GeneralizedRCNN, of no state_dict.
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret.update(
            train_on_gt_boxes=cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_GT_BOXES,
            train_on_external_masks=cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS,
            repool_box_features=cfg.MODEL.ROI_MASK_PRIOR.REPOOL,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            image_format=cfg.INPUT.FORMAT,
        )
        check_choice("TEST.MASK_HEAD", cfg.TEST.MASK_HEAD, cls.heads_at_test)
        check_choice("PREDICTOR_INIT", cfg.MODEL.ROI_MASK_HEAD.PREDICTOR_INIT, ("d2", "kaiming"))
        check_choice("BOX_SUPERVISION.NAME", cfg.MODEL.BOX_SUPERVISION.NAME, ("", "boxinst"))
        if cfg.MODEL.BOX_SUPERVISION.NAME:
            ret["box_supervision"] = BoxSupervision.from_config(cfg)
            ret["mask_loss"] = cfg.MODEL.BOX_SUPERVISION.MASK_LOSS
        return ret

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_box_head(cfg, input_shape)
        if isinstance(ret["box_head"], (FeatureMapBoxHead, TwoBranchBoxHead)):
            ret["box_predictor"] = PooledFastRCNNOutputLayers(cfg, ret["box_head"].output_shape)
        return ret

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_mask_head(cfg, input_shape)
        if ret:
            shape = mask_features_shape(cfg, input_shape)
            shapes = {k: input_shape[k] for k in cfg.MODEL.ROI_HEADS.IN_FEATURES}
            name = cfg.MODEL.ROI_MASK_PRIOR.NAME
            prior = ROI_MASK_PRIOR_REGISTRY.get(name)(cfg, shape, shapes) if name else None
            ret["mask_prior"] = prior
            head_shape = mask_features_shape(cfg, input_shape, prior)
            if head_shape != shape:
                ret["mask_head"] = build_mask_head(cfg, head_shape)
            init_predictor(ret["mask_head"], cfg)
        return ret

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As in :class:`StandardROIHeads`, with targets of :class:`TeacherStudentDatasetMapper`."""
        if not self.training:
            return super().forward(images, features, proposals, targets)
        if self.mask_on:
            check_targets(targets)
        sampled = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, sampled)
        if self.mask_on:
            candidates = sampled
            if self.train_on_gt_boxes:  # an image may have more objects than are sampled
                candidates = [
                    Instances(x.image_size, proposal_boxes=x.gt_boxes, **x.get_fields())
                    for x in targets
                ]
            pixels = to_rgb(images.tensor, self.pixel_mean, self.pixel_std, self.image_format)
            losses.update(self.compute_mask_losses(features, candidates, sampled, pixels))
        losses.update(self._forward_keypoint(features, sampled))
        return sampled, losses

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]):
        """As the parent's; in training also keeps the maps of a box head that has them."""
        if not self.training or not isinstance(self.box_predictor, PooledFastRCNNOutputLayers):
            return super()._forward_box(features, proposals)
        feature_maps = [features[f] for f in self.box_in_features]
        pooled = self.box_pooler(feature_maps, [x.proposal_boxes for x in proposals])
        *predictions, maps = self.box_predictor(self.box_head(pooled))
        losses = self.box_predictor.losses(predictions, proposals)
        for x, own in zip(proposals, maps.split([len(x) for x in proposals])):
            x.box_features = own
        return losses

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        """Inference alone: in training :meth:`forward` calls :meth:`compute_mask_losses`."""
        if self.mask_on:
            mask_features, _ = self.compute_mask_features(features, instances)
            classes = torch.cat([x.pred_classes for x in instances])
            logits = self.predict_masks(mask_features, classes)
            mask_rcnn_inference(logits[:, None], instances)
        for x in instances:
            if x.has("box_features"):
                x.remove("box_features")
        return instances

    def predict_masks(self, mask_features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Logits at inference, (R, M, M), of features (R, D, S, S) and predicted classes (R,)."""
        return predict_label_channel(self._head_at_test(), mask_features, classes)

    def _head_at_test(self) -> nn.Module:
        return self.mask_head

    def compute_mask_losses(
        self,
        features: dict[str, torch.Tensor],
        candidates: list[Instances],
        sampled: list[Instances],
        pixels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        "loss_mask" and the losses of the prior and of box supervision, scalars.

        Args:
            features: of the backbone.
            candidates: those of which the foreground may train the mask heads, one per image.
            sampled: all sampled proposals, see :class:`ROIContext`.
            pixels: shape (N, 3, H, W), RGB in 0-255; for box supervision, CRF and pictures.
        """
        rois = self._select_training_rois(candidates)
        mask_features, losses = self.compute_mask_features(features, rois, sampled)
        labels = torch.cat([x.gt_classes for x in rois])
        logits = predict_label_channel(self.mask_head, mask_features, labels)
        targets = crop_gt_masks(rois, logits.shape[-1], logits.device, self._is_supervised)
        is_supervised = torch.cat([self._is_supervised(x) for x in rois])
        counted = is_supervised[:, None, None]
        put_scalars({"mask_head/accuracy": mask_accuracy(logits, targets, counted)})
        own = (self.mask_head, self._is_supervised, features, candidates, pixels)
        box_losses, share = self._compute_box_losses(*own)
        weight = self.mask_head.loss_weight * share
        losses["loss_mask"] = self.mask_loss(logits, targets, is_supervised) * weight
        return losses | box_losses

    def _compute_box_losses(
        self,
        head: nn.Module,
        is_taught: Callable[[Instances], torch.Tensor],
        features: dict[str, torch.Tensor],
        candidates: list[Instances],
        pixels: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | float]:
        # Of ROIs of its own, of objects that no mask teaches the head, and the factor of the loss
        # of the others: each ROI counts once.
        if self.box_supervision is None:
            return {}, 1.0
        foreground, _ = select_foreground_proposals(candidates, self.num_classes)
        has_mask = torch.cat([is_taught(x) for x in foreground])
        share = has_mask.sum() / max(len(has_mask), 1)
        rois = self.box_supervision.rois_of(foreground, is_taught)
        mask_features, _ = self.compute_mask_features(features, rois)
        labels = torch.cat([x.gt_classes for x in rois])
        logits = predict_label_channel(head, mask_features, labels)
        losses = self.box_supervision(logits, rois, pixels, get_event_storage().iter)
        weight = head.loss_weight * (1 - share)
        return {name: loss * weight for name, loss in losses.items()}, share

    def _is_supervised(self, rois: Instances) -> torch.Tensor:
        # Bool, shape (R_i,): which ROIs of an image have a mask to learn from that is given.
        has_mask = has_mask_of(rois)
        return has_mask | has_model_mask_of(rois) if self.train_on_external_masks else has_mask

    def _select_training_rois(self, candidates: list[Instances]) -> list[Instances]:
        # ROIs that add nothing to the loss need not be computed.
        rois, _ = select_foreground_proposals(candidates, self.num_classes)
        if self._uses_rois_without_mask():
            return rois
        return [select_rois(x, self._is_supervised(x)) for x in rois]

    def _uses_rois_without_mask(self) -> bool:
        # Batch statistics are those of all objects, as at inference.
        return has_batch_norm(self.mask_head)

    def compute_mask_features(
        self,
        features: dict[str, torch.Tensor],
        instances: list[Instances],
        sampled: list[Instances] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Pool what the mask heads see, (R, D, S, S), and enrich it with the prior; also its losses,
        in training and of ``sampled``.

        Args:
            features: of the backbone.
            instances, sampled: see :class:`ROIContext`.
        """
        feature_maps = [features[f] for f in self.mask_in_features]
        pooled = self.mask_pooler(feature_maps, [boxes_of(x) for x in instances])
        if self.mask_prior is None:
            return pooled, {}
        context = ROIContext(instances, feature_maps, sampled=sampled)
        if self.mask_prior.needs_class_maps:
            context.classifier = self.box_predictor.cls_score
            is_kept = all(x.has("box_features") for x in instances)
            if is_kept and (self.training or not self.repool_box_features):
                context.class_maps = torch.cat([x.box_features for x in instances])
            else:
                # The box head has not seen these boxes: given or refined ones, or objects' own.
                box_maps = [features[f] for f in self.box_in_features]
                box_pooled = self.box_pooler(box_maps, [boxes_of(x) for x in instances])
                *_, context.class_maps = self.box_predictor(self.box_head(box_pooled))
        return self.mask_prior(pooled, context)


@ROI_HEADS_REGISTRY.register()
class TeacherStudentROIHeads(TeacherStudentPair, PartiallySupervisedROIHeads):
    """
    The method of the paper: a class-agnostic teacher and a class-specific student on the same ROIs.

    The teacher ``teacher_mask_head`` learns from the ROIs whose object has a mask, Eq. (5); the
    student ``mask_head`` learns from all of them, Eq. (6), with the teacher's cleaned-up output as
    target where there is no mask. Masks that another model made ("external") are the student's
    alone. Only the student runs at inference; weights of a plain Mask R-CNN load into it. A mask
    prior enriches what both heads see; box supervision is the teacher's. One deviation from the
    paper: before ``warmup_iters`` ROIs without a mask give the student no loss.
    """

    student_losses = MASK_LOSSES | {"bce_all": all_channels_bce_loss}

    @configurable
    def __init__(self, *, max_rois_without_mask: int = 0, **kwargs):
        """
        Args:
            max_rois_without_mask: of an image, chosen at random; 0 = all.
            **kwargs: of :class:`TeacherStudentPair` and :class:`PartiallySupervisedROIHeads`.
        """
        super().__init__(**kwargs)
        self.max_rois_without_mask = max_rois_without_mask

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        limit = cfg.MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE
        is_agnostic = cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK
        if cfg.MODEL.PSEUDO_MASK.STUDENT_LOSS == "bce_all" and is_agnostic:
            raise ValueError("STUDENT_LOSS bce_all needs CLS_AGNOSTIC_MASK False.")
        return super().from_config(cfg, input_shape) | {"max_rois_without_mask": limit}

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super()._init_mask_head(cfg, input_shape)
        if not ret:
            raise ValueError("TeacherStudentROIHeads needs MODEL.MASK_ON True.")
        head_shape = mask_features_shape(cfg, input_shape, ret["mask_prior"])
        ret["teacher_mask_head"] = build_teacher_mask_head(cfg, head_shape)
        return ret

    def _uses_rois_without_mask(self) -> bool:
        return (
            self._has_pseudo_masks()
            # Its pictures show them before they train the student, too.
            or self._is_vis_iteration()
            or has_batch_norm(self.teacher_mask_head)
            or super()._uses_rois_without_mask()
        )

    def _select_training_rois(self, candidates: list[Instances]) -> list[Instances]:
        rois, limit = super()._select_training_rois(candidates), self.max_rois_without_mask
        return [drop_surplus_rois_without_mask(x, limit) for x in rois] if limit > 0 else rois

    def compute_mask_losses(
        self,
        features: dict[str, torch.Tensor],
        candidates: list[Instances],
        sampled: list[Instances],
        pixels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """As the parent's, with "loss_mask_teacher"; "loss_mask" is the student's."""
        rois = self._select_training_rois(candidates)
        has_mask = torch.cat([has_mask_of(x) for x in rois])
        labels = torch.cat([x.gt_classes for x in rois])
        # Both heads on the same ROI features, Eq. (2) of the paper.
        mask_features, losses = self.compute_mask_features(features, rois, sampled)
        teacher_logits = predict_for_teaching(self.teacher_mask_head, mask_features, has_mask)
        learns_all_channels = self.student_loss is all_channels_bce_loss
        if learns_all_channels:
            all_logits = self.mask_head.layers(mask_features)
            student_logits = select_label_channel(all_logits, labels)
        else:
            student_logits = predict_label_channel(self.mask_head, mask_features, labels)
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
        if learns_all_channels:
            loss_student = all_channels_bce_loss(all_logits, labels, targets, is_supervised)
        else:
            loss_student = self.student_loss(student_logits, targets, is_supervised)
        losses["loss_mask"] = loss_student * self.mask_head.loss_weight
        head = self.teacher_mask_head
        own = (head, has_mask_of, features, candidates, pixels)
        box_losses, share = self._compute_box_losses(*own)
        loss_teacher = self.mask_loss(teacher_logits, teacher_targets, has_mask)
        losses["loss_mask_teacher"] = loss_teacher * (head.loss_weight * share)
        losses.update(box_losses)

        counted = has_mask[:, None, None]
        scalars["teacher_mask/accuracy"] = mask_accuracy(teacher_logits, teacher_targets, counted)
        scalars["student_mask/accuracy"] = mask_accuracy(student_logits, gt_masks, counted)
        put_scalars(scalars)
        if self._is_vis_iteration():
            rows = (~has_mask).nonzero()[:8, 0]
            boxes = [x.proposal_boxes[~has_mask_of(x)] for x in rois]
            images = crop_pixels(pixels, boxes, 4 * side)[:8].clamp(0, 255) / 255
            masks = [x[rows] for x in (teacher_logits.sigmoid(), student_logits.sigmoid(), targets)]
            self._put_pictures("ROIs", images, masks)
        return losses
