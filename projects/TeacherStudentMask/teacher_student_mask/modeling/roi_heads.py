"""ROI heads that learn masks where only some objects have one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import build_mask_head, mask_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from .box_supervision import BoxSupervision
from .mask_heads import has_batch_norm
from .mask_targets import (
    boxes_of,
    crop_gt_masks,
    crop_pixels,
    has_mask_of,
    has_model_mask_of,
    mask_accuracy,
    masked_bce_loss,
    masked_dice_loss,
    rois_of_objects,
    select_label_channel,
    select_rois,
)
from .mask_x_rcnn import WeightTransferMaskHead
from .priors import (
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    ROIContext,
    TwoBranchBoxHead,
    build_mask_prior,
    normalized_activation_maps,
)

__all__ = [
    "PartiallySupervisedROIHeads",
    "check_choice",
    "pooled_shape",
    "put_pictures",
    "put_scalars",
]

_MASK_LOSSES = {"bce": masked_bce_loss, "dice": masked_dice_loss}
_MAX_PICTURES = 8


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
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        image_format: str = "BGR",
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
            pixel_mean, pixel_std, image_format: the model's input normalisation and order of
                channels, to get the pixels back from its input.
            vis_period: iterations between pictures in the event storage; 0 = none.
            **kwargs: of :class:`StandardROIHeads`. The mask head must have a ``layers`` method
                that returns logits, as every :class:`BaseMaskRCNNHead` has.

        Raises:
            ValueError: a mask head without a pooler, an unknown loss or image format, a prior that
                needs the box head's map of a box head that has none, or a
                :class:`WeightTransferMaskHead` whose box predictor lacks the weights it needs.
        """
        super().__init__(**kwargs)
        if self.mask_on and self.mask_pooler is None:
            raise ValueError('MODEL.ROI_MASK_HEAD.POOLER_TYPE is ""; name a pooler, "ROIAlignV2".')
        check_choice("The mask loss", mask_loss, tuple(_MASK_LOSSES))
        check_choice("INPUT.FORMAT", image_format, ("BGR", "RGB"))
        needs_maps = mask_prior is not None and mask_prior.needs_class_maps
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
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.image_format = image_format
        self.vis_period = vis_period

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
            vis_period=cfg.VIS_PERIOD,
        )
        name = cfg.MODEL.BOX_SUPERVISION.NAME
        check_choice("MODEL.BOX_SUPERVISION.NAME", name, ("", "boxinst"))
        if name:
            ret["box_supervision"] = BoxSupervision(cfg)
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
            shape = pooled_shape(cfg, input_shape)
            shapes = {k: input_shape[k] for k in cfg.MODEL.ROI_HEADS.IN_FEATURES}
            ret["mask_prior"] = build_mask_prior(cfg, shape, shapes)
            head_shape = pooled_shape(cfg, input_shape, ret["mask_prior"])
            if head_shape != shape:
                ret["mask_head"] = build_mask_head(cfg, head_shape)
        return ret

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """
        As in :class:`ROIHeads`.

        Raises:
            ValueError: the targets lack the fields of :class:`TeacherStudentDatasetMapper`.
        """
        if self.mask_on and any(len(x) > 0 and not x.has("gt_has_mask") for x in targets):
            raise ValueError(
                "The training targets have no 'gt_has_mask', which says which objects have a mask: "
                "build the train loader with TeacherStudentDatasetMapper(cfg, is_train=True), as "
                "train_net.py does, not with Detectron2's default mapper."
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
        if not self.training:
            return super().forward(images, features, proposals, targets)
        sampled = self.label_and_sample_proposals(proposals, targets)
        losses = self._forward_box(features, sampled)
        if self.mask_on:
            # An image may have more objects than are sampled.
            candidates = map(rois_of_objects, targets) if self.train_on_gt_boxes else sampled
            rois = self._select_training_rois(list(candidates))
            pixels = self.to_rgb(images.tensor) if self._needs_pixels() else None
            losses.update(self.compute_mask_losses(features, rois, sampled, pixels))
        losses.update(self._forward_keypoint(features, sampled))
        return sampled, losses

    def _forward_box(self, features: dict[str, torch.Tensor], proposals: list[Instances]):
        """As the parent's; with a prior that needs them, also keeps the box head's maps."""
        if not (self.training and self._needs_class_maps()):
            return super()._forward_box(features, proposals)
        feature_maps = [features[f] for f in self.box_in_features]
        pooled = self.box_pooler(feature_maps, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        losses = self.box_predictor.losses(predictions, proposals)
        for x, maps in zip(proposals, predictions[-1].split([len(x) for x in proposals])):
            x.box_features = maps
        if self.train_on_pred_boxes:
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for x, boxes_per_image in zip(proposals, boxes):
                x.proposal_boxes = Boxes(boxes_per_image)
        return losses

    def _forward_mask(self, features: dict[str, torch.Tensor], instances: list[Instances]):
        """Inference alone: in training :meth:`forward` calls :meth:`compute_mask_losses`."""
        if self.mask_on:
            mask_features, _ = self.compute_mask_features(features, instances)
            classes = torch.cat([x.pred_classes for x in instances])
            logits = select_label_channel(self.predict_masks(mask_features), classes)
            mask_rcnn_inference(logits[:, None], instances)
        for x in instances:
            if x.has("box_features"):
                x.remove("box_features")
        return instances

    def predict_masks(self, mask_features: torch.Tensor) -> torch.Tensor:
        """Logits at inference, (R, C, M, M) or (R, 1, M, M), of features (R, D, S, S)."""
        return self.mask_head.layers(mask_features)

    def compute_mask_losses(
        self,
        features: dict[str, torch.Tensor],
        rois: list[Instances],
        sampled: list[Instances],
        pixels: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            features: of the backbone.
            rois: one per image, R rows in all: those that the mask heads train on, with
                ``proposal_boxes``, ``gt_classes`` and the other targets.
            sampled: all sampled proposals, see :class:`ROIContext`.
            pixels: shape (N, 3, H, W), RGB in 0-255; where something needs them.

        Returns:
            {name: scalar}, "loss_mask" and those of the prior and of box supervision.
        """
        mask_features, losses = self.compute_mask_features(features, rois, sampled)
        labels = torch.cat([x.gt_classes for x in rois])
        logits = select_label_channel(self.mask_head.layers(mask_features), labels)
        targets = crop_gt_masks(rois, logits.shape[-1], logits.device, self._is_supervised)
        is_supervised = torch.cat([self._is_supervised(x) for x in rois])
        put_scalars({"mask_head/accuracy": mask_accuracy(logits, targets, is_supervised)})
        weight = self.mask_head.loss_weight
        losses["loss_mask"] = self.mask_loss(logits, targets, is_supervised) * weight
        losses.update(self._compute_box_losses(logits, rois, pixels, weight))
        if self._is_vis_iteration():
            self._put_class_activation(features, rois, pixels)
        return losses

    def _compute_box_losses(
        self, logits: torch.Tensor, rois: list[Instances], pixels: torch.Tensor, weight: float
    ) -> dict[str, torch.Tensor]:
        if self.box_supervision is None:
            return {}
        losses = self.box_supervision(logits, rois, pixels, get_event_storage().iter)
        return {name: loss * weight for name, loss in losses.items()}

    def _is_supervised(self, rois: Instances) -> torch.Tensor:
        # Bool, shape (R_i,): which ROIs of an image have a mask to learn from that is given.
        has_mask = has_mask_of(rois)
        return has_mask | has_model_mask_of(rois) if self.train_on_external_masks else has_mask

    def _select_training_rois(self, candidates: list[Instances]) -> list[Instances]:
        rois, _ = select_foreground_proposals(candidates, self.num_classes)
        # ROIs that add nothing to the loss need not be computed.
        if self._uses_rois_without_mask():
            return rois
        return [select_rois(x, self._is_supervised(x)) for x in rois]

    def _uses_rois_without_mask(self) -> bool:
        # Batch statistics are those of all objects, as at inference.
        return self.box_supervision is not None or has_batch_norm(self.mask_head)

    def _needs_pixels(self) -> bool:
        return self.box_supervision is not None or self._is_vis_iteration()

    def _needs_class_maps(self) -> bool:
        return self.mask_prior is not None and self.mask_prior.needs_class_maps

    def _is_vis_iteration(self) -> bool:
        return self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0

    def to_rgb(self, images: torch.Tensor) -> torch.Tensor:
        """
        Undo the input normalisation.

        Args:
            images: shape (N, 3, H, W), as the model sees them.

        Returns:
            shape (N, 3, H, W), RGB in 0-255.
        """
        mean, std = images.new_tensor(self.pixel_mean), images.new_tensor(self.pixel_std)
        pixels = images * std[:, None, None] + mean[:, None, None]
        return pixels.flip(1) if self.image_format == "BGR" else pixels

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
        context = ROIContext(instances, feature_maps, sampled=sampled)
        if self.mask_prior.needs_class_maps:
            context.class_maps = self.compute_class_maps(features, instances)
            context.classifier = self.box_predictor.cls_score
        return self.mask_prior(pooled, context)

    def compute_class_maps(
        self, features: dict[str, torch.Tensor], instances: list[Instances]
    ) -> torch.Tensor:
        """
        The box head's feature maps that class scores are pooled from, (R, C, h, w).

        These are the maps of the proposals. They are computed for boxes that the box head has not
        seen: given ones, those of ``train_on_gt_boxes``, refined ones with ``repool_box_features``.
        Arguments as for :meth:`compute_mask_features`.
        """
        is_kept = all(x.has("box_features") for x in instances)
        if is_kept and (self.training or not self.repool_box_features):
            return torch.cat([x.box_features for x in instances])
        feature_maps = [features[f] for f in self.box_in_features]
        pooled = self.box_pooler(feature_maps, [boxes_of(x) for x in instances])
        return self.box_head.class_maps(pooled)

    def _put_class_activation(
        self, features: dict[str, torch.Tensor], rois: list[Instances], pixels: torch.Tensor
    ) -> None:
        # As Fig. 5 of the paper.
        if self._needs_class_maps():
            maps = self.compute_class_maps(features, rois)
            activation = normalized_activation_maps(rois, maps, self.box_predictor.cls_score)[:, 0]
            crops = crop_pixels(pixels, [boxes_of(x) for x in rois], 8 * maps.shape[-1])
            put_pictures("ROIs: image | class activation", crops, [activation])


def pooled_shape(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], prior: nn.Module | None = None
) -> ShapeSpec:
    """Channels and size of the pooled mask features, as the prior, if any, returns them."""
    side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    channels = getattr(prior, "out_channels", channels)
    return ShapeSpec(channels=channels, height=side, width=side)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that names the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def put_scalars(scalars: dict[str, torch.Tensor]) -> None:
    """Log {name: tensor of one element}; NaN means that there is nothing to log."""
    # Together, so that a GPU is waited for once.
    numbers = torch.stack([x.detach().float() for x in scalars.values()]).tolist()
    for name, number in zip(scalars, numbers):
        if not math.isnan(number):
            get_event_storage().put_scalar(name, number)


@torch.no_grad()
def put_pictures(name: str, pixels: torch.Tensor, masks: list[torch.Tensor]) -> None:
    """
    Put strips of a ROI's pixels and masks, side by side, into the event storage (TensorBoard).

    Args:
        name: of the pictures; a running number is added. At most 8 ROIs are shown.
        pixels: shape (R, 3, S, S), RGB in 0-255.
        masks: each of shape (R, M, M), in [0, 1]; M may differ and is resized to S.
    """
    size = pixels.shape[-2:]
    for k in range(min(len(pixels), _MAX_PICTURES)):
        strip = [pixels[k].clamp(0, 255) / 255]
        for x in masks:
            resized = F.interpolate(x[k][None, None].detach().float(), size=size)[0]
            strip.append(resized.expand(3, -1, -1))
        get_event_storage().put_image(f"{name} ({k})", torch.cat(strip, dim=2))
