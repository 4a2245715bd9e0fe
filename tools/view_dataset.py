#!/usr/bin/env python
"""Show the images and objects of a COCO json as training sees them. See --help."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path

from detectron2.config import get_cfg
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from inference.annotated_images import AnnotatedImages
from inference.setup import UsageError, check_output_dir
from pages.dataset_page import DatasetPage, choose
from pages.html_pages import check_jinja2
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file

logger = logging.getLogger("teacher_student_mask")

DESCRIPTION = """
Shows a COCO json in which any object may lack its mask, as a page for a browser.

The output folder then holds index.html, and pictures/ and crops/ that belong to it:
  classes    how many objects, masks, masks made by a model ("mask_source": "model"), boxes without
             a mask and crowds each class has, and what the checks of the json warn of
  pictures   images with their objects; filled with a solid outline: a mask; with a dotted outline:
             a mask made by a model; a dashed box: no mask; hatched: a crowd. Pointing at an object
             tells its overlap O, Eq. (1) of the paper. They can be chosen by class, kind and O
  crops      objects of each class, half with and half without a mask

With the seen classes, masks that training does not read are a thin line in a dashed box.
"""

EXAMPLES = """
examples:
  100 images, drawn at random:
    %(prog)s data/train.json --image-root data/images --output-dir output/look

  others, and the masks of unseen classes told apart:
    %(prog)s data/train.json --image-root data/images --output-dir output/look \\
        --seed 2 --max-images 300 --seen-classes "cat, dog"

  the seen classes of a training:
    %(prog)s data/train.json --image-root data/images --output-dir output/look \\
        --config-file output/mine/config.yaml

exit code: 0; 1 if images could not be read or something not be written (the page lists the former);
2 if nothing could be started: a wrong command line, or errors in the json.
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("annotations", metavar="JSON", help="in COCO's format")
    add("--image-root", required=True, metavar="DIR", help="folder of the images")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    add("--config-file", metavar="YAML", help="take DATASETS.SEEN_CLASSES from this config")
    add(
        "--seen-classes",
        metavar="SPEC",
        help='classes whose masks training reads: "voc", "nonvoc", "all", "auto", names separated '
        "by commas, or the path of a list (default: of --config-file, else all)",
    )
    add(
        "--max-images",
        type=int,
        default=100,
        metavar="N",
        help="how many pictures at most (default: %(default)s)",
    )
    add(
        "--crops-per-class",
        type=int,
        default=8,
        metavar="N",
        help="how many objects of each class at most (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another number is another choice of images and objects (default: %(default)s)",
    )
    return parser, parser.parse_args(argv)


def read_annotations(args: argparse.Namespace) -> AnnotatedImages:
    """
    Raises:
        UsageError: the arguments or the json are wrong.
    """
    if not os.path.isdir(args.image_root):
        raise UsageError(f"--image-root {args.image_root}: no such folder.")
    for option in ("max_images", "crops_per_class"):
        value = getattr(args, option)
        if value < 0:
            raise UsageError(f"--{option.replace('_', '-')} is {value}; it must be 0 or more.")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    seen_classes = args.seen_classes
    if args.config_file:
        if not os.path.isfile(args.config_file):
            raise UsageError(f"--config-file {args.config_file}: no such file.")
        try:
            merge_config_file(cfg, args.config_file)
        except (AssertionError, KeyError, ValueError) as error:
            raise UsageError(f"--config-file {args.config_file}: {error}") from error
        seen_classes = seen_classes or cfg.DATASETS.SEEN_CLASSES
    return AnnotatedImages(args.annotations, seen_classes, cfg.DATASETS.MIN_MASKS_PER_CLASS)


def show_progress(iterable, total):
    return tqdm(iterable, total=total, desc="Images", unit="image", dynamic_ncols=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    # Names in the json may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_jinja2("view_dataset.py")
        annotated = read_annotations(args)
        check_output_dir(args.output_dir)
    except UsageError as error:
        parser.error(str(error))
    annotated.report.log()
    choice = choose(annotated, args.max_images, args.crops_per_class, args.seed)
    page = DatasetPage(annotated, args.image_root, args.output_dir)
    provenance = [("annotations", args.annotations), ("images", args.image_root)]
    provenance.append(("seed", str(args.seed)))
    try:
        with logging_redirect_tqdm(loggers=[logger]):
            path = page.write(choice, args.crops_per_class, provenance, show_progress)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(class_table(annotated))
    print(f"Written: {path}")
    if page.failures:
        print(f"{len(page.failures)} images are not shown:", file=sys.stderr)
        print("\n".join(f"  {failure}" for failure in page.failures), file=sys.stderr)
        return 1
    return 0


def class_table(annotated: AnnotatedImages) -> str:
    """What the json has of each class, and in all."""
    counts = annotated.count_kinds()
    rows = []
    for name, x in [*zip(annotated.names, counts), ("all", sum(counts, Counter()))]:
        masks = x["human"] + x["model"] + x["unused"]
        rows.append([name, x.total() - x["crowd"], masks, x["model"], x["box"], x["crowd"]])
    headers = ["class", "objects", "masks", "of them by a model", "boxes only", "crowd"]
    # Names such as "1e3" are no numbers.
    return tabulate(rows, headers=headers, disable_numparse=[0])


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
