#!/usr/bin/env python
"""
Latency of the student model against stock Detectron2 Mask R-CNN with the same weights.

Both are class-specific R50-FPN with 80 classes. The stock model is GeneralizedRCNN from the same
config, but for ROI_HEADS.NAME StandardROIHeads, with the weights of ours without the teacher's.
Every program gets the same image in the same round, one image at a time, in turns:

  whole model   from the resized image to binary masks in the frame of the original image
  mask branch   mask pooler, mask head, channel of the class, sigmoid; on the backbone's features
                and the student's detections, which are the same for both

The weights are random, so nothing is downloaded, and are set so that enough boxes pass the score
threshold to fill TEST.DETECTIONS_PER_IMAGE, here 100, which COCO's AP allows; the number found is
printed. Before the timing boxes, classes, scores and masks of both are compared, with TF32 off,
and both masks with what the last layer gives in double precision: how far apart are two correct
results in single precision?
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch
from coco_data import as_input, read_images, val_images_folder
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from models import build_random_model, copy_weights, make_cfg, on_next
from paired import print_ratios, time_in_turns
from torch import nn

STOCK, STUDENT = "stock Mask R-CNN", "student"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    images, source = read_images(args.images, args.num_images)
    print(source)
    inputs = [as_input(image, max(args.sizes)) for image in images]
    opts = ["TEST.DETECTIONS_PER_IMAGE", 100, *args.opts]
    models = build_models(make_cfg(args.device, opts), inputs)
    for size in args.sizes:
        inputs = [as_input(image, size) for image in images]
        compare(models, inputs, size)
        for part, programs in (("whole model", whole_model), ("mask branch", mask_branch)):
            seconds = time_in_turns(programs(models, inputs), args.rounds * len(inputs))
            print(f"\nShort side {size}, {part}, one image")
            print_ratios(seconds, STOCK)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", default=val_images_folder(), metavar="FOLDER")
    parser.add_argument("--num-images", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 800], help="short sides")
    parser.add_argument("--rounds", type=int, default=3, help="over all images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE overrides of the config")
    return parser.parse_args(argv)


def build_models(cfg: CfgNode, inputs: list[dict]) -> dict[str, nn.Module]:
    cfg.MODEL.ROI_HEADS.NAME = "TeacherStudentROIHeads"
    student = build_random_model(cfg, inputs)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    stock = build_model(cfg).eval()
    missing = copy_weights(student, stock)
    if missing:
        raise RuntimeError(f"The student lacks parameters of the stock model: {missing}.")
    return {STOCK: stock, STUDENT: student}


def whole_model(models: dict[str, nn.Module], inputs: list[dict]) -> dict[str, Callable]:
    arguments = [(batch,) for batch in batches(inputs)]
    return {
        name: on_next(torch.no_grad()(model.inference), arguments) for name, model in models.items()
    }


def mask_branch(models: dict[str, nn.Module], inputs: list[dict]) -> dict[str, Callable]:
    arguments = []
    for batch in batches(inputs):
        with torch.no_grad():
            images = models[STUDENT].preprocess_image(batch)
            features = models[STUDENT].backbone(images.tensor)
            detections = models[STUDENT].inference(batch, do_postprocess=False)
        arguments.append((features, detections))
    return {
        name: on_next(torch.no_grad()(model.roi_heads.forward_with_given_boxes), arguments)
        for name, model in models.items()
    }


def batches(inputs: list[dict]) -> list[list[dict]]:
    return [[x] for x in inputs]


def compare(models: dict[str, nn.Module], inputs: list[dict], size: int) -> None:
    """Print whether both models find the same, and how many objects."""
    count, difference, same = 0, 0.0, True
    rounding = {STOCK: 0.0, STUDENT: 0.0}
    with torch.no_grad(), exact_convolutions():
        for batch in batches(inputs):
            with last_layer_in_double(models[STOCK]) as exact:
                (stock,) = models[STOCK].inference(batch, do_postprocess=False)
            (student,) = models[STUDENT].inference(batch, do_postprocess=False)
            count += len(student)
            same = same and len(stock) == len(student)
            for field in ("pred_boxes", "pred_classes", "scores"):
                a, b = stock.get(field), student.get(field)
                a, b = (x.tensor if field == "pred_boxes" else x for x in (a, b))
                same = same and torch.equal(a, b)
            if same and len(stock) > 0:
                difference = max(difference, largest(stock.pred_masks - student.pred_masks))
                rows = torch.arange(len(stock), device=stock.pred_classes.device)
                expected = exact[0][rows, stock.pred_classes][:, None]
                for name, found in ((STOCK, stock), (STUDENT, student)):
                    error = largest(found.pred_masks.double() - expected)
                    rounding[name] = max(rounding[name], error)
    boxes = "the same" if same else "DIFFERENT"
    masks = "equal to 1e-6" if same and difference <= 1e-6 else "NOT EQUAL to 1e-6"
    print(
        f"\nShort side {size}: {count / len(inputs):.1f} detections per image; boxes, classes and "
        f"scores {boxes}; mask probabilities {masks} (largest difference {difference:.1e})"
    )
    errors = ", ".join(f"{name} {error:.1e}" for name, error in rounding.items())
    print(f"Largest difference to the last layer in double precision: {errors}")


def largest(differences: torch.Tensor) -> float:
    return differences.abs().max().item()


@contextlib.contextmanager
def last_layer_in_double(model: nn.Module):
    """Yield a list that gets the probabilities of all classes, the last sum in double precision."""
    found = []

    def compute(predictor, args, output):
        exact = nn.functional.conv2d(
            args[0].double(), predictor.weight.double(), predictor.bias.double()
        )
        found.append(exact.sigmoid())

    hook = model.roi_heads.mask_head.predictor.register_forward_hook(compute)
    try:
        yield found
    finally:
        hook.remove()


@contextlib.contextmanager
def exact_convolutions():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    raise SystemExit(main())
