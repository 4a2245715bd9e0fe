#!/usr/bin/env python
"""
Time of TeacherStudentDatasetMapper against Detectron2's DatasetMapper.

Both map the same dataset dict of Detectron2's own loader to a training example, in one process, one
image a round: read it, flip, resize it to the recipe's sizes, transform polygons; in one round both
draw the same augmentations. The stock mapper keeps all masks as polygons. Ours forgets those of the
classes that are not VOC's, writes which objects have one, and draws the union of the masks.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np
from detectron2.data import DatasetCatalog, DatasetMapper
from models import make_cfg
from paired import Programs, main, on_next

from teacher_student_mask import TeacherStudentDatasetMapper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", default="coco_2017_val", help="(%(default)s)")


def make_programs(args: argparse.Namespace) -> Programs:
    cfg = make_cfg("teacher_student", argparse.Namespace(device="cpu", opts=[]))
    cfg.DATASETS.TRAIN = (args.dataset,)
    dicts = [x for x in DatasetCatalog.get(args.dataset) if x["annotations"]]

    def map_one(mapper, dataset_dict: dict, seeds: Iterator[int]) -> None:
        np.random.seed(next(seeds))  # Detectron2 augments with numpy's global generator
        mapper(dataset_dict)

    mappers = {"DatasetMapper": DatasetMapper, "ours": TeacherStudentDatasetMapper}
    programs = {}
    for name, mapper_class in mappers.items():
        mapper, seeds = mapper_class(cfg, True), itertools.count()
        programs[name] = on_next(map_one, [(mapper, x, seeds) for x in dicts])
    return programs


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=400))
