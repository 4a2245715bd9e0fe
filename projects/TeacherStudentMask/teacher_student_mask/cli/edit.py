"""
Takes masks out of a COCO json. The boxes stay.

  strip  the masks of unseen classes, those of crowds and of models included. Training with the
         output is the same as with the whole json, whose unseen masks the mapper forgets; but
         whoever has the file can see that no program could have used them.
  hide   the masks of a random share of the objects, class by class, to measure on data that have
         all masks how many a training needs. The choice depends on the seed and the ids alone; what
         is kept of 0.05 is kept of 0.1. Crowds and masks of models stay, and do not count.

"area", which COCO counts in the mask, becomes width * height of the box where a mask goes. All else
keeps its value and its order. The output is for training: AP needs the masks of the whole json.

examples:
  tsmask edit strip instances_train2017.json train_stripped.json --seen-classes voc
  tsmask edit strip train.json train_stripped.json --seen-classes configs/seen_sets/seen_40.json
  tsmask edit hide train.json train_10_percent.json --keep 0.1
  tsmask edit hide train.json train_few.json --keep 0.01 --min-per-class 10
"""

import argparse
import hashlib
import math
import os
from collections import defaultdict

from ..errors import InputError

__all__ = ["add_arguments", "hide_masks", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for "strip" and one for "hide"."""
    edits = parser.add_subparsers(dest="edit", metavar="EDIT", required=True)
    strip = edits.add_parser("strip", help="the masks of unseen classes")
    hide = edits.add_parser("hide", help="the masks of a random share of the objects")
    for one in (strip, hide):
        one.add_argument("input", metavar="IN.json", help="in COCO's format; not changed")
        one.add_argument("output", metavar="OUT.json", help="must not exist, or see --force")
        one.add_argument("--force", action="store_true", help="replace an OUT.json that exists")
    text = 'keep masks: "voc", "nonvoc", "all", names separated by commas, or the path of a list'
    strip.add_argument("--seen-classes", required=True, metavar="SPEC", help=text)
    text = "of the masks of each class, from 0 to 1"
    hide.add_argument("--keep", required=True, type=float, metavar="SHARE", help=text)
    text = "keep at least so many masks of each class, or all that it has (default: %(default)s)"
    hide.add_argument("--min-per-class", type=int, default=0, metavar="K", help=text)
    text = "of the choice (default: %(default)s)"
    hide.add_argument("--seed", type=int, default=0, metavar="N", help=text)


def run(args: argparse.Namespace) -> None:
    """Check, edit, write, and print what each class has then."""
    from ..coco_json import check_coco, forget_mask, read_json, write_json

    if os.path.exists(args.output):
        if os.path.exists(args.input) and os.path.samefile(args.input, args.output):
            raise InputError(f"{args.output}: the input itself; it is never replaced.")
        if not args.force:
            raise InputError(f"{args.output}: exists; --force replaces it.")
    is_strip = args.edit == "strip"
    if not is_strip and not 0 <= args.keep <= 1:
        raise InputError(f"--keep must be a number from 0 to 1, got {args.keep}.")
    data = read_json(args.input)
    seen = args.seen_classes if is_strip else None
    report = check_coco(args.input, data=data, seen_classes=seen)
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        raise InputError(f"{args.output}: not written, as the input has errors, see above.")
    annotations = data["annotations"]
    if is_strip:
        unseen = {x.category_id for x in report.classes if not x.is_seen}
        for annotation in annotations:
            if annotation["category_id"] in unseen:
                forget_mask(annotation)
    else:
        hide_masks(annotations, args.keep, args.min_per_class, args.seed)
    write_json(args.output, data)
    print(check_coco(args.output, data=data, seen_classes=seen).class_table())
    print(f"Written to {args.output}")


def hide_masks(annotations: list[dict], keep: float, at_least: int = 0, seed: int = 0) -> None:
    """
    Take the masks of a random share of the objects out of a list of COCO annotations, in place.

    What is kept of a smaller share is kept of a larger one, too, and does not depend on the order
    of the annotations. Crowds and masks of models stay and do not count.

    Args:
        annotations: without errors.
        keep: share of the masks of each class that stays, in [0, 1]; halves are rounded up.
        at_least: how many masks of a class stay whatever the share is, if it has so many.
        seed: of the choice.
    """
    from ..coco_json import forget_mask

    with_mask = defaultdict(list)
    for row, annotation in enumerate(annotations):
        if _has_human_mask(annotation):
            # Drawn by the id alone (the row, where there is none), not by the place in the file.
            category_id, key = annotation["category_id"], annotation.get("id", f"row {row}")
            number = hashlib.sha256(f"{seed} {category_id} {key}".encode()).digest()
            with_mask[category_id].append((number, row))
    for drawn in with_mask.values():
        # Rounded, as 0.29 * 50 is 14.499999999999998.
        num_kept = max(at_least, math.floor(round(len(drawn) * keep, 6) + 0.5))
        for _, row in sorted(drawn)[num_kept:]:
            forget_mask(annotations[row])


def _has_human_mask(annotation: dict) -> bool:
    from ..coco_json import has_mask, is_from_model

    is_object = not annotation.get("iscrowd") and not is_from_model(annotation)
    return is_object and has_mask(annotation)
