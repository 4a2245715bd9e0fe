#!/usr/bin/env python
"""
Time and memory of a training step of each method against the class-agnostic baseline.

A step is forward and backward of the whole R50-FPN model with 80 classes, no optimizer step, so
that all steps see the same weights. Images, objects and sampling are those of the mapper and the
recipe, masks of the VOC classes. The programs run in turns, and in one round all of them get the
same batch and draw the same proposals:

  class_agnostic   PartiallySupervisedROIHeads, the baseline of the field: one class-agnostic mask
                   head, on the ROIs whose object has a mask
  class_specific   stock Detectron2 Mask R-CNN, on all foreground ROIs (an unseen object's mask is
                   the rectangle of its box, which takes as long)
  label_channel    PartiallySupervisedROIHeads with class-specific masks, which computes the channel
                   of each ROI's class alone; with --opts DATASETS.SEEN_CLASSES all it has the ROIs
                   of class_specific
  interact, threshold, none, box_fit, crf
                   TeacherStudentROIHeads with that PSEUDO_MASK.METHOD, on all foreground ROIs
  capped           interact with MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE 4: of the ROIs without a mask
                   four of each image, drawn at random, take part

The weights are random, so nothing is downloaded. A random RPN finds few objects, so proposals
around the objects are added, as many as a trained one gives (--foreground per image).

Beside the measured ratio stands the one that follows from the multiply-adds of forward and backward
alone (torch.utils.flop_counter on the same batches; convolutions and matrix products, no pooling,
no loss, no pseudo masks). With --mask-branch the mask branch alone is measured as well, from the
backbone's features and the sampled ROIs to its losses and back to the features, and its memory at
the worst moment, gradients of its weights included. --profile prints the longest operators.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from memory import peak_memory
from models import build_random_model, copy_weights, make_cfg, on_next
from paired import print_ratios, ratios_to, time_in_turns
from tabulate import tabulate
from torch import nn
from training_batches import (
    WithProposalsAroundObjects,
    add_batch_arguments,
    count_madds,
    forward_and_backward,
    read_batches,
    step,
)

HEADS = "MODEL.ROI_HEADS.NAME"
VARIANTS = {
    "class_agnostic": [HEADS, "PartiallySupervisedROIHeads"]
    + ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True],
    "class_specific": [HEADS, "StandardROIHeads"],
    "label_channel": [HEADS, "PartiallySupervisedROIHeads"],
    **{
        method: [HEADS, "TeacherStudentROIHeads", "MODEL.PSEUDO_MASK.METHOD", method]
        for method in ("interact", "threshold", "none", "box_fit", "crf")
    },
    "capped": [HEADS, "TeacherStudentROIHeads", "MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE", 4],
}
BASELINE = "class_agnostic"
# The mask branch is compared with that of the same shape.
MASK_BASELINE = "class_specific"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = make_cfg(args.device, ["MODEL.PSEUDO_MASK.WARMUP_ITERS", 0, *args.opts])
    batches, source = read_batches(cfg, args.dataset, args.batches, args.batch_size, args.size)
    print(source)
    models = build_models(cfg, args, batches[0])
    steps = {name: on_next(step, [(x, b, args.amp) for b in batches]) for name, x in models.items()}
    madds = {name: [count_madds(x) for _ in batches] for name, x in steps.items()}
    mask_inputs = {name: [mask_inputs_of(x, b) for b in batches] for name, x in models.items()}
    print_rois(mask_inputs[BASELINE], cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    seconds = time_in_turns(steps, args.rounds * len(batches))
    print(f"\nTraining step{', mixed precision' if args.amp else ''}")
    print_ratios(seconds, BASELINE)
    print_madds(madds, seconds, BASELINE)
    if args.mask_branch:
        masks = {
            name: on_next(mask_step, [(models[name], *x, args.amp) for x in inputs])
            for name, inputs in mask_inputs.items()
        }
        madds = {name: [count_madds(x) for _ in batches] for name, x in masks.items()}
        report_mask_branch(masks, madds, args)
    if args.profile:
        for name, program in steps.items():
            print(f"\n{name}")
            print(profile(program, args.device))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        default=[x for x in VARIANTS if x != "crf"],
        help="default: all but crf, which needs pydensecrf; class_agnostic always runs",
    )
    add_batch_arguments(parser, batches=4, batch_size=2, size=800)
    parser.add_argument("--rounds", type=int, default=3, help="over all batches")
    parser.add_argument("--mask-branch", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE overrides of the config")
    args = parser.parse_args(argv)
    needed = [BASELINE, MASK_BASELINE] if args.mask_branch else [BASELINE]
    args.variants = list(dict.fromkeys([*needed, *args.variants]))
    return args


def build_models(
    cfg: CfgNode, args: argparse.Namespace, inputs: list[dict]
) -> dict[str, nn.Module]:
    models, reference = {}, None
    for name in args.variants:
        variant = cfg.clone()
        variant.merge_from_list(VARIANTS[name])
        if reference is None:
            model = reference = build_random_model(variant, inputs)
        else:
            model = build_model(variant)
            copy_weights(reference, model)
        models[name] = model.train()
    for model in models.values():
        model.proposal_generator = WithProposalsAroundObjects(
            model.proposal_generator, args.foreground
        )
    return models


def mask_step(model: nn.Module, features: dict, instances: list[Instances], amp: bool) -> None:
    """Forward and backward of the mask branch alone."""
    heads = model.roi_heads
    leaves = {name: features[name].detach().requires_grad_() for name in heads.mask_in_features}
    forward_and_backward(model, lambda: heads._forward_mask({**features, **leaves}, instances), amp)


def mask_inputs_of(model: nn.Module, batch: list[dict]) -> tuple[dict, list[Instances]]:
    """What the ROI heads give to the mask branch in a step: features and sampled proposals."""
    heads, given = model.roi_heads, []
    heads._forward_mask = lambda *args: given.append(args) or {}
    try:
        torch.manual_seed(0)
        with torch.no_grad(), EventStorage():
            model(batch)
    finally:
        del heads._forward_mask
    return given[0]


def print_rois(mask_inputs: list[tuple[dict, list[Instances]]], num_classes: int) -> None:
    rois = [x for _, instances in mask_inputs for x in instances]
    foreground = [x[x.gt_classes < num_classes] for x in rois]
    with_mask = sum(x.gt_has_mask.sum().item() for x in foreground if len(x) > 0)
    print(
        f"{sum(map(len, foreground)) / len(mask_inputs):.1f} foreground ROIs per batch, "
        f"{with_mask / len(mask_inputs):.1f} of them with a mask"
    )


def print_madds(madds: dict[str, list[int]], seconds: dict[str, list[float]], base: str) -> None:
    rows = []
    for name, ratios in ratios_to(seconds, base).items():
        predicted = sum(madds[name]) / sum(madds[base])
        giga = sum(madds[name]) / len(madds[name]) / 1e9
        rows.append([name, giga, predicted, statistics.median(ratios)])
    print()
    print(tabulate(rows, ["", "G multiply-adds", "their ratio", "measured"], floatfmt=".3f"))


def report_mask_branch(
    programs: dict[str, Callable], madds: dict[str, list[int]], args: argparse.Namespace
) -> None:
    seconds = time_in_turns(programs, args.rounds * args.batches)
    print("\nMask branch alone, forward and backward")
    print_ratios(seconds, MASK_BASELINE)
    print_madds(madds, seconds, MASK_BASELINE)
    peaks = {
        name: max(peak_memory(program, args.device) for _ in range(args.batches))
        for name, program in programs.items()
    }
    rows = [[name, x / 2**20, x / peaks[MASK_BASELINE]] for name, x in peaks.items()]
    print("\nMask branch alone, memory at the worst moment of the largest batch")
    print(tabulate(rows, ["", "peak MiB", "ratio"], floatfmt=".3f"))


def profile(program: Callable, device: str) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        program()
    sort_by = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=sort_by, row_limit=25)


if __name__ == "__main__":
    raise SystemExit(main())
