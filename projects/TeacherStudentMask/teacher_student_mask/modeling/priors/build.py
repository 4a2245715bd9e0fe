"""Mask-feature priors: what a base method adds to the ROI features of the mask heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import nn

__all__ = [
    "KeptBoxFeatures",
    "ROI_MASK_PRIOR_REGISTRY",
    "ROIContext",
    "build_mask_prior",
    "shape_with_prior",
]

ROI_MASK_PRIOR_REGISTRY = Registry("ROI_MASK_PRIOR")
ROI_MASK_PRIOR_REGISTRY.__doc__ = """
Registry of mask-feature priors: modules ``Prior(cfg, input_shape, feature_shapes)``, arguments of
:func:`build_mask_prior`, that enrich the ROI features of the mask heads. The call
``prior(mask_features, context)`` gets

* ``mask_features``: shape (R, D, S, S), the pooled mask features;
* ``context``: :class:`ROIContext`, what else there is of these R rows;

and returns features of the same spatial size and, in training mode, {name: loss}. The attribute
``needs_box_features`` says whether it needs ``context.kept``. Another one is optional:
``out_channels``, of the features that it returns, where these are not D.
"""


@dataclass(frozen=True)
class KeptBoxFeatures:
    """
    What the box head computed for the ROIs of the mask heads.

    Args:
        maps: shape (R, C, h, w), its feature map before pooling, that of the classes.
        classifier: linear layer from C features to the scores of classes and background.
    """

    maps: torch.Tensor
    classifier: nn.Linear


@dataclass(frozen=True)
class ROIContext:
    """
    What a prior may look at beside the pooled mask features.

    Args:
        instances: one per image, R rows in all; ROIs with ``proposal_boxes`` and ``gt_classes`` in
            training, and the other targets where an image has a ROI; detections with ``pred_boxes``
            and ``pred_classes`` at inference. In training those alone that the mask heads learn
            from: some of the foreground proposals, or with ``TRAIN_ON_GT_BOXES`` objects at their
            own boxes, sampled or not.
        feature_maps: those of the backbone that the mask features are pooled from, shape
            (N, C, H_k, W_k), for N images.
        kept: of these R rows; None where ``needs_box_features`` is False.
        sampled: in training, one per image: all sampled proposals with ``proposal_boxes`` and
            ``gt_classes``, background (the number of classes) included, the other targets where an
            image has an object, and ``box_features``, a row of the box head's maps for each, where
            ``needs_box_features`` is True; otherwise None.
    """

    instances: list[Instances]
    feature_maps: list[torch.Tensor]
    kept: KeptBoxFeatures | None = None
    sampled: list[Instances] | None = None


def build_mask_prior(
    cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
) -> nn.Module | None:
    """
    Build ``MODEL.ROI_MASK_PRIOR.NAME``.

    Args:
        cfg: the config.
        input_shape: channels and size of the pooled mask features.
        feature_shapes: channels and strides of ``ROIContext.feature_maps``, in their order.

    Returns:
        The prior, None if the name is "".
    """
    name = cfg.MODEL.ROI_MASK_PRIOR.NAME
    if not name:
        return None
    return ROI_MASK_PRIOR_REGISTRY.get(name)(cfg, input_shape, feature_shapes)


def shape_with_prior(input_shape: ShapeSpec, prior: nn.Module | None) -> ShapeSpec:
    """
    What the mask heads are built for.

    Args:
        input_shape: channels and size of the pooled mask features.
        prior: which enriches them; None = nothing does.

    Returns:
        ``input_shape``, with the channels that the prior returns if it says so.
    """
    channels = getattr(prior, "out_channels", input_shape.channels)
    return ShapeSpec(channels=channels, height=input_shape.height, width=input_shape.width)
