#!/usr/bin/env python
"""
Time of the checks of annotations against reading the same file with pycocotools.

The file is synthetic, by default as large as COCO's train2017: 118,000 images and 860,000 objects
whose polygons have 25 points. Each program begins with the json file:

  pycocotools          json.load, and COCO's index
  reading              read_json of this project: json.load without garbage collection
  checks               reading, and check_annotations for the seen classes: every finding, and the
                       counts of the classes; images are not looked for
  checks, two purposes as a start of train_net.py for a file in DATASETS.TRAIN and DATASETS.TEST:
                       read once, checked for training and for evaluation

The findings are counted at the end: a synthetic file has none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
from paired import print_ratios, time_in_turns
from pycocotools.coco import COCO

from teacher_student_mask.checks.annotation_checks import check_annotations
from teacher_student_mask.checks.evaluation_checks import check_for_evaluation
from teacher_student_mask.checks.reading import read_json

BASELINE = "pycocotools"
HEIGHT, WIDTH, NUM_CLASSES = 480, 640, 80
SEEN_CLASSES = ",".join(f"class {k + 1}" for k in range(0, NUM_CLASSES, 4))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.disable(logging.WARNING)
    num_findings = {}

    def check(path: str) -> None:
        num_findings["training"] = len(check_annotations(path, None, SEEN_CLASSES, 80).findings)

    def check_twice(path: str) -> None:
        data = read_json(path)
        check_annotations(path, None, SEEN_CLASSES, 80, data=data)
        num_findings["evaluation"] = len(check_for_evaluation(path, data).findings)

    with tempfile.TemporaryDirectory() as folder:
        path = write_file(Path(folder), args.images, args.objects, args.points)
        programs = {
            BASELINE: lambda: index(path),
            "reading": lambda: read_json(path),
            "checks": lambda: check(path),
            "checks, two purposes": lambda: check_twice(path),
        }
        if args.profile:
            profile(lambda: check_annotations(path, None, SEEN_CLASSES, data=read_json(path)))
        seconds = time_in_turns(programs, args.rounds, warmup=args.warmup)
    print_ratios(seconds, BASELINE)
    print(f"{args.images} images, {args.objects} objects; findings: {num_findings}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--points", type=int, default=25, help="of each polygon")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="rounds that do not count")
    parser.add_argument("--profile", action="store_true", help="print where the checks spend time")
    return parser.parse_args(argv)


def index(path: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(path)


def profile(function) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(function)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


def write_file(folder: Path, num_images: int, num_objects: int, num_points: int) -> str:
    """Write a COCO json of star-shaped objects and return its path."""
    rng = np.random.default_rng(0)
    path = folder / "annotations.json"
    images = [
        {"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(num_images)
    ]
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(NUM_CLASSES)]
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    with open(path, "w", encoding="utf-8") as f:
        # An object at a time: all of them would fill gigabytes.
        f.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, ')
        f.write('"annotations": [')
        for k in range(num_objects):
            radii = rng.uniform(10, 60) * rng.uniform(0.7, 1, (num_points, 1))
            polygon = (rng.uniform(60, [WIDTH - 60, HEIGHT - 60]) + radii * circle).round(2)
            low, high = polygon.min(axis=0), polygon.max(axis=0)
            row = {
                "id": k + 1,
                "image_id": int(rng.integers(num_images)) + 1,
                "category_id": int(rng.integers(NUM_CLASSES)) + 1,
                "segmentation": [polygon.ravel().tolist()],
                "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                "area": float((high - low).prod()),
                "iscrowd": 0,
            }
            f.write((", " if k else "") + json.dumps(row))
        f.write("]}")
    return str(path)


if __name__ == "__main__":
    raise SystemExit(main())
