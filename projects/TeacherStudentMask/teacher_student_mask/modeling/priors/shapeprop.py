"""ShapeProp's prior: a saliency map of each ROI's class, spread over the object."""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances
from torch import nn
from torch.nn import functional as F

from ..mask_targets import (
    at_least_float32,
    boxes_of,
    classes_of,
    crop_gt_masks,
    find_rois,
    has_mask_of,
    masked_bce_loss,
)
from . import (
    ROI_MASK_PRIOR_REGISTRY,
    ROIContext,
    arguments_of,
    build_own_pooler,
    conv1x1,
    conv_stack,
)
from .opmask import class_activation_maps

__all__ = ["ShapePropagationPrior", "pass_messages", "relative_activation"]

# ShapeProp's; Detectron2's mask heads take as many points as the size of the box asks for.
_SAMPLING_RATIO = 2
_NUM_NEIGHBORS = 9


def pass_messages(states: torch.Tensor, weights: torch.Tensor, num_steps: int) -> torch.Tensor:
    """
    Let each cell take the weighted mean of its 3x3 neighbourhood, again and again.

    One step is h_i <- sum_j w_ij h_j / (sum_j w_ij + 1e-5), j over the nine cells around and with
    i, for each channel on its own. Outside the map h is 0 while w counts: maps fade at the border.

    Args:
        states: shape (R, C, S, S), also that of the result; not changed.
        weights: shape (R, C, 9, S, S), of cell i for its neighbours, row by row; not negative.
        num_steps: 0 or more; S lets every cell reach every other.
    """
    # As a quotient of its own: ShapeProp's code divides in place what autograd still needs.
    weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-5)
    for _ in range(num_steps):
        neighbors = F.unfold(states, kernel_size=3, padding=1).view(weights.shape)
        states = (neighbors * weights).sum(dim=2)
    return states


def relative_activation(logits: torch.Tensor) -> torch.Tensor:
    """
    Positive part of a map, relative to its maximum: ReLU(A) / (max ReLU(A) + 1e-5).

    Shape (R, 1, S, S), in [0, 1); zeros where a map has no positive cell.
    """
    positive = at_least_float32(logits).relu()
    return positive / (positive.amax(dim=(1, 2, 3), keepdim=True) + 1e-5)


@ROI_MASK_PRIOR_REGISTRY.register()
class ShapePropagationPrior(nn.Module):
    """
    ShapeProp's saliency head: activate, propagate, and give the shape to the mask head.

    1. A fully convolutional classifier, trained on the classes of all sampled ROIs, seen, unseen
       and background (``loss_shape_activation``, softmax cross entropy of the classes' activation
       maps averaged over their cells), gives a saliency map of the ROI's class: the matched
       object's in training, the predicted one at inference; raw, not detached.
    2. Encoded in a few channels the map is spread by message passing with predicted weights, and
       decoded to one logit per cell, which learns from the ROIs with a mask (``loss_shape``).
    3. That shape, relative to its maximum and encoded again, is appended to the mask features.

    Features of the ROIs are pooled by this prior. Differences to ShapeProp's code: propagation runs
    on the foreground ROIs alone; Detectron2's aligned ROIAlign; background is the last class; the
    feature size is ``MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION``.
    """

    needs_class_maps = False

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        pooler: ROIPooler,
        feature_channels: int,
        num_classes: int,
        conv_dim: int = 256,
        num_channels: int = 24,
        num_steps: int = 0,
        activation_weight: float = 1.0,
        shape_weight: float = 1.0,
    ):
        """
        Args:
            input_shape: channels D and side S of the pooled mask features.
            pooler: to shape (R, feature_channels, S, S).
            feature_channels: of the backbone's feature maps.
            num_classes: K, without background.
            conv_dim, num_channels: of the convolutions, and those that messages are passed in.
            num_steps: of message passing; 0 = S.
            activation_weight, shape_weight: of the two losses.
        """
        super().__init__()
        self.out_channels = input_shape.channels + conv_dim
        self.side = input_shape.height
        self.num_channels = num_channels
        self.num_steps = num_steps or self.side
        self.activation_weight = activation_weight
        self.shape_weight = shape_weight
        self.pooler = pooler
        widths = [feature_channels] + [conv_dim] * 4
        self.activation = conv_stack(widths, relu_at_end=True)
        self.classifier = nn.Linear(conv_dim, num_classes + 1)
        weight_init.c2_xavier_fill(self.classifier)
        self.propagation = conv_stack(widths, relu_at_end=True)
        self.message_weights = conv1x1(conv_dim, num_channels * _NUM_NEIGHBORS)
        self.encoder = conv_stack([1] + [num_channels] * 3, relu_at_end=False)
        self.decoder = conv_stack([num_channels] * 3 + [1], relu_at_end=False)
        self.shape_encoder = conv_stack([1] + [conv_dim] * 4, relu_at_end=False)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
    ) -> dict:
        return {
            "input_shape": input_shape,
            "pooler": build_own_pooler(cfg, feature_shapes, input_shape.height, _SAMPLING_RATIO),
            "feature_channels": next(iter(feature_shapes.values())).channels,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            **arguments_of(cfg.MODEL.ROI_MASK_PRIOR.SHAPE_PROPAGATION),
        }

    def forward(
        self, mask_features: torch.Tensor, context: ROIContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        As ``ROI_MASK_PRIOR_REGISTRY`` says: shape (R, D + conv_dim, S, S), the features and the
        encoded shape. Of ``context`` it needs ``instances``, ``feature_maps`` and ``sampled``.
        """
        rois, losses, rows = context.instances, {}, None
        if self.training and context.sampled is not None:
            pooled, maps = self._activate(context, context.sampled)
            labels = torch.cat([x.gt_classes for x in context.sampled])
            # Averaging is linear: K + 1 maps of each ROI need not be computed.
            scores = at_least_float32(self.classifier(maps.mean(dim=(2, 3))))
            # Attached without a ROI, too: every rank needs gradients.
            loss = F.cross_entropy(scores, labels) if len(labels) > 0 else scores.sum() * 0
            losses["loss_shape_activation"] = loss * self.activation_weight
            rows = find_rois(rois, context.sampled)
        if rows is None:
            pooled, maps = self._activate(context, rois)
        else:
            pooled, maps = pooled[rows], maps[rows]
        classes = classes_of(rois)
        saliency = class_activation_maps(maps, self.classifier.weight, classes)
        saliency = saliency + self.classifier.bias[classes][:, None, None, None]
        weights = at_least_float32(self.message_weights(self.propagation(pooled))).sigmoid()
        weights = weights.unflatten(1, (self.num_channels, _NUM_NEIGHBORS))
        states = at_least_float32(self.encoder(saliency.to(pooled.dtype)))
        logits = self.decoder(pass_messages(states, weights, self.num_steps))
        shape = self.shape_encoder(relative_activation(logits))
        if losses:
            targets = crop_gt_masks(rois, self.side, logits.device)
            has_mask = torch.cat([has_mask_of(x) for x in rois])
            loss = masked_bce_loss(at_least_float32(logits[:, 0]), targets, has_mask)
            losses["loss_shape"] = loss * self.shape_weight
        return torch.cat([mask_features, shape.to(mask_features.dtype)], dim=1), losses

    def _activate(
        self, context: ROIContext, rois: list[Instances]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Pooled features, and those that the classifier sees.
        pooled = self.pooler(context.feature_maps, [boxes_of(x) for x in rois])
        return pooled, self.activation(pooled)
