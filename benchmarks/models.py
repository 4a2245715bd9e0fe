"""Models of the recipe with random weights that behave like trained ones: nothing is downloaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file

CONFIG = Path(__file__).resolve().parents[1] / "configs/Base-COCO.yaml"


def make_cfg(device: str, opts: list[str], config_file: Path = CONFIG) -> CfgNode:
    """
    A config without pretrained weights.

    Args:
        device: "cpu" or "cuda".
        opts: KEY VALUE overrides.
        config_file: by default the recipe's, Mask R-CNN R50-FPN with 80 classes.
    """
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    merge_config_file(cfg, str(config_file))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = device
    cfg.merge_from_list(opts)
    return cfg


def build_random_model(cfg: CfgNode, inputs: list[dict], seed: int = 0) -> nn.Module:
    """
    Build a model whose random weights lead to as many opinions as trained ones.

    The frozen batch norms get the statistics of the inputs, for with those of nothing (mean 0,
    variance 1) activations grow with each block. The box head's class scores become peaked, so that
    a few pass the score threshold, and mask logits have both signs.

    Args:
        cfg: of any ROI heads that are :class:`StandardROIHeads`.
        inputs: for the model, at inference.
        seed: of the weights.

    Returns:
        The model in eval mode.
    """
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    norms = [x for x in model.modules() if isinstance(x, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    scores = []
    hooks.append(
        model.roi_heads.box_predictor.register_forward_hook(lambda m, x, y: scores.append(y[0]))
    )
    with torch.no_grad():
        # One pass is enough: each layer's statistics are taken after the layers before are done.
        model.inference(inputs[:1])
        for hook in hooks:
            hook.remove()
        # Logits over the classes with a standard deviation of 3, and their mean over the boxes
        # taken out, or else every box would have the same class.
        predictor = model.roi_heads.box_predictor.cls_score
        spread = (scores[0] - scores[0].mean(dim=0)).std()
        predictor.weight.mul_(3 / spread)
        predictor.bias.copy_(-(scores[0].mean(dim=0) - predictor.bias) * 3 / spread)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_head.predictor.weight"):
                nn.init.normal_(parameter, std=0.05)
    return model


def copy_weights(source: nn.Module, target: nn.Module) -> list[str]:
    """
    Copy what both models have by name and shape.

    Returns:
        Names of the target's weights that the source does not have.
    """
    shapes = {name: x.shape for name, x in target.state_dict().items()}
    weights = {name: x for name, x in source.state_dict().items() if shapes.get(name) == x.shape}
    return target.load_state_dict(weights, strict=False).missing_keys


def on_next(function: Callable, arguments: list[tuple]) -> Callable[[], object]:
    """
    Make a program for :func:`time_in_turns` that takes another input in every round.

    Args:
        function: what to run.
        arguments: of the first call, the second, ...; after the last from the first again.
    """
    rest = itertools.cycle(arguments)
    return lambda: function(*next(rest))


def _take_statistics(norm: FrozenBatchNorm2d, args: tuple) -> None:
    var, mean = torch.var_mean(args[0], dim=(0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
