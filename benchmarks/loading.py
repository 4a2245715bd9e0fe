#!/usr/bin/env python
"""
Throughput of TeacherStudentDatasetMapper against Detectron2's DatasetMapper.

Both map the same dataset dicts of Detectron2's own loader to training examples, in one process:
read the image, flip, resize it to the recipe's sizes, transform polygons. In one round both draw
the same augmentations. The stock mapper keeps all masks as polygons. Ours forgets those of the
classes that are not VOC's, writes which objects have one, and draws the union of the masks at the
size of the image. Images and boxes of both are compared before the timing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from coco_data import read_dataset
from detectron2.data import DatasetMapper
from models import make_cfg
from paired import print_ratios, time_in_turns

from teacher_student_mask import TeacherStudentDatasetMapper

STOCK, OURS = "DatasetMapper", "TeacherStudentDatasetMapper"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    cfg = make_cfg("cpu", args.opts)
    cfg.DATASETS.TRAIN = (args.dataset,)
    mappers = {
        STOCK: DatasetMapper(cfg, True),
        OURS: TeacherStudentDatasetMapper(cfg, True),
    }
    with tempfile.TemporaryDirectory() as folder:
        dicts, source = read_dataset(args.dataset, args.images, folder)
        objects = sum(len(x["annotations"]) for x in dicts)
        print(f"{source}; {objects} objects")
        compare(mappers, dicts)
        programs = {name: over_all(mapper, dicts) for name, mapper in mappers.items()}
        seconds = time_in_turns(programs, args.rounds)
    print_ratios(seconds, STOCK)
    for name, values in seconds.items():
        print(f"{name}: {len(dicts) / statistics.median(values):.1f} images/s")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="coco_2017_train", help="synthetic if it is not there")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10, help="over all images")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE overrides of the config")
    return parser.parse_args(argv)


def over_all(mapper: Callable[[dict], dict], dicts: list[dict]) -> Callable[[], None]:
    seeds = itertools.count()

    def call():
        # Detectron2 augments with numpy's global generator.
        np.random.seed(next(seeds))
        for x in dicts:
            mapper(x)

    return call


def compare(mappers: dict[str, Callable[[dict], dict]], dicts: list[dict]) -> None:
    num_different = 0
    for seed, x in enumerate(dicts):
        examples = []
        for mapper in mappers.values():
            np.random.seed(seed)
            examples.append(mapper(x))
        a, b = examples
        is_same = torch.equal(a["image"], b["image"]) and torch.equal(
            a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor
        )
        num_different += not is_same
    print(f"images and boxes differ in {num_different} of {len(dicts)} examples")


if __name__ == "__main__":
    raise SystemExit(main())
