#!/usr/bin/env python
"""
Time of this project's COCO evaluator against one pycocotools pass over the same detections.

Ground truth and detections are drawn at random, by default as many as in COCO val2017 with up to
100 detections per image. Each program starts from the two json files and ends with the numbers:

  pycocotools   COCO, loadRes, then COCOeval "bbox" and "segm"
  Detectron2    COCOEvaluator with the tasks bbox and segm: the same, with its compiled matching
                where it is built, and AP per class
  ours          PartiallySupervisedCOCOEvaluator: the same, and the overlap of every object, Eq. (1)
                of the paper, segm_seen, segm_unseen, segm_unseen_overlap and ten overlap bins

The printed numbers are AP of masks, which must be equal.
"""

import argparse
import contextlib
import io
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from paired import Programs, main
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask import PartiallySupervisedCOCOEvaluator

DATASET, HEIGHT, WIDTH, NUM_CLASSES = "benchmark_evaluation", 480, 640, 80
SEEN_CLASSES = [f"class {k + 1}" for k in range(0, NUM_CLASSES, 4)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--objects", type=int, default=36000, help="(%(default)s)")
    parser.add_argument("--detections", type=int, default=500000, help="(%(default)s)")


def make_programs(args: argparse.Namespace) -> Programs:
    logging.disable(logging.WARNING)
    folder = tempfile.TemporaryDirectory()
    gt, dt = (str(Path(folder.name, name)) for name in ("gt.json", "dt.json"))
    truth = draw_ground_truth(args.images, args.objects)
    Path(gt).write_text(json.dumps(truth))
    Path(dt).write_text(json.dumps(draw_detections(truth, args.detections)))
    register_coco_instances(DATASET, {}, gt, folder.name)
    DatasetCatalog.get(DATASET)  # learns the classes

    def evaluate(make_evaluator) -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = make_evaluator()
            evaluator.reset()
            # Of the folder, which is removed with the programs.
            detections = json.loads(Path(folder.name, "dt.json").read_text())
            for x in detections:
                x["category_id"] -= 1  # process() stores contiguous ids
            evaluator._predictions = [{"image_id": None, "instances": detections}]
            return evaluator.evaluate()["segm"]["AP"]

    def pycocotools() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(gt)
            detections = coco.loadRes(dt)
            for task in ("bbox", "segm"):
                coco_eval = COCOeval(coco, detections, task)
                coco_eval.evaluate()
                coco_eval.accumulate()
                coco_eval.summarize()
        return 100 * float(coco_eval.stats[0])

    settings = {"tasks": ("bbox", "segm"), "distributed": False}
    subsets = {"seen_classes": ",".join(SEEN_CLASSES)}
    subsets["overlap_bin_edges"] = [k / 10 for k in range(11)]
    return {
        "pycocotools": pycocotools,
        "Detectron2": lambda: evaluate(lambda: COCOEvaluator(DATASET, **settings)),
        "ours": lambda: evaluate(
            lambda: PartiallySupervisedCOCOEvaluator(DATASET, **settings, **subsets)
        ),
    }


def draw_ground_truth(num_images: int, num_objects: int) -> dict:
    """A COCO json of objects as many per image and as large as COCO's on average."""
    rng = np.random.default_rng(0)
    # Like COCO's: few frequent classes, many rare ones, and few classes in one image.
    frequency = 1 / np.arange(1, NUM_CLASSES + 1)
    palettes = rng.choice(NUM_CLASSES, size=(num_images, 4), p=frequency / frequency.sum())
    annotations = []
    for k, image in enumerate(np.sort(rng.integers(num_images, size=num_objects))):
        centre, radius = rng.uniform(0, [WIDTH, HEIGHT]), np.exp(rng.normal(3.6, 0.8))
        annotations.append(
            {
                "id": k + 1,
                "image_id": int(image) + 1,
                "category_id": int(palettes[image, rng.integers(4)]) + 1,
                "iscrowd": 0,
                **_shape(star(rng, centre, radius)),
            }
        )
    images = [
        {"id": i + 1, "height": HEIGHT, "width": WIDTH, "file_name": f"{i + 1}.jpg"}
        for i in range(num_images)
    ]
    categories = [{"id": i + 1, "name": f"class {i + 1}"} for i in range(NUM_CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_detections(truth: dict, num_detections: int) -> list[dict]:
    """A COCO result: every object found once, distorted, and false ones of the image's classes."""
    rng = np.random.default_rng(1)
    objects = truth["annotations"]
    detections = []
    for k in range(num_detections):
        x = objects[k % len(objects)]
        box = np.array(x["bbox"])
        centre, radius = box[:2] + box[2:] / 2, box[2:].mean() / 1.8
        is_true = k < len(objects)
        if not is_true:
            centre, radius = centre + rng.normal(0, 60, 2), np.exp(rng.normal(3.6, 0.8))
        shape = _shape(star(rng, np.clip(centre, 0, [WIDTH, HEIGHT]), radius))
        score = float(rng.beta(4, 2) if is_true else rng.beta(1, 6))
        detections.append(
            {"image_id": x["image_id"], "category_id": x["category_id"], "score": score, **shape}
        )
    return detections


def star(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    """An outline with waves, shape (24, 2): as many runs as a pasted 28 x 28 mask has."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radii = radius * rng.uniform(0.6, 1.2, len(angles))
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # An object in a corner could be cut to nothing.
    points[::8] = centre + [[-2, -2], [2, -2], [2, 2]]
    return np.clip(points, 0, [WIDTH, HEIGHT])


def _shape(points: np.ndarray) -> dict:
    rle = mask_util.merge(mask_util.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH))
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(mask_util.area(rle)),
    }


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=3))
