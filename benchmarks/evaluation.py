#!/usr/bin/env python
"""
Time of this project's COCO evaluator against one pycocotools pass over the same detections.

Ground truth and detections are synthetic, by default as many as in COCO val2017 with up to 100
detections per image. Each program starts from the two json files and ends with the numbers:

  pycocotools          COCO, loadRes, then COCOeval "bbox" and "segm"
  Detectron2           COCOEvaluator.evaluate with the tasks bbox and segm: the same, with its
                       compiled matching where it is built, and AP per class
  this project         PartiallySupervisedCOCOEvaluator.evaluate: the same, and the overlap of every
                       object, Eq. (1) of the paper, and segm_seen, segm_unseen,
                       segm_unseen_overlap and ten overlap bins, all from one matching of masks
  this project, pure   the same without Detectron2's compiled matching

Inference is not part of it: the evaluators get the detections as their process method stores them.
AP of masks is compared at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from paired import print_ratios, time_in_turns
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from synthetic_coco import write_files

from teacher_student_mask import PartiallySupervisedCOCOEvaluator

BASELINE = "pycocotools"
DATASET = "benchmark_evaluation"
TASKS = ("bbox", "segm")
SEEN_CLASSES = ",".join(f"class {k + 1}" for k in range(0, 80, 4))
OVERLAP_BINS = [k / 10 for k in range(11)]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        gt, dt = write_files(Path(folder), args.images, args.objects, args.detections)
        register_coco_instances(DATASET, {}, gt, folder)
        DatasetCatalog.get(DATASET)  # learns the classes
        results = {}
        evaluators = {
            "Detectron2": make_stock_evaluator,
            "this project": lambda: make_evaluator(use_fast_impl=None),
            "this project, pure": lambda: make_evaluator(use_fast_impl=False),
        }
        programs = {BASELINE: lambda: results.update({BASELINE: run_pycocotools(gt, dt)})}
        for name, make in evaluators.items():
            programs[name] = lambda name=name, make=make: results.update(
                {name: run_evaluator(make, dt)}
            )
        seconds = time_in_turns(programs, args.rounds, warmup=args.warmup)
    print_ratios(seconds, BASELINE)
    for name, ap in results.items():
        print(f"AP of masks, {name}: {ap:.8f}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36000)
    parser.add_argument("--detections", type=int, default=500000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="rounds that do not count")
    return parser.parse_args(argv)


def run_pycocotools(gt: str, dt: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(gt)
        detections = coco.loadRes(dt)
        for task in TASKS:
            coco_eval = COCOeval(coco, detections, task)
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
    return 100 * coco_eval.stats[0]


def make_stock_evaluator() -> COCOEvaluator:
    return COCOEvaluator(DATASET, TASKS, distributed=False)


def make_evaluator(use_fast_impl: bool | None) -> COCOEvaluator:
    return PartiallySupervisedCOCOEvaluator(
        DATASET,
        TASKS,
        distributed=False,
        seen_classes=SEEN_CLASSES,
        overlap_bin_edges=OVERLAP_BINS,
        use_fast_impl=use_fast_impl,
    )


def run_evaluator(make: Callable[[], COCOEvaluator], dt: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = make()
        evaluator.reset()
        with open(dt, encoding="utf-8") as f:
            detections = json.load(f)
        for x in detections:
            x["category_id"] -= 1  # process() stores contiguous ids
        evaluator._predictions = [{"image_id": None, "instances": detections}]
        return evaluator.evaluate()["segm"]["AP"]


if __name__ == "__main__":
    raise SystemExit(main())
