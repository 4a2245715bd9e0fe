"""Mask logits of one class per ROI, without those of the other classes."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import nn
from torch.autograd.function import once_differentiable

from .mask_loss import select_label_channel

__all__ = ["predict_label_channel"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def predict_label_channel(
    mask_head: nn.Module, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    Run a mask head, but of its last layer only the channel of each ROI's class.

    The result and all gradients are those of ``mask_head.layers`` followed by
    :func:`select_label_channel`, up to rounding. Of the last 1x1 convolution's C channels all but
    one are left out, where the head allows it: a :class:`MaskRCNNConvUpsampleHead`, or a subclass
    with the same ``layers``, that ends with a plain 1x1 convolution ``predictor`` without hooks.
    A head with a method ``label_channel(features, labels)`` of its own is asked for it. Any other
    head computes all channels, and so does every head while it is traced or exported: the graph is
    then Detectron2's.

    Args:
        mask_head: its ``layers`` return logits of shape (R, C, M, M), or (R, 1, M, M) if
            class-agnostic; not changed.
        features: shape (R, D, S, S), ROI features; R may be 0.
        labels: shape (R,), int64, the class of each ROI in [0, C).

    Returns:
        shape (R, M, M), logits. Gradient flows to all parameters of the head; it is 0 for the rows
        of the last layer whose class no ROI has.

    Raises:
        IndexError: a label outside [-C, C), as in indexing, unless the head is class-agnostic.
    """
    if not _is_exporting() and hasattr(mask_head, "label_channel"):
        return mask_head.label_channel(features, labels)
    if _is_exporting() or not _has_separate_predictor(mask_head):
        return select_label_channel(mask_head.layers(features), labels)
    *layers, predictor = mask_head
    sum_channels = _sum_channels
    if type(layers[-1]) is nn.ReLU and _runs_nothing_else(layers[-1]):
        layers.pop()
        sum_channels = _ReLUThenSum.apply
    for layer in layers:
        features = layer(features)
    # Under autocast the features have its type; a function of our own must cast by itself.
    weight = predictor.weight[labels].flatten(1).to(features.dtype)
    if predictor.bias is None:
        bias = weight.new_zeros(len(labels))
    else:
        bias = predictor.bias[labels].to(features.dtype)
    logits = sum_channels(features, weight, bias)
    return logits.view(-1, *features.shape[2:])


def _sum_channels(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # One product (1, D) x (D, M * M) per ROI. Of the forms of it (einsum, a sum over a product)
    # this needs no copy of the features, and autocast treats it as it treats a convolution.
    return torch.baddbmm(bias[:, None, None], weight[:, None], features.flatten(2))


class _ReLUThenSum(torch.autograd.Function):
    """
    ReLU and :func:`_sum_channels` in one, with one map less in memory.

    The map between them, of shape (R, D, M, M), is the largest of the mask branch. Autograd would
    hold it, its gradient and that of the ReLU's input at the same time; here the second gradient
    takes the place of the first.
    """

    @staticmethod
    def forward(ctx, features, weight, bias):
        features = features.relu()
        ctx.save_for_backward(features, weight)
        return _sum_channels(features, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        grad_weight = torch.bmm(grad, features.flatten(2).transpose(1, 2))[:, 0]
        grad_features = (weight[:, :, None] * grad).view(features.shape)
        grad_features.masked_fill_(features <= 0, 0)
        return grad_features, grad_weight, grad.sum((1, 2))


def _has_separate_predictor(head: nn.Module) -> bool:
    # Whether head.layers is its modules one after the other, the last of them a convolution that
    # can be taken apart.
    if not isinstance(head, MaskRCNNConvUpsampleHead):
        return False
    if type(head).layers is not MaskRCNNConvUpsampleHead.layers or "layers" in vars(head):
        return False
    last = list(head)[-1]
    # Not isinstance: a parametrised, quantised or other subclass computes something else.
    return (
        last is getattr(head, "predictor", None)
        and type(last) in (Conv2d, nn.Conv2d)
        and _runs_nothing_else(last)
        and _is_plain_1x1(last)
    )


def _runs_nothing_else(module: nn.Module) -> bool:
    # Nothing but the forward of its class.
    return "forward" not in vars(module) and not any(getattr(module, x) for x in _HOOKS)


def _is_plain_1x1(conv: nn.Conv2d) -> bool:
    # A class-agnostic convolution has nothing to leave out.
    return (
        tuple(conv.weight.shape[2:]) == conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.out_channels > 1
        and getattr(conv, "norm", None) is None
        and getattr(conv, "activation", None) is None
    )


def _is_exporting() -> bool:
    # ONNX's exporters do one or the other. torch.compiler.is_exporting came with PyTorch 2.7.
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return torch.jit.is_tracing() or is_exporting()
