#!/usr/bin/env python
"""
What each base method costs against the baseline: training step, its memory, inference.

A method is a config; by default those of configs/voc2nonvoc with R50-FPN, 80 classes. The baseline
is mask_rcnn_R_50_FPN_1x.yaml, one class-agnostic mask head. All models have the same random weights
where they have the same layers, and in one round all of them get the same images, in turns:

  training     forward and backward, no optimizer step; the mapper's images, masks of the VOC
               classes, the same proposals around the objects (--foreground per image). Beside the
               measured ratio stands that of the multiply-adds (convolutions and matrix products)
  memory       what the tensors of a training step take at its worst moment, the gradients of the
               weights included, the weights themselves not (see benchmarks/memory.py); the largest
               of the batches
  inference    from the resized image to binary masks in the frame of the original image, one image
               at a time, 100 detections at most; the number found is printed

Nothing is downloaded. Methods of pseudo masks are compared by training_step.py.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from coco_data import as_input, read_images, val_images_folder
from detectron2.config import CfgNode
from memory import peak_memory
from models import build_random_model, copy_weights, make_cfg, on_next
from paired import print_ratios, time_in_turns
from tabulate import tabulate
from torch import nn
from training_batches import (
    WithProposalsAroundObjects,
    add_batch_arguments,
    count_madds,
    read_batches,
    step,
)

FOLDER = Path(__file__).resolve().parents[1] / "configs/voc2nonvoc"
SUFFIX = "_R_50_FPN_1x"
CONFIGS = {x.stem.replace(SUFFIX, ""): x for x in sorted(FOLDER.glob(f"*{SUFFIX}*.yaml"))}
BASELINE = "mask_rcnn"
METHODS = (
    "teacher_student",
    "opmask",
    "shapeprop",
    "shapeprop_teacher_student",
    "cpmask",
    "cpmask_teacher_student",
    "contrastmask",
    "contrastmask_teacher_student",
    "mask_x",
    "mask_x_official",
    "mask_grabcut",
    "boxinst_roi",
    "teacher_student_deep_teacher",
    "teacher_student_hourglass20_teacher",
    "mask_rcnn_gt_boxes",
    "mask_rcnn_hourglass20",
    "mask_rcnn_hourglass52",
    "mask_rcnn_hourglass100",
)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(0)
    names = dict.fromkeys([BASELINE, *args.methods])
    cfgs = {label_of(name): make_method_cfg(name, args) for name in names}
    images, source = read_images(args.images, args.num_images)
    print(source)
    inputs = [[as_input(image, args.size)] for image in images]
    models = build_models(cfgs, inputs[0])
    print_parameters(models)
    if not args.no_training:
        compare_training(models, cfgs[BASELINE], args)
    if not args.no_inference:
        compare_inference(models, inputs, args)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=CONFIGS,
        default=METHODS,
        metavar="NAME",
        help="files of configs/voc2nonvoc, without _R_50_FPN_1x and .yaml (default: "
        f"{' '.join(METHODS)}); {BASELINE} always runs",
    )
    add_batch_arguments(parser, batches=2, batch_size=1, size=320)
    parser.add_argument("--images", default=val_images_folder(), metavar="FOLDER")
    parser.add_argument("--num-images", type=int, default=4, help="for the inference")
    parser.add_argument("--rounds", type=int, default=3, help="over all batches, or images")
    parser.add_argument("--no-training", action="store_true", help="inference alone")
    parser.add_argument("--no-inference", action="store_true", help="training alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE overrides of the configs")
    return parser.parse_args(argv)


def label_of(name: str) -> str:
    """What the tables call a config: nobody should take CPMask's reconstruction for CPMask."""
    return f"{name} (reconstruction)" if name.startswith("cpmask") else name


def make_method_cfg(name: str, args: argparse.Namespace) -> CfgNode:
    opts = ["MODEL.PSEUDO_MASK.WARMUP_ITERS", 0, "TEST.DETECTIONS_PER_IMAGE", 100, *args.opts]
    return make_cfg(args.device, opts, CONFIGS[name])


def build_models(cfgs: dict[str, CfgNode], inputs: list[dict]) -> dict[str, nn.Module]:
    """Models in eval mode; what the baseline has, too, has the baseline's weights."""
    models = {}
    for name, cfg in cfgs.items():
        # Calibrates the scores of its own box head, if it has one.
        models[name] = build_random_model(cfg, inputs)
        copy_weights(models[BASELINE], models[name])
    return models


def print_parameters(models: dict[str, nn.Module]) -> None:
    counts = {name: sum(x.numel() for x in model.parameters()) for name, model in models.items()}
    rows = [[name, x / 1e6, x / counts[BASELINE]] for name, x in counts.items()]
    print(tabulate(rows, ["", "million weights", "ratio"], floatfmt=(None, ".1f", ".3f")))


def compare_training(models: dict[str, nn.Module], cfg: CfgNode, args: argparse.Namespace) -> None:
    batches, source = read_batches(cfg, args.dataset, args.batches, args.batch_size, args.size)
    print(f"\n{source}")
    rpns = {name: model.proposal_generator for name, model in models.items()}
    for model in models.values():
        model.train()
        model.proposal_generator = WithProposalsAroundObjects(
            model.proposal_generator, args.foreground
        )
    steps = {name: on_next(step, [(x, b, args.amp) for b in batches]) for name, x in models.items()}
    madds = {name: [count_madds(x) for _ in batches] for name, x in steps.items()}
    peaks = {
        name: max(
            peak_memory(functools.partial(step, model, b, args.amp), args.device) for b in batches
        )
        for name, model in models.items()
    }
    seconds = time_in_turns(steps, args.rounds * len(batches))
    print(f"\nTraining step{', mixed precision' if args.amp else ''}")
    print_ratios(seconds, BASELINE)
    print_costs(madds, peaks)
    for name, model in models.items():
        model.eval()
        model.proposal_generator = rpns[name]


def print_costs(madds: dict[str, list[int]], peaks: dict[str, int]) -> None:
    rows = [
        [
            name,
            sum(madds[name]) / len(madds[name]) / 1e9,
            sum(madds[name]) / sum(madds[BASELINE]),
            peak / 2**20,
            peak / peaks[BASELINE],
        ]
        for name, peak in peaks.items()
    ]
    header = ["", "G multiply-adds", "their ratio", "peak MiB", "its ratio"]
    print()
    print(tabulate(rows, header, floatfmt=(None, ".1f", ".3f", ".0f", ".3f")))


def compare_inference(
    models: dict[str, nn.Module], inputs: list[list[dict]], args: argparse.Namespace
) -> None:
    with torch.no_grad():
        found = {
            name: sum(len(model.inference(x)[0]["instances"]) for x in inputs) / len(inputs)
            for name, model in models.items()
        }
    print("\nDetections per image: " + ", ".join(f"{name} {x:.1f}" for name, x in found.items()))
    arguments = [(x,) for x in inputs]
    programs = {
        name: on_next(torch.no_grad()(model.inference), arguments) for name, model in models.items()
    }
    seconds = time_in_turns(programs, args.rounds * len(inputs))
    print("\nInference, one image")
    print_ratios(seconds, BASELINE)


if __name__ == "__main__":
    raise SystemExit(main())
