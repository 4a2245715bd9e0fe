#!/usr/bin/env python
"""
Dense CRF: time per ROI of the backend "torch" against pydensecrf, and how far they agree.

Both refine the same ROIs with the same settings, the default ones of MODEL.PSEUDO_MASK.CRF, called
as training calls them: probabilities and colours in tensors, probabilities back. They run in turns,
in this process, with all threads that torch takes; pydensecrf has no use for more than one. With a
GPU, "torch" also runs there, on inputs that are already on it, while pydensecrf starts from the
CPU's. The batch is the ROIs of one call; a ratio below 1 is faster than pydensecrf.

The two are not the same function: pydensecrf approximates the Gaussian kernels on a lattice. How
much this matters is measured on every non-crowd object of the annotations: the ROI is the object's
box, the probabilities are its true mask, blurred over 5 x 5 cells and with noise added to the
logits, coarse like a wrong teacher and fine. "agreement" is the share of cells with the same label
at 0.5; the IoU with the true mask, before and after, says which of them helps.

COCO val2017 below $DETECTRON2_DATASETS; without it, drawn shapes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import BitMasks, Boxes
from paired import describe_machine, ratios_to, time_in_turns
from pycocotools.coco import COCO
from tabulate import tabulate
from torch.nn import functional as F
from tqdm import tqdm

from teacher_student_mask.data.shapes import generate_shapes
from teacher_student_mask.modeling import DenseCRF
from teacher_student_mask.modeling.mask_targets import crop_pixels

# Boxes with a side under a pixel have no crop.
MIN_BOX_SIDE = 1.0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        annotations, images, source = find_dataset(folder, args.objects)
        rois, truth = read_rois(annotations, images, args.objects, args.side)
    probs = distort(truth)
    print(f"{len(rois)} objects of {source}, {args.side} x {args.side} cells")
    print_agreement(probs, rois, truth)
    print_times(probs, rois, args.batch_sizes, args.rounds)
    print(describe_machine())
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128], help="ROIs of one call"
    )
    parser.add_argument("--rounds", type=int, default=15, help="calls of each backend and size")
    parser.add_argument("--objects", type=int, default=None, help="only so many (default: all)")
    parser.add_argument("--side", type=int, default=28, help="of the grid, in cells")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    return parser.parse_args(argv)


def find_dataset(folder: str, num_objects: int | None) -> tuple[str, str, str]:
    """Path of the annotations, folder of the images, and what they are."""
    root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "coco")
    annotations = os.path.join(root, "annotations", "instances_val2017.json")
    if os.path.isfile(annotations):
        return annotations, os.path.join(root, "val2017"), f"COCO ({annotations})"
    # Two or more objects an image.
    generate_shapes(folder, num_train=0, num_val=min(num_objects or 200, 200))
    annotations = os.path.join(folder, "annotations", "instances_val.json")
    source = f"DRAWN images: there is no {root}/annotations/instances_val2017.json"
    return annotations, os.path.join(folder, "val"), source


def read_rois(
    annotations: str, images: str, num_objects: int | None, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cut objects out of their images.

    Returns:
        RGB in 0-255, shape (R, 3, side, side), and how much of each cell is object, in [0, 1],
        shape (R, side, side).
    """
    coco = COCO(annotations)
    rois, truth, num_read = [], [], 0
    for image_id in tqdm(sorted(coco.imgs), desc="Reading", unit="image"):
        objects = [
            x
            for x in coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
            if min(x["bbox"][2:]) >= MIN_BOX_SIDE
        ][: None if num_objects is None else num_objects - num_read]
        if not objects:
            continue
        image = coco.imgs[image_id]
        pixels = read_image(os.path.join(images, image["file_name"]), format="RGB")
        pixels = torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))[None]
        left_top, size = torch.tensor([x["bbox"] for x in objects]).split(2, dim=1)
        boxes = torch.cat([left_top, left_top + size], dim=1)
        masks = BitMasks(torch.as_tensor(np.stack([coco.annToMask(x) for x in objects])))
        rois.append(crop_pixels(pixels, [Boxes(boxes)], side))
        # One mask per box; crop_and_resize of BitMasks would make them binary.
        truth += [
            crop_pixels(mask[None, None].float(), [Boxes(box[None])], side)[:, 0]
            for mask, box in zip(masks.tensor, boxes)
        ]
        num_read += len(objects)
    return torch.cat(rois), torch.cat(truth)


