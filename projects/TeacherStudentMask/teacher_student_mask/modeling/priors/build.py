"""Mask-feature priors: what a base method adds to the ROI features of the mask heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

__all__ = ["KeptBoxFeatures", "ROI_MASK_PRIOR_REGISTRY", "build_mask_prior"]

ROI_MASK_PRIOR_REGISTRY = Registry("ROI_MASK_PRIOR")
ROI_MASK_PRIOR_REGISTRY.__doc__ = """
Registry of mask-feature priors: modules ``Prior(cfg, input_shape)`` that enrich the ROI features
of the mask heads. The call ``prior(mask_features, instances, kept)`` gets

* ``mask_features``: shape (R, D, S, S), the pooled mask features;
* ``instances``: one :class:`Instances` per image, R rows in all; ROIs with ``gt_classes`` in
  training, detections with ``pred_classes`` at inference;
* ``kept``: :class:`KeptBoxFeatures` of these R rows, or None where ``needs_box_features`` is False;

and returns features of the same spatial size and {name: loss}.
"""


@dataclass(frozen=True)
class KeptBoxFeatures:
    """
    What the box head computed for the ROIs of the mask heads.

    Args:
        maps: shape (R, C, h, w), its feature map before pooling.
        classifier: linear layer from C features to the scores of classes and background.
    """

    maps: torch.Tensor
    classifier: nn.Linear


def build_mask_prior(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module | None:
    """
    Build ``MODEL.ROI_MASK_PRIOR.NAME``.

    Args:
        cfg: the config.
        input_shape: channels and size of the pooled mask features.

    Returns:
        The prior, None if the name is "".
    """
    name = cfg.MODEL.ROI_MASK_PRIOR.NAME
    return ROI_MASK_PRIOR_REGISTRY.get(name)(cfg, input_shape) if name else None
