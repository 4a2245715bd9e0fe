#!/usr/bin/env python
"""Check a COCO json, and its images, before training with them. See --help."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

from teacher_student_mask.checks.annotation_checks import MIN_MASKS_PER_CLASS, check_annotations
from teacher_student_mask.checks.annotation_report import AnnotationReport
from teacher_student_mask.engine import WriteError, open_atomically

DESCRIPTION = """
Checks a COCO json in which any object may lack its mask, and on request every image.

Printed are, for each class, how many objects have a mask or a box only, the crowds, the masks that
are just the rectangle of their box (boxes that were exported as masks?), and what training leaves
out and why; then one sentence for each kind of problem, with the first ids:
  error    training would stop, or go wrong without a word
  warning  training goes on as the sentence says
"""

EXAMPLES = """
examples:
  the json alone:
    %(prog)s instances_train.json

  with the seen classes and the model's number of classes, and whether the images are there:
    %(prog)s instances_train2017.json --image-root train2017 --seen-classes voc --num-classes 80

  and every image read to its end, by eight processes:
    %(prog)s instances_train.json --image-root train --seen-classes "cat, dog" --images --workers 8

exit code: 0 without errors (there may be warnings), 1 with errors, 2 for a wrong command line.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    # Names in the json may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    report = check_annotations(
        args.annotations,
        args.image_root,
        args.seen_classes,
        args.num_classes,
        check_images=args.images,
        progress=show_progress,
        num_workers=args.workers,
        min_masks_per_class=args.min_masks_per_class,
    )
    if args.json:
        try:
            with open_atomically(args.json) as f:
                json.dump(report.to_dict(), f, indent=2)
        except WriteError as error:
            parser.error(f"--json {args.json}: cannot be written: {error.strerror}.")
    print_report(report)
    return 1 if report.errors else 0


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS.json", help="in COCO's format")
    parser.add_argument("--image-root", metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--seen-classes",
        metavar="SPEC",
        help='classes with masks in training: "voc", "nonvoc", "all", "auto" (those with enough '
        "masks here), names separated by commas, or the path of a list (default: what holds for "
        "any)",
    )
    parser.add_argument(
        "--min-masks-per-class",
        type=int,
        default=MIN_MASKS_PER_CLASS,
        metavar="K",
        help='masks that a class needs for --seen-classes "auto", DATASETS.MIN_MASKS_PER_CLASS '
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="the model's MODEL.ROI_HEADS.NUM_CLASSES"
    )
    parser.add_argument(
        "--images", action="store_true", help="read every image of --image-root to its end"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that read images (default: one a core, here %(default)s)",
    )
    parser.add_argument("--json", metavar="OUT", help="write table and findings to this file, too")
    parser.add_argument("--force", action="store_true", help="replace an OUT that exists")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.annotations):
        parser.error(f"{args.annotations}: no such file.")
    if args.image_root and not os.path.isdir(args.image_root):
        parser.error(f"--image-root {args.image_root}: no such folder.")
    if args.images and not args.image_root:
        parser.error("--images needs --image-root.")
    if args.json and os.path.lexists(args.json):
        if os.path.exists(args.json) and os.path.samefile(args.annotations, args.json):
            parser.error(
                f"--json {args.json}: the annotations themselves; they are never replaced."
            )
        if not args.force:
            parser.error(f"--json {args.json}: exists; --force replaces it.")
    for option in ("workers", "num_classes", "min_masks_per_class"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} is {value}; it must be 1 or more.")
    return parser, args


def show_progress(iterable: Iterable, total: int) -> Iterable:
    return tqdm(iterable, total=total, desc="Images", unit="image", dynamic_ncols=True)


def print_report(report: AnnotationReport) -> None:
    """The table of the classes, the sentences, and how many there are."""
    if report.classes:
        print(report.class_table())
        print(f"\n{report.num_images} images, {report.num_annotations} annotations")
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    print(f"{len(report.errors)} kinds of errors, {len(report.warnings)} kinds of warnings")


if __name__ == "__main__":
    sys.exit(main())
