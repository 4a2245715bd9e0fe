#!/usr/bin/env python
"""
Time, and memory at the peak, of reading and checking a COCO json.

The file is synthetic, by default as large as COCO's train2017: 118,000 images and 860,000 objects
whose polygons have 24 points. Each program begins with the json file:

  json.load            Python's own reader
  reading              read_json of this project
  checks               reading, and the checks of a training for its seen classes: every finding,
                       and the counts of the classes; images are not looked for

The memory, in MiB, is what a process of its own needs beyond that of its imports.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evaluation import HEIGHT, NUM_CLASSES, WIDTH, star
from paired import Programs, main

from teacher_student_mask.coco_json import check_coco, read_json

SEEN_CLASSES = ",".join(f"class {k + 1}" for k in range(0, NUM_CLASSES, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=118_000, help="(%(default)s)")
    parser.add_argument("--objects", type=int, default=860_000, help="(%(default)s)")


def make_programs(args: argparse.Namespace) -> Programs:
    path = Path(tempfile.gettempdir(), f"tsm_{args.images}_{args.objects}.json")
    if not path.exists():  # the processes of two checkouts share it
        write_file(path, args.images, args.objects)
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
    return json.loads(path.read_bytes())


def check(path: Path) -> object:
    return check_coco(path, seen_classes=SEEN_CLASSES, num_classes=NUM_CLASSES)


def write_file(path: Path, num_images: int, num_objects: int) -> None:
    """Write a COCO json of star-shaped objects, in which the checks find nothing."""
    rng = np.random.default_rng(0)
    images = [
        {"id": i + 1, "file_name": f"{i + 1}.jpg", "height": HEIGHT, "width": WIDTH}
        for i in range(num_images)
    ]
    categories = [{"id": k + 1, "name": f"class {k + 1}"} for k in range(NUM_CLASSES)]
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", encoding="utf-8") as f:
        # An object at a time: all of them would fill gigabytes.
        f.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, ')
        f.write('"annotations": [')
        for k in range(num_objects):
            centre, radius = rng.uniform(70, [WIDTH - 70, HEIGHT - 70]), rng.uniform(10, 50)
            shape = star(rng, centre, radius).round(2)
            low, high = shape.min(axis=0), shape.max(axis=0)
            row = {
                "id": k + 1,
                "image_id": int(rng.integers(num_images)) + 1,
                "category_id": int(rng.integers(NUM_CLASSES)) + 1,
                "segmentation": [shape.ravel().tolist()],
                "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                "area": float((high - low).prod()),
                "iscrowd": 0,
            }
            f.write((", " if k else "") + json.dumps(row))
        f.write("]}")
    unfinished.rename(path)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=3))
