#!/usr/bin/env python
"""
Time, and memory at the peak, of reading and checking a COCO json.

The file is synthetic, by default as large as COCO's train2017: 118,000 images and 860,000 objects
whose polygons have 25 points. Each program begins with the json file:

  json.load            Python's own reader
  reading              read_json of this project
  checks               reading, and the checks of a training for its seen classes: every finding,
                       and the counts of the classes; images are not looked for

The memory, in MiB, is what a process of its own needs beyond that of its imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from paired import Programs, main

try:
    from teacher_student_mask.coco_json import check_coco, read_json
except ImportError:  # a checkout of an older commit
    from teacher_student_mask.checks.annotation_checks import check_annotations
    from teacher_student_mask.checks.reading import read_json

    def check_coco(path, seen_classes, num_classes):
        return check_annotations(path, None, seen_classes, num_classes)


HEIGHT, WIDTH, NUM_CLASSES = 480, 640, 80
SEEN_CLASSES = ",".join(f"class {k + 1}" for k in range(0, NUM_CLASSES, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=118_000, help="(%(default)s)")
    parser.add_argument("--objects", type=int, default=860_000, help="(%(default)s)")
    parser.add_argument("--points", type=int, default=25, help="of each polygon (%(default)s)")


def make_programs(args: argparse.Namespace) -> Programs:
    name = f"tsm_{args.images}_{args.objects}_{args.points}.json"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():  # the processes of two checkouts share it
        write_file(path, args.images, args.objects, args.points)
    programs = {"json.load": load, "reading": read_json, "checks": check}
    return {
        name: lambda program=program: peak_memory(program, path)
        for name, program in programs.items()
    }


def peak_memory(program: Callable[[Path], object], path: Path) -> float:
    """MiB that a process of its own has at most while it runs a program."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_measure, (program, path))


def _measure(program: Callable[[Path], object], path: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program(path)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def load(path: Path) -> object:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def check(path: Path) -> object:
    return check_coco(path, seen_classes=SEEN_CLASSES, num_classes=NUM_CLASSES)


def write_file(path: Path, num_images: int, num_objects: int, num_points: int) -> None:
    """Write a COCO json of star-shaped objects, in which the checks find nothing."""
    rng = np.random.default_rng(0)
    images = [
        {"id": i + 1, "file_name": f"{i + 1:012d}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(num_images)
    ]
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(NUM_CLASSES)]
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as f:
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
    unfinished.rename(path)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=3))
