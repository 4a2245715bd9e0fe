"""Layers that more than one mask-feature prior is made of."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from torch import nn

__all__ = ["at_least_float32", "build_own_pooler", "conv1x1", "conv_stack"]


def build_own_pooler(
    cfg: CfgNode, feature_shapes: dict[str, ShapeSpec], output_size: int, sampling_ratio: int
) -> ROIPooler:
    """
    A pooler of the type of the mask heads', for a prior that pools by itself.

    Args:
        cfg: the config.
        feature_shapes: of ``ROIContext.feature_maps``, in their order.
        output_size: side of what is pooled, in cells.
        sampling_ratio: samples along each side of a cell; 0 = as many as it has pixels.
    """
    return ROIPooler(
        output_size=output_size,
        scales=tuple(1 / x.stride for x in feature_shapes.values()),
        sampling_ratio=sampling_ratio,
        pooler_type=cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE,
    )


def conv_stack(widths: list[int], relu_at_end: bool) -> nn.Sequential:
    """
    3x3 convolutions with ReLU between them, Kaiming initialisation (fan out), biases of 0.

    Args:
        widths: channels of the input, then of each convolution's output.
        relu_at_end: a ReLU after the last one, too.

    Returns:
        A module from shape (R, widths[0], S, S) to (R, widths[-1], S, S); R may be 0.
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


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, in float32 if it is of half precision, for what autocast would not protect."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
