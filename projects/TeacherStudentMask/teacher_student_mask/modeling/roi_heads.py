"""ROI heads that learn masks where only some objects have one."""

from __future__ import annotations

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

from .box_losses import box_supervision_from, compute_box_losses
from .box_supervision import BoxSupervision, masked_dice_loss
from .deferred_scalars import DeferredScalars
from .feature_map_box_head import (
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    TwoBranchBoxHead,
)
from .label_channel import predict_label_channel
from .mask_head import has_batch_norm
from .mask_loss import crop_external_masks, crop_gt_masks, mask_accuracy, masked_bce_loss
from .priors import KeptBoxFeatures, ROIContext, build_mask_prior, shape_with_prior
from .roi_pixels import PIXELS, InputPixels
from .training_rois import (
    OBJECT_ROIS,
    boxes_of,
    has_external_mask_of,
    has_mask_of,
    rois_of_objects,
    take,
)
from .visualization import put_class_activation
from .weight_transfer_mask_head import WeightTransferMaskHead

__all__ = ["PartiallySupervisedROIHeads"]

_MASK_LOSSES = {"bce": masked_bce_loss, "dice": masked_dice_loss}


@ROI_HEADS_REGISTRY.register()
class PartiallySupervisedROIHeads(StandardROIHeads):
    """
    Mask R-CNN's ROI heads with one mask head that learns from the objects that have a mask.

    With ``CLS_AGNOSTIC_MASK`` the baseline of the field, with ``SEEN_CLASSES "all"`` and class-
    specific masks the oracle. RPN and box head learn from all objects. Expects the targets of
    :class:`TeacherStudentDatasetMapper`. A mask prior and box supervision make other base methods
    of it; without them nothing of theirs runs.
    """

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
        pixels: InputPixels | None = None,
        vis_period: int = 0,
        **kwargs,
    ):
        """
        Args:
            train_on_gt_boxes: train masks on the ground-truth boxes of all objects of an image,
                each once, instead of on the foreground proposals.
            train_on_external_masks: take masks that another model made as ground truth, too.
            mask_prior: enriches the mask features, see ``ROI_MASK_PRIOR_REGISTRY``.
            repool_box_features: at inference, compute the box head's maps for the prior at the
                detected boxes instead of keeping those of the proposals.
            box_supervision: losses of ROIs whose object has no mask.
            mask_loss: of those whose object has one, "bce" or "dice".
            pixels: how to get the pixels back from the input; None = the input is BGR in 0-255.
            vis_period: iterations between pictures in the event storage; 0 = none.
            **kwargs: of :class:`StandardROIHeads`. The mask head must have a ``layers`` method
                that returns logits, as every :class:`BaseMaskRCNNHead` has.

        Raises:
            ValueError: a mask head without a pooler, an unknown loss, a prior that needs the box
                head's map of a box head that has none, or a :class:`WeightTransferMaskHead` whose
                box predictor has not the weights it needs.
        """
        super().__init__(**kwargs)
        if self.mask_on and self.mask_pooler is None:
            raise ValueError('MODEL.ROI_MASK_HEAD.POOLER_TYPE is ""; name a pooler, "ROIAlignV2".')
        if mask_loss not in _MASK_LOSSES:
            raise ValueError(
                f"The mask loss is {mask_loss!r}; allowed: {', '.join(map(repr, _MASK_LOSSES))}."
            )
        needs_maps = mask_prior is not None and mask_prior.needs_box_features
        if needs_maps and not isinstance(self.box_predictor, PooledFastRCNNOutputLayers):
            raise ValueError(
                f"The mask prior {type(mask_prior).__name__} needs the box head's feature map: set "
                'MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead" or "TwoBranchBoxHead".'
            )
        if self.mask_on and isinstance(self.mask_head, WeightTransferMaskHead):
            self.mask_head.use_box_predictor(self.box_predictor)
        self.train_on_gt_boxes = train_on_gt_boxes
        self.train_on_external_masks = train_on_external_masks
        self.mask_prior = mask_prior
        self.repool_box_features = repool_box_features
        self.box_supervision = box_supervision
        self.mask_loss = _MASK_LOSSES[mask_loss]
        self.pixels = pixels or InputPixels()
        self.vis_period = vis_period
        self.scalars = DeferredScalars()

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret.update(box_supervision_from(cfg))
        ret["train_on_gt_boxes"] = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_GT_BOXES
        ret["train_on_external_masks"] = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS
        ret["repool_box_features"] = cfg.MODEL.ROI_MASK_PRIOR.REPOOL
        ret["pixels"] = InputPixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT)
        ret["vis_period"] = cfg.VIS_PERIOD
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
            shapes = {k: input_shape[k] for k in cfg.MODEL.ROI_HEADS.IN_FEATURES}
            shape = cls._roi_shape(cfg, input_shape)
            ret["mask_prior"] = build_mask_prior(cfg, shape, shapes)
            head_shape = shape_with_prior(shape, ret["mask_prior"])
            if head_shape != shape:
                ret["mask_head"] = build_mask_head(cfg, head_shape)
        return ret

    @staticmethod
    def _roi_shape(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
        side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
        channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
        return ShapeSpec(channels=channels, height=side, width=side)

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`ROIHeads`.

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
        return super().label_and_sample_proposals(proposals, targets)

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """See :meth:`StandardROIHeads.forward`."""
        if self.training and self._needs_pixels():
            features = {**features, PIXELS: self.pixels.to_rgb(images.tensor)}
        if self.training and self.train_on_gt_boxes and targets is not None:
            features = {**features, OBJECT_ROIS: [rois_of_objects(x) for x in targets]}
        return super().forward(images, features, proposals, targets)

    def _needs_pixels(self) -> bool:
        return self.box_supervision is not None or self._is_vis_iteration()

    def _is_vis_iteration(self) -> bool:
        return self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        if not self.mask_on or not self.training:
            # Without MODEL.MASK_ON there is no head.
            return self._predict_masks(getattr(self, "mask_head", None), features, instances)
        rois = self._select_training_rois(self._candidates(features, instances))
        mask_features, losses = self.compute_mask_features(features, rois, instances)
        labels = torch.cat([x.gt_classes for x in rois])
        logits = predict_label_channel(self.mask_head, mask_features, labels)
        targets = crop_gt_masks(rois, logits.shape[-1], logits.device)
        if self.train_on_external_masks:
            # Of other ROIs: the targets are 0 there.
            targets = targets + crop_external_masks(rois, logits.shape[-1], logits.device)
        is_supervised = torch.cat([self._is_supervised(x) for x in rois])
        self.scalars.put({"mask_head/accuracy": mask_accuracy(logits, targets, is_supervised)})
        weight = self.mask_head.loss_weight
        losses["loss_mask"] = self.mask_loss(logits, targets, is_supervised) * weight
        losses.update(compute_box_losses(self.box_supervision, logits, features, rois, weight))
        return losses

    def _predict_masks(
        self, head: nn.Module | None, features: dict[str, torch.Tensor], instances: list[Instances]
    ):
        if self.mask_on:
            mask_features, _ = self.compute_mask_features(features, instances)
            classes = torch.cat([x.pred_classes for x in instances])
            logits = predict_label_channel(head, mask_features, classes)
            mask_rcnn_inference(logits[:, None], instances)
        for x in instances:
            if x.has("box_features"):
                x.remove("box_features")
        return {} if self.training else instances

    def _uses_rois_without_mask(self) -> bool:
        # Batch statistics are those of all objects, as at inference.
        return self.box_supervision is not None or has_batch_norm(self.mask_head)

    def _is_supervised(self, rois: Instances) -> torch.Tensor:
        # Bool, shape (R_i,): which ROIs of an image have a mask to learn from that is given.
        has_mask = has_mask_of(rois)
        return has_mask | has_external_mask_of(rois) if self.train_on_external_masks else has_mask

    def _candidates(
        self, features: dict[str, torch.Tensor], sampled: list[Instances]
    ) -> list[Instances]:
        # Of which the ROIs that train the mask heads are chosen.
        return features[OBJECT_ROIS] if self.train_on_gt_boxes else sampled

    def _select_training_rois(self, candidates: list[Instances]) -> list[Instances]:
        rois, _ = select_foreground_proposals(candidates, self.num_classes)
        # What would add nothing to the loss need not be computed.
        if self._uses_rois_without_mask():
            return rois
        return [take(x, self._is_supervised(x)) for x in rois]

    def compute_mask_features(
        self,
        features: dict[str, torch.Tensor],
        instances: list[Instances],
        sampled: list[Instances] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Pool what the mask heads see, and enrich it with the prior.

        Args:
            features: of the backbone.
            instances: one per image, R rows in all, with ``pred_boxes`` and ``pred_classes``, or
                ``proposal_boxes`` and ``gt_classes``.
            sampled: in training, all sampled proposals, see :class:`ROIContext`.

        Returns:
            shape (R, D, S, S), and the prior's losses.
        """
        feature_maps = [features[f] for f in self.mask_in_features]
        pooled = self.mask_pooler(feature_maps, [boxes_of(x) for x in instances])
        if self.mask_prior is None:
            return pooled, {}
        kept = None
        if self.mask_prior.needs_box_features:
            kept = self.keep_box_features(features, instances)
            if self.training and self._is_vis_iteration():
                put_class_activation(features[PIXELS], instances, kept)
        return self.mask_prior(pooled, ROIContext(instances, feature_maps, kept, sampled))

    def keep_box_features(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> KeptBoxFeatures:
        """
        What the mask prior is given of the box head; arguments of :meth:`compute_mask_features`.

        These are the maps of the proposals. They are computed for boxes that the box head has not
        seen: given ones, those of ``train_on_gt_boxes``, refined ones with ``repool_box_features``.
        """
        is_kept = all(x.has("box_features") for x in instances)
        if is_kept and (self.training or not self.repool_box_features):
            maps = torch.cat([x.box_features for x in instances])
        else:
            box_features = [features[f] for f in self.box_in_features]
            pooled = self.box_pooler(box_features, [boxes_of(x) for x in instances])
            maps = self.box_head.class_maps(pooled)
        return KeptBoxFeatures(maps, self.box_predictor.cls_score)
