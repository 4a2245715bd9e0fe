#!/usr/bin/env python
"""Write the demo dataset "shapes", of any size. See --help."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections import Counter

from detectron2.utils.logger import setup_logger
from pycocotools.coco import COCO
from tabulate import tabulate
from tqdm import tqdm

from teacher_student_mask import compute_overlaps
from teacher_student_mask.data.shapes import (
    SHAPES_CLASSES,
    SHAPES_SEEN_CLASSES,
    generate_shapes,
)

OVERLAP_THRESHOLD = 0.3

DESCRIPTION = """
Writes "shapes", a small procedural dataset in COCO's format: images with heaps of objects that are
told apart by their shape alone. All objects have masks; which of them training may use is the
config's DATASETS.SEEN_CLASSES. The same arguments always give the same files.
"""

EXAMPLES = """
examples:
  %(prog)s                                             datasets/shapes, as the demo uses it
  %(prog)s --num-train 5000 --num-val 500              more of it
  %(prog)s --output-dir large/shapes --image-size 256  larger images, elsewhere
  %(prog)s --seed 1 --force                            other images, in their place
  %(prog)s --flat --output-dir data --num-train 30 --num-val 10
                                                       data/images, data/train.json, data/val.json

use:
  DETECTRON2_DATASETS=<parent of the folder shapes> python train_net.py \\
      --config-file configs/shapes/teacher_student_box_fit.yaml
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", default="datasets/shapes", metavar="DIR", help="(default: %(default)s)")
    add("--num-train", type=int, default=800, metavar="N", help="images (default: %(default)s)")
    add("--num-val", type=int, default=200, metavar="N", help="images (default: %(default)s)")
    add("--image-size", type=int, default=96, metavar="N", help="pixels (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    add("--flat", action="store_true", help="train.json, val.json, and all images in images/")
    add("--force", action="store_true", help="write over annotations that are there")
    return parser, parser.parse_args(argv)


def load_coco(path: str) -> COCO:
    """Read annotations without pycocotools' prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def describe(splits: dict[str, COCO]) -> str:
    """A table with a column for each split: images, objects, share of overlapped ones, classes."""
    columns = []
    for coco in splits.values():
        overlaps = compute_overlaps(coco).values()
        share = sum(o >= OVERLAP_THRESHOLD for o in overlaps) / max(1, len(overlaps))
        names = {category["id"]: category["name"] for category in coco.cats.values()}
        counts = Counter(names[annotation["category_id"]] for annotation in coco.anns.values())
        columns.append(
            [len(coco.imgs), len(coco.anns), f"{100 * share:.1f} %"]
            + [counts[name] for name in SHAPES_CLASSES]
        )
    labels = ["images", "objects", f"  with O >= {OVERLAP_THRESHOLD}"]
    for name in SHAPES_CLASSES:
        labels.append(f"  {name}" + ("" if name in SHAPES_SEEN_CLASSES else " (unseen)"))
    return tabulate(
        list(zip(labels, *columns)),
        headers=["", *splits],
        colalign=("left",) + ("right",) * len(splits),
        disable_numparse=True,
        preserve_whitespace=True,
    )


def usage_hint(output_dir: str) -> str:
    """How to make Detectron2 find the dataset."""
    parent, name = os.path.split(os.path.abspath(output_dir))
    if name != "shapes":
        return (
            "To use it, name the folder 'shapes' and set DETECTRON2_DATASETS to its parent, or "
            f"call teacher_student_mask.data.shapes.register_shapes({output_dir!r})."
        )
    return f"To use it: export DETECTRON2_DATASETS={parent}"


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    if min(args.num_train, args.num_val, args.seed) < 0:
        parser.error("--num-train, --num-val and --seed must not be negative.")
    name = "{}.json" if args.flat else "annotations/instances_{}.json"
    paths = {x: os.path.join(args.output_dir, name.format(x)) for x in ("train", "val")}
    existing = [path for path in paths.values() if os.path.exists(path)]
    if existing and not args.force:
        parser.error(f"{existing[0]} exists already; --force writes over it.")

    total = args.num_train + args.num_val
    try:
        with tqdm(total=total, unit="image") as progress:
            generate_shapes(
                args.output_dir,
                num_train=args.num_train,
                num_val=args.num_val,
                image_size=args.image_size,
                seed=args.seed,
                flat=args.flat,
                progress=lambda num_done, _: progress.update(num_done - progress.n),
            )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(describe({split: load_coco(path) for split, path in paths.items()}))
    if not args.flat:
        print(usage_hint(args.output_dir))
    return 0


if __name__ == "__main__":
    setup_logger(name="teacher_student_mask")
    sys.exit(main())
