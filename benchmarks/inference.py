#!/usr/bin/env python
"""
Time of inference, from the resized image to binary masks in the frame of the original image.

One image at a time, at most 100 detections. "stock" is Detectron2's own Mask R-CNN, one class-
specific mask head, with the student's weights. The printed number is that of the detections.
"""

import argparse

import torch
from detectron2.modeling import build_model
from models import add_model_arguments, build_models, make_cfg, read_inputs
from paired import Programs, main, on_next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, size=800)
    parser.add_argument("--num-images", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--stock", action="store_true", help="compare with Detectron2's own, too")


def make_programs(args: argparse.Namespace) -> Programs:
    inputs = read_inputs(args.num_images, args.size)
    models = build_models(args, inputs)
    if args.stock:
        cfg = make_cfg("teacher_student", args)
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        student = next(x for name, x in models.items() if name.startswith("teacher_student"))
        stock = build_model(cfg).eval()
        stock.load_state_dict(student.state_dict(), strict=False)
        models = {"stock": stock, **models}

    @torch.no_grad()
    def infer(model: torch.nn.Module, image: dict) -> int:
        return len(model.inference([image])[0]["instances"])

    arguments = {name: [(model, image) for image in inputs] for name, model in models.items()}
    return {name: on_next(infer, pairs) for name, pairs in arguments.items()}


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=12))
