#!/usr/bin/env python
"""
Mixed precision, channels-last memory, torch.compile and recomputation on the mask heads.

The program is that of training: a class-agnostic teacher and a class-specific student (256
channels, 80 classes, the label's channel alone) on the same ROI features, forward, BCE and
backward; and that of inference, the student's forward pass. The features are random; what they hold
does not matter to the time. In turns:

  default         fp32, contiguous
  channels_last   heads and features in torch.channels_last
  autocast        torch.autocast, bfloat16 on a CPU, fp16 on a GPU
  both            the last two
  compiled        torch.compile of both heads' layers (all 80 channels: the choice of the label's
                  channel is not made while a graph is captured); the ROIs are always as many, which
                  in training they are not

The first differences to "default" are printed, too: what a variant costs in exactness.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from memory import peak_memory
from models import make_cfg
from paired import print_ratios, time_in_turns
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from teacher_student_mask.modeling.mask_heads import build_teacher_mask_head
from teacher_student_mask.modeling.mask_targets import select_label_channel

BASELINE = "default"
VARIANTS = (BASELINE, "channels_last", "autocast", "both", "compiled", "recompute")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    add("--rois", type=int, default=64, help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--opts", nargs="*", default=[], help="KEY VALUE overrides of the config")
    args = parser.parse_args(argv)
    heads = build_heads(args)
    inputs = make_inputs(args, heads)
    variants = list(dict.fromkeys([BASELINE, *args.variants]))
    for title, program in (("Training", training_step), ("Inference", inference)):
        programs = {x: make_program(x, program, heads, inputs, args.device) for x in variants}
        seconds = time_in_turns(programs, args.rounds, warmup=2)
        print(f"\n{title}, {args.rois} ROIs")
        print_ratios(seconds, BASELINE)
        expected = programs[BASELINE]()
        rows = [[name, (run() - expected).abs().max().item()] for name, run in programs.items()]
        print(tabulate(rows, ["", "largest difference of the probabilities"], floatfmt=".1e"))
        if program is training_step:
            print_memory(programs, args.device)
    return 0


def build_heads(args: argparse.Namespace) -> nn.ModuleDict:
    cfg = make_cfg(args.device, args.opts)
    shape = ShapeSpec(channels=cfg.MODEL.FPN.OUT_CHANNELS, height=14, width=14)
    torch.manual_seed(0)
    heads = nn.ModuleDict(
        {"teacher": build_teacher_mask_head(cfg, shape), "student": build_mask_head(cfg, shape)}
    )
    for head in heads.values():
        nn.init.normal_(head.predictor.weight, std=0.05)
    return heads.to(args.device)


def make_inputs(args: argparse.Namespace, heads: nn.ModuleDict) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    channels = next(heads["student"].parameters()).shape[1]
    num_classes = heads["student"].predictor.out_channels
    features = torch.rand(args.rois, channels, 14, 14, generator=generator)
    labels = torch.randint(num_classes, (args.rois,), generator=generator)
    targets = (torch.rand(args.rois, 28, 28, generator=generator) > 0.5).float()
    return tuple(x.to(args.device) for x in (features, labels, targets))


def call(function: Callable, *args) -> torch.Tensor:
    return function(*args)


def student_logits(head: nn.Module, features, labels) -> torch.Tensor:
    return select_label_channel(head.layers(features), labels)


def training_step(
    heads: nn.ModuleDict, features, labels, targets, run: Callable = call
) -> torch.Tensor:
    """Both heads forward and backward; returns the student's probabilities."""
    features = features.detach().requires_grad_()
    teacher = run(heads["teacher"].layers, features)[:, 0]
    student = run(student_logits, heads["student"], features, labels)
    loss = sum(F.binary_cross_entropy_with_logits(x.float(), targets) for x in (teacher, student))
    loss.backward()
    heads.zero_grad(set_to_none=True)
    return student.detach().float().sigmoid()


@torch.no_grad()
def inference(heads: nn.ModuleDict, features, labels, targets) -> torch.Tensor:
    """The student's probabilities."""
    return student_logits(heads["student"], features, labels).float().sigmoid()


def make_program(
    variant: str, program: Callable, heads: nn.ModuleDict, inputs: tuple, device: str
) -> Callable[[], torch.Tensor]:
    heads, (features, *others) = copy.deepcopy(heads), inputs
    if variant in ("channels_last", "both"):
        heads = heads.to(memory_format=torch.channels_last)
        features = features.to(memory_format=torch.channels_last)
    if variant == "compiled":
        for head in heads.values():
            head.layers = torch.compile(head.layers)
    kind = torch.device(device).type
    with_autocast = variant in ("autocast", "both")
    if variant == "recompute" and program is training_step:
        program = functools.partial(
            training_step, run=functools.partial(checkpoint, use_reentrant=False)
        )

    def run() -> torch.Tensor:
        context = nullcontext()
        if with_autocast:
            dtype = torch.bfloat16 if kind == "cpu" else torch.float16
            context = torch.autocast(kind, dtype=dtype)
        with context:
            return program(heads, features, *others)

    return run


def print_memory(programs: dict[str, Callable], device: str) -> None:
    peaks = {x: peak_memory(run, device) for x, run in programs.items() if x != "compiled"}
    rows = [[name, x / 2**20, x / peaks[BASELINE]] for name, x in peaks.items()]
    print(tabulate(rows, ["", "peak MiB", "ratio"], floatfmt=(None, ".0f", ".3f")))


if __name__ == "__main__":
    raise SystemExit(main())
