#!/usr/bin/env python
"""Write a COCO json without the masks of unseen classes. See --help."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable

from tabulate import tabulate

from coco_json.mask_removal import (
    add_file_arguments,
    check_file_arguments,
    read_checked,
    remove_mask,
    use_area_of_box,
    write_or_explain,
)
from teacher_student_mask.checks import AnnotationReport
from teacher_student_mask.checks.mask_measures import has_mask
from teacher_student_mask.checks.mask_sources import is_from_model

DESCRIPTION = """
Writes a COCO json for training from which the masks of unseen classes are gone. Training with it
gives the same as training with the whole json, whose unseen masks the mapper forgets; but whoever
has this file can see that no program could have used them.

Of an object whose class is not among the seen ones
  segmentation  is taken out, also that of a crowd (an RLE around objects that nobody counted);
                "iscrowd" stays, and training leaves crowds out, as before
  area          becomes width * height of the box: COCO's is counted in the mask, and with the box
                would tell how much of it the object fills
  mask_source   goes with the mask. Masks with "mask_source" "model" are taken out, too, for a file
                cannot prove that no human drew them; --keep-model-masks keeps them, for training
                with MODEL.PSEUDO_MASK.EXTERNAL, and the area becomes that of the box all the same
All else keeps its value and its order; fields that are none of COCO's are named, for they may hold
masks, too. The file is not meant for evaluation: AP needs the masks and areas of the whole json.
"""

EXAMPLES = """
examples:
  masks of the 20 VOC classes alone:
    %(prog)s instances_train2017.json voc2nonvoc_train2017.json --seen-classes voc

  the masks that tools/complete_masks.py made of unseen classes stay:
    %(prog)s completed.json train_stripped.json --seen-classes voc --keep-model-masks

  seen classes by name, or from a list (one name a line, or json):
    %(prog)s train.json train_stripped.json --seen-classes "cat, hair drier"
    %(prog)s train.json train_stripped.json --seen-classes configs/seen_sets/seen_40.json

exit code: 0 written; 1 not written, because of errors in the input or on the disk; 2 for a wrong
command line. An output that is not written as a whole is not written at all.
"""

# What COCO has; anything else is named.
_KNOWN = {
    "the file": {"info", "licenses", "images", "annotations", "categories", "type"},
    "images": {"id", "width", "height", "file_name", "license", "flickr_url", "coco_url"}
    | {"date_captured"},
    "annotations of unseen classes": {"id", "image_id", "category_id", "bbox", "iscrowd", "area"}
    | {"ignore", "keypoints", "num_keypoints", "segmentation", "mask_source"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    checked = read_checked(args.input, args.seen_classes)
    if checked is None:
        return 1
    data, report = checked
    unseen = {x.category_id for x in report.classes if not x.is_seen}
    for where, names in unknown_fields(data, unseen).items():
        print(f"warning: kept in {where}, look whether they hold masks: {', '.join(names)}")
    num_masks, num_removed = strip_masks(data["annotations"], unseen, args.keep_model_masks)
    if not write_or_explain(args.output, data):
        return 1
    print(class_table(report, num_masks, num_removed))
    print(f"Written to {args.output}: {sum(num_removed.values())} masks removed")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_file_arguments(parser)
    parser.add_argument(
        "--seen-classes",
        required=True,
        metavar="SPEC",
        help='classes that keep their masks: "voc", "nonvoc", "all", names separated by commas, or '
        "the path of a list; as DATASETS.SEEN_CLASSES",
    )
    parser.add_argument(
        "--keep-model-masks",
        action="store_true",
        help='keep the masks of unseen classes with "mask_source" "model"',
    )
    args = parser.parse_args(argv)
    check_file_arguments(parser, args)
    return args


def strip_masks(
    annotations: list[dict], unseen: set[int], keep_model_masks: bool = False
) -> tuple[Counter, Counter]:
    """
    Take the masks of unseen classes out of a list of COCO annotations, in place.

    Args:
        annotations: with boxes that the checks have found to be ones.
        unseen: category ids.
        keep_model_masks: keep those with "mask_source" "model", of objects that are no crowds.

    Returns:
        The masks there were and those removed of them, {category id: number}.
    """
    num_masks, num_removed = Counter(), Counter()
    for annotation in annotations:
        category_id = annotation["category_id"]
        num_masks[category_id] += has_mask(annotation)
        if category_id not in unseen:
            continue
        is_kept = keep_model_masks and is_from_model(annotation) and not annotation.get("iscrowd")
        num_removed[category_id] += has_mask(annotation) and not is_kept
        if not is_kept:
            remove_mask(annotation)
            annotation.pop("mask_source", None)
        else:
            use_area_of_box(annotation)
    return num_masks, num_removed


def unknown_fields(data: dict, unseen: set[int]) -> dict[str, list[str]]:
    """The fields, sorted, that COCO does not have, by where they are; places without are absent."""

    def fields_of(rows: Iterable[dict]) -> set[str]:
        return set().union(*map(dict.keys, rows))

    rows = (x for x in data["annotations"] if x["category_id"] in unseen)
    found = dict(zip(_KNOWN, (set(data), fields_of(data["images"]), fields_of(rows))))
    unknown = {where: sorted(fields - _KNOWN[where]) for where, fields in found.items()}
    return {where: names for where, names in unknown.items() if names}


def class_table(report: AnnotationReport, num_masks: Counter, num_removed: Counter) -> str:
    """What became of the masks of each class; "boxes" is all annotations, with the crowds."""
    rows = []
    for x in report.classes:
        masks, removed = num_masks[x.category_id], num_removed[x.category_id]
        boxes = x.num_objects + x.crowd
        split = "seen" if x.is_seen else "unseen"
        rows.append([x.name, split, boxes, x.crowd, masks - removed, removed])
    totals = [sum(numbers) for numbers in list(zip(*rows))[2:]]
    headers = ["class", "split", "boxes", "of them crowds", "masks kept", "masks removed"]
    # Names such as "1e3" are no numbers.
    return tabulate([*rows, ["all", "", *totals]], headers=headers, disable_numparse=[0])


if __name__ == "__main__":
    sys.exit(main())
