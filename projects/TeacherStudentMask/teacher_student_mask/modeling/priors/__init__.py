"""Mask-feature priors, which enrich the ROI features of the mask heads: one file per paper."""

from dataclasses import dataclass

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import nn

__all__ = [
    "ROIContext",
    "ROI_MASK_PRIOR_REGISTRY",
    "arguments_of",
    "build_own_pooler",
    "conv1x1",
    "conv_stack",
]

ROI_MASK_PRIOR_REGISTRY = Registry("ROI_MASK_PRIOR")
ROI_MASK_PRIOR_REGISTRY.__doc__ = """
Registry of mask-feature priors: modules ``Prior(cfg, input_shape, feature_shapes)``, with the shape
of the pooled mask features and those of ``ROIContext.feature_maps``. ``prior(mask_features,
context)`` gets the former, shape (R, D, S, S), and the :class:`ROIContext` of the same R rows. It
returns features of the same spatial size and, in training mode and with ``context.sampled``,
{name: loss}. The attribute ``needs_class_maps`` says whether it needs ``context.class_maps``; the
optional ``out_channels``, where it is not D, how many channels it returns.
"""


@dataclass
class ROIContext:
    """
    The inputs of a prior beside the pooled mask features.

    Attributes:
        instances: one per image, R rows in all. In training the ROIs that the mask heads learn
            from, with ``proposal_boxes``, ``gt_classes`` and, where an image has a ROI, the other
            targets; at inference detections with ``pred_boxes`` and ``pred_classes``.
        feature_maps: those of the backbone that the mask features are pooled from, shape
            (N, C, H_k, W_k), for N images.
        class_maps: shape (R, C, h, w), the box head's maps of these rows that the class scores are
            pooled from; None where ``needs_class_maps`` is False.
        classifier: linear layer from C features to the scores of classes and background; likewise.
        sampled: in training, one per image: all sampled proposals, background (the number of
            classes) included, with the same fields, and ``box_features``, a row of the box head's
            maps for each, where ``needs_class_maps`` is True. None where no losses are wanted.
    """

    instances: list[Instances]
    feature_maps: list[torch.Tensor]
    class_maps: torch.Tensor | None = None
    classifier: nn.Linear | None = None
    sampled: list[Instances] | None = None


def arguments_of(settings: CfgNode) -> dict:
    """The values of a config node whose keys are, in lower case, a prior's parameters."""
    return {key.lower(): value for key, value in settings.items()}


def build_own_pooler(
    cfg: CfgNode, feature_shapes: dict[str, ShapeSpec], output_size: int, sampling_ratio: int
) -> ROIPooler:
    """A pooler of ``ROIContext.feature_maps``, of the type of the mask heads'."""
    return ROIPooler(
        output_size=output_size,
        scales=tuple(1 / x.stride for x in feature_shapes.values()),
        sampling_ratio=sampling_ratio,
        pooler_type=cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE,
    )


def conv_stack(widths: list[int], relu_at_end: bool) -> nn.Sequential:
    """
    3x3 convolutions with ReLU between them, and after the last one on request; Kaiming
    initialisation (fan out), biases of 0. ``widths``: channels of the input, then of each output.
    """
    layers: list[nn.Module] = []
    for in_channels, out_channels in zip(widths, widths[1:]):
        conv = Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        weight_init.c2_msra_fill(conv)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*(layers if relu_at_end else layers[:-1]))


def conv1x1(in_channels: int, out_channels: int) -> nn.Module:
    """A 1x1 convolution, Kaiming-uniform initialisation with a = 1, biases of 0."""
    conv = Conv2d(in_channels, out_channels, kernel_size=1)
    weight_init.c2_xavier_fill(conv)
    return conv
