#!/usr/bin/env python
"""
Time of the whole analysis against one plain pycocotools segm evaluation of the same files.

Both are run in turns, in this process, from the two json files to the numbers. Ground truth and
detections are synthetic, by default as many as in COCO val2017: 5,000 images, 36,000 objects,
500,000 detections. "The whole analysis": all tasks, classes and overlap bins, bootstrap intervals,
overlaps, false-positive attribution; not the report file and its pictures.

With --faster-coco-eval, COCOeval_faster of that package runs as well, and its precision is compared
with pycocotools' (pip install faster-coco-eval).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from synthetic_coco import write_files
from tabulate import tabulate

from teacher_student_mask.analysis import Settings, analyze


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    programs = {
        "pycocotools": lambda gt, dt: run_coco_eval(COCO, COCOeval, gt, dt),
        "analysis": lambda gt, dt: run_analysis(gt, dt, args.resamples),
    }
    if args.faster_coco_eval:
        import faster_coco_eval

        programs["faster-coco-eval"] = lambda gt, dt: run_coco_eval(
            faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster, gt, dt
        )
    seconds = {name: [] for name in programs}
    precision = {}
    with tempfile.TemporaryDirectory() as folder:
        gt, dt = write_files(Path(folder), args.images, args.objects, args.detections)
        for _ in range(args.rounds):
            for name, program in programs.items():
                start = time.perf_counter()
                precision[name] = program(gt, dt)
                seconds[name].append(time.perf_counter() - start)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    report(seconds, precision)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36000)
    parser.add_argument("--detections", type=int, default=500000)
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faster-coco-eval", action="store_true")
    return parser.parse_args(argv)


def run_coco_eval(coco_class: type, eval_class: type, gt: str, dt: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_class(gt)
        coco_eval = eval_class(coco, coco.loadRes(dt), "segm")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    # IoU thresholds, recalls, classes, areas at 100 detections.
    return np.asarray(coco_eval.eval["precision"])[..., -1]


def run_analysis(gt: str, dt: str, resamples: int) -> float:
    analysis = analyze(
        gt,
        {"model": dt},
        seen_classes=",".join(f"class {k + 1}" for k in range(0, 80, 4)),
        settings=Settings(num_resamples=resamples),
        show_progress=False,
    )
    return analysis.summary["models"]["model"]["segm"]["AP"]


def report(seconds: dict[str, list[float]], precision: dict) -> None:
    base = seconds["pycocotools"]
    rows = []
    for name, values in seconds.items():
        ratios = [value / b for value, b in zip(values, base)]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        rows.append([name, statistics.median(values), statistics.median(ratios), spread])
    print(tabulate(rows, ["", "median s", "ratio", "min - max"], floatfmt=".2f"))
    reference = precision["pycocotools"][:, :, :, 0]
    ap = 100 * reference[reference > -1].mean()
    print(f"AP of pycocotools {ap:.10f}, of the analysis {precision['analysis']:.10f}")
    if "faster-coco-eval" in precision:
        difference = np.abs(precision["faster-coco-eval"] - precision["pycocotools"]).max()
        print(f"largest difference in precision of faster-coco-eval: {difference:.1e}")
    print(f"{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}")


if __name__ == "__main__":
    raise SystemExit(main())