def distort(truth: torch.Tensor) -> torch.Tensor:
    """What a teacher might say: probabilities, shape (R, M, M)."""
    blurred = F.avg_pool2d(truth[:, None], 5, stride=1, padding=2, count_include_pad=False)
    coarse = F.interpolate(torch.randn(len(truth), 1, 7, 7), size=truth.shape[1:], mode="bilinear")
    noise = 1.5 * coarse + 0.5 * torch.randn_like(blurred)
    return (8 * (blurred - 0.5) + noise).sigmoid()[:, 0]


def print_agreement(probs: torch.Tensor, rois: torch.Tensor, truth: torch.Tensor) -> None:
    refined = {
        name: torch.cat(
            [
                DenseCRF(backend=name)(*part)
                for part in tqdm(list(zip(probs.split(32), rois.split(32))), desc=name)
            ]
        )
        for name in ("pydensecrf", "torch")
    }
    same = ((refined["torch"] >= 0.5) == (refined["pydensecrf"] >= 0.5)).float().mean(dim=(1, 2))
    difference = (refined["torch"] - refined["pydensecrf"]).abs().mean(dim=(1, 2))
    quantiles = torch.tensor([0.05, 0.5])
    rows = [
        ["agreement", same.mean(), *same.quantile(quantiles)],
        ["mean abs. difference", difference.mean(), *difference.quantile(1 - quantiles)],
    ]
    for name, values in {"distorted": probs, **refined}.items():
        ious = mask_ious(values >= 0.5, truth >= 0.5)
        rows.append([f"IoU with the true mask, {name}", ious.mean(), *ious.quantile(quantiles)])
    rows = [[name, *map(float, values)] for name, *values in rows]
    print(tabulate(rows, ["", "mean", "worst 5 %", "median"], floatfmt=".4f"))


def mask_ious(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    unions = (masks | truth).sum(dim=(1, 2))
    return (masks & truth).sum(dim=(1, 2)) / unions.clamp(min=1)


def print_times(
    probs: torch.Tensor, rois: torch.Tensor, batch_sizes: list[int], rounds: int
) -> None:
    rows = []
    for batch_size in batch_sizes:
        # Small data sets are repeated.
        picked = torch.arange(batch_size) % len(probs)
        inputs = (probs[picked], rois[picked])
        programs = {
            "pydensecrf": call(DenseCRF(backend="pydensecrf"), *inputs),
            "torch, CPU": call(DenseCRF(backend="torch"), *inputs),
        }
        if torch.cuda.is_available():
            inputs = [x.cuda() for x in inputs]
            programs["torch, GPU"] = call(DenseCRF(backend="torch"), *inputs)
        seconds = time_in_turns(programs, rounds)
        for name, ratios in ratios_to(seconds, "pydensecrf").items():
            low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            rows.append(
                [
                    batch_size,
                    name,
                    f"{1000 * statistics.median(seconds[name]) / batch_size:.2f}",
                    f"{statistics.median(ratios):.3f}",
                    f"{low:.3f} - {high:.3f}",
                ]
            )
    header = ["ROIs", "", "median ms/ROI", "ratio", "quartiles"]
    print(tabulate(rows, header, disable_numparse=True))
    print(f"{rounds} rounds in turns; the ratio is the median of the rounds' ratios to pydensecrf")


def call(crf: DenseCRF, probs: torch.Tensor, rois: torch.Tensor):
    return lambda: crf(probs, rois)


if __name__ == "__main__":
    raise SystemExit(main())
