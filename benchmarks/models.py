"""Models with random weights that behave like trained ones, and images for them."""

import argparse
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from paired import REPOSITORY
from torch import nn

from teacher_student_mask import add_teacher_student_mask_config

BASELINE = "mask_rcnn"


def add_model_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """Add --methods, --size, --device and --opts."""
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        default=[BASELINE, "teacher_student"],
        metavar="NAME",
        help="configs of configs/coco, or 'NAME KEY VALUE ...'; the first one is the baseline",
    )
    add("--size", type=int, default=size, help="short side of the images (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="changes to all configs")


def make_cfg(method: str, args: argparse.Namespace) -> CfgNode:
    """The config of a method without pretrained weights, of this checkout's files."""
    name, *opts = shlex.split(method)
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / f"configs/coco/{name}.yaml"), allow_unsafe=False)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", args.device
    cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS = 0
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
    cfg.merge_from_list([*opts, *args.opts])
    return cfg


def build_models(args: argparse.Namespace, inputs: list[dict]) -> dict[str, nn.Module]:
    """Models of ``args.methods`` in eval mode; what the first one has, too, has its weights."""
    models: dict[str, nn.Module] = {}
    for method in args.methods:
        model = build_random_model(make_cfg(method, args), inputs)
        if models:
            shapes = {name: x.shape for name, x in model.state_dict().items()}
            first = next(iter(models.values())).state_dict()
            shared = {name: x for name, x in first.items() if shapes.get(name) == x.shape}
            model.load_state_dict(shared, strict=False)
        models[method] = model
    return models


def build_random_model(cfg: CfgNode, inputs: list[dict]) -> nn.Module:
    """
    Build a model whose random weights lead to as many opinions as trained ones.

    The frozen batch norms get the statistics of the inputs, for with those of nothing (mean 0,
    variance 1) activations grow with each block. The box head's class scores become peaked, so that
    a few pass the score threshold, and mask logits have both signs. CondInst finds its 100 objects
    with MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.

    Args:
        cfg: of CondInst, or any ROI heads that are :class:`StandardROIHeads`.
        inputs: for the model, at inference.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    norms = [x for x in model.modules() if isinstance(x, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_set_statistics) for norm in norms]
    scores, box_predictor = [], model.roi_heads.box_predictor
    hooks.append(box_predictor.register_forward_hook(lambda m, x, y: scores.append(y)))
    with torch.no_grad():
        # One pass is enough: each layer's statistics are taken after the layers before are done.
        model.inference(inputs[:1])
        for hook in hooks:
            hook.remove()
        if model.proposal_generator is None:
            return model
        # Logits over the classes with a standard deviation of 3, and their mean over the boxes
        # taken out, or else every box would have the same class.
        predictor, logits = box_predictor.cls_score, scores[0][0]
        spread = (logits - logits.mean(dim=0)).std()
        predictor.weight.mul_(3 / spread)
        predictor.bias.copy_(-(logits.mean(dim=0) - predictor.bias) * 3 / spread)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_head.predictor.weight"):
                nn.init.normal_(parameter, std=0.05)
    return model


def _set_statistics(norm: FrozenBatchNorm2d, args: tuple) -> None:
    var, mean = torch.var_mean(args[0], dim=(0, 2, 3))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)


def read_inputs(num_images: int, size: int) -> list[dict]:
    """
    Inputs for the inference of a model: COCO's val images where they are there, else noise.

    Args:
        num_images: how many.
        size: of the short side; the long side is at most 1333 pixels.
    """
    folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), "coco", "val2017")
    paths = sorted(folder.glob("*.jpg"))[:num_images]
    noise = np.random.default_rng(0).integers(0, 256, (num_images, 480, 640, 3), dtype=np.uint8)
    images = [utils.read_image(path, format="BGR") for path in paths] or list(noise)
    print(f"{len(images)} images of {folder if paths else 'NOISE: there is no COCO'}")
    inputs = []
    for image in images:
        resized = T.ResizeShortestEdge(size, max_size=1333).get_transform(image).apply_image(image)
        pixels = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        inputs.append({"image": pixels, "height": image.shape[0], "width": image.shape[1]})
    return inputs
