#!/usr/bin/env python
"""
Time of post-processing the teacher's masks, method by method, without the mask heads.

All methods get the same probabilities of teacher and student and the same boxes, in turns, with all
threads that torch takes; cleaning (CLIP_TO_BOX) included. The whole training step takes seconds on
a CPU and varies by more than this costs, so training_step.py cannot tell the methods apart. For CRF
see dense_crf.py.
"""

from __future__ import annotations

import argparse
import functools

import torch
from paired import print_ratios, time_in_turns

from teacher_student_mask.modeling.pseudo_masks import generate_pseudo_masks

BASELINE = "threshold"
METHODS = (BASELINE, "interact", "none", "box_fit")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rois", type=int, default=64, help="without a mask, in a step (default: %(default)s)")
    add("--side", type=int, default=28, help="cells of a mask (default: %(default)s)")
    add("--rounds", type=int, default=200, help="(default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    shape = (args.rois, args.side, args.side)
    teacher, student = (torch.rand(shape, device=args.device) for _ in range(2))
    boxes = torch.rand(args.rois, 4, device=args.device).mul(200)
    boxes[:, 2:] += boxes[:, :2] + 10
    shift = 0.1 * torch.rand_like(boxes) * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    programs = {
        method: functools.partial(
            generate_pseudo_masks,
            teacher,
            student,
            method=method,
            roi_boxes=boxes + shift,
            gt_boxes=boxes,
        )
        for method in METHODS
    }
    print(f"{args.rois} ROIs of {args.side}x{args.side} cells")
    print_ratios(time_in_turns(programs, args.rounds), BASELINE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
