#!/usr/bin/env python
"""Write a COCO json in which a random share of the objects keeps its mask. See --help."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from fractions import Fraction

from tabulate import tabulate

from coco_json.mask_removal import (
    add_file_arguments,
    check_file_arguments,
    read_checked,
    remove_mask,
    write_or_explain,
)
from teacher_student_mask.checks import AnnotationReport
from teacher_student_mask.checks.mask_measures import has_mask
from teacher_student_mask.checks.mask_sources import is_from_model

DESCRIPTION = """
Writes a COCO json in which a random share of the objects keeps its mask; the others keep their
boxes. With it you can measure, on data that have all masks, how many of them a training needs
before somebody draws more.

The share is taken class by class, rounded to whole objects (halves up). Which objects keep their
masks depends on the seed and on the ids of class and object alone, not on their order in the file,
and those that are kept at 0.05 are among those that are kept at 0.1 with the same seed.

Of an object that loses its mask
  segmentation  is taken out
  area          becomes width * height of the box: COCO's is counted in the mask
All else keeps its value and its order. Not touched, and not counted, are crowds, which training
leaves out, masks with "mask_source": "model", and objects that have no mask already. The file is
not meant for evaluation: AP needs the masks and areas of the whole json.
"""

EXAMPLES = """
examples:
  one mask in ten, in every class:
    %(prog)s train.json train_10_percent.json --keep 0.1

  one in a hundred, but ten of each class where there are ten:
    %(prog)s train.json train_few.json --keep 0.01 --min-per-class 10

  half of the masks of two classes, all of the others:
    %(prog)s train.json train_half.json --keep 0.5 --classes "cat, hair drier"

exit code: 0 written; 1 not written, because of errors in the input or on the disk; 2 for a wrong
command line. An output that is not written as a whole is not written at all.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    checked = read_checked(args.input, args.classes)
    if checked is None:
        return 1
    data, report = checked
    chosen = {x.category_id for x in report.classes if x.is_seen}
    num_masks, num_kept = hide_masks(
        data["annotations"], chosen, args.keep, args.min_per_class, args.seed
    )
    if not write_or_explain(args.output, data):
        return 1
    print(class_table(report, num_masks, num_kept))
    emptied = [
        x.name for x in report.classes if num_masks[x.category_id] and not num_kept[x.category_id]
    ]
    if emptied:
        print(f"warning: no mask is left of: {', '.join(emptied)}; --min-per-class keeps some")
    num_removed = num_masks.total() - num_kept.total()
    print(f"Written to {args.output}: {num_removed} masks removed, {num_kept.total()} kept")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_file_arguments(parser)
    add = parser.add_argument
    add(
        "--keep",
        required=True,
        type=share,
        metavar="SHARE",
        help="of the masks of each class, from 0 to 1",
    )
    add(
        "--min-per-class",
        type=int,
        default=0,
        metavar="K",
        help="keep at least so many masks of each class, or all that it has (default: %(default)s)",
    )
    add(
        "--classes",
        default="all",
        metavar="SPEC",
        help='classes that lose masks, the others keep all: "voc", "nonvoc", "all", "auto" (those '
        "with at least 10 masks), names separated by commas, or the path of a list "
        "(default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the choice (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.min_per_class < 0:
        parser.error(f"--min-per-class must be 0 or more, got {args.min_per_class}.")
    check_file_arguments(parser, args)
    return args


def share(text: str) -> Fraction:
    """
    A number from 0 to 1 exactly as it is written: 0.1 of 30 masks is 3.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = None
    if value is None or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}.")
    return value


def hide_masks(
    annotations: list[dict],
    classes: Iterable[int],
    keep: Fraction | float,
    at_least: int,
    seed: int,
) -> tuple[Counter, Counter]:
    """
    Take the masks of a random share of the objects out of a list of COCO annotations, in place.

    Args:
        annotations: that the checks have found to be without errors.
        classes: category ids whose masks may go.
        keep: share of the masks of each class that stays, in [0, 1].
        at_least: how many masks of a class stay whatever the share is, if it has so many.
        seed: of the choice.

    Returns:
        The masks of humans there were, without crowds, and those kept of them,
        {category id: number}.
    """
    with_mask = defaultdict(list)
    for row, annotation in enumerate(annotations):
        is_counted = not annotation.get("iscrowd") and not is_from_model(annotation)
        if is_counted and has_mask(annotation):
            # Without an id its row tells an object from the others.
            key = annotation.get("id", f"row {row}")
            with_mask[annotation["category_id"]].append((key, annotation))
    num_masks = Counter({k: len(rows) for k, rows in with_mask.items()})
    num_kept = Counter(num_masks)
    for category_id in with_mask.keys() & set(classes):
        rows = sorted(with_mask[category_id], key=lambda x: _draw(seed, category_id, x[0]))
        num_kept[category_id] = min(
            len(rows), max(at_least, math.floor(len(rows) * keep + Fraction(1, 2)))
        )
        for _, annotation in rows[num_kept[category_id] :]:
            remove_mask(annotation)
    return num_masks, num_kept


def _draw(seed: int, category_id: int, annotation_id: int | str) -> bytes:
    # A number drawn for an object whose place in the file does not matter.
    return hashlib.sha256(f"{seed} {category_id} {annotation_id}".encode()).digest()


def class_table(report: AnnotationReport, num_masks: Counter, num_kept: Counter) -> str:
    """What became of the masks of each class; "boxes" is all annotations, with the crowds."""
    rows = []
    for x in report.classes:
        masks, kept = num_masks[x.category_id], num_kept[x.category_id]
        boxes = x.num_objects + x.crowd
        rows.append([x.name, boxes, x.crowd, masks, kept, masks - kept])
    rows.append(["all", *(sum(numbers) for numbers in list(zip(*rows))[1:])])
    for row in rows:
        row.append(f"{100 * row[4] / row[3]:.1f} %" if row[3] else "")
    headers = ["class", "boxes", "of them crowds", "masks before", "masks kept", "masks removed"]
    # Names such as "1e3" are no numbers.
    return tabulate(
        rows,
        headers=[*headers, "share kept"],
        disable_numparse=[0, 6],
        colalign=("left",) + ("right",) * 6,
    )


if __name__ == "__main__":
    sys.exit(main())
