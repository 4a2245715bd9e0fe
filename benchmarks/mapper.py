#!/usr/bin/env python
"""
Time of TeacherStudentDatasetMapper against Detectron2's DatasetMapper.

Both map the same dataset dicts of Detectron2's own loader to training examples, in one process:
read the image, flip, resize it to the recipe's sizes, transform polygons; in one round both draw
the same augmentations. The stock mapper keeps all masks as polygons. Ours forgets those of the
classes that are not VOC's, writes which objects have one, and draws the union of the masks.
"""

from __future__ import annotations

import argparse

import numpy as np
from detectron2.data import DatasetCatalog, DatasetMapper
from models import make_cfg
from paired import Programs, main, on_next

from teacher_student_mask import TeacherStudentDatasetMapper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="coco_2017_val", help="(%(default)s)")
    parser.add_argument("--images", type=int, default=60, help="of a round (%(default)s)")


def make_programs(args: argparse.Namespace) -> Programs:
    cfg = make_cfg("teacher_student", argparse.Namespace(device="cpu", opts=[]))
    cfg.DATASETS.TRAIN = (args.dataset,)
    dicts = [x for x in DatasetCatalog.get(args.dataset) if x["annotations"]]
    dicts = dicts[:: max(1, len(dicts) // args.images)][: args.images]

    def map_all(mapper, seed: int) -> None:
        np.random.seed(seed)  # Detectron2 augments with numpy's global generator
        for x in dicts:
            mapper(x)

    mappers = {"DatasetMapper": DatasetMapper, "ours": TeacherStudentDatasetMapper}
    return {
        name: on_next(map_all, list(zip([mapper(cfg, True)] * 100, range(100))))
        for name, mapper in mappers.items()
    }


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=10))
