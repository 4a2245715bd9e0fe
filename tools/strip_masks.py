#!/usr/bin/env python
"""Write a COCO json without the masks of unseen classes. See --help."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import IO

from tabulate import tabulate

from teacher_student_mask.checks import AnnotationReport, check_annotations
from teacher_student_mask.checks.reading import read_json
from teacher_student_mask.engine import WriteError, open_atomically

DESCRIPTION = """
Writes a COCO json for training from which the masks of unseen classes are gone. Training with it
gives the same as training with the whole json, whose unseen masks the mapper forgets; but whoever
has this file can see that no program could have used them.

Of an object whose class is not among the seen ones
  segmentation  is taken out, also that of a crowd (an RLE around objects that nobody counted);
                "iscrowd" stays, and training leaves crowds out, as before
  area          becomes width * height of the box: COCO's is counted in the mask, and with the box
                would tell how much of it the object fills
All else keeps its value and its order; fields that are none of COCO's are named, for they may hold
masks, too. The file is not meant for evaluation: AP needs the masks and areas of the whole json.
"""

EXAMPLES = """
examples:
  masks of the 20 VOC classes alone:
    %(prog)s instances_train2017.json voc2nonvoc_train2017.json --seen-classes voc

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
    | {"ignore", "keypoints", "num_keypoints", "segmentation"},
}


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    # Names in the json may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        data = read_json(args.input)
    except (OSError, ValueError) as error:
        print(f"error: {args.input}: unreadable ({error}).")
        return 1
    report = check_annotations(args.input, seen_classes=args.seen_classes, data=data)
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        print(f"Not written: {len(report.errors)} kinds of errors in {args.input}.")
        return 1
    unseen = {x.category_id for x in report.classes if not x.is_seen}
    for where, names in unknown_fields(data, unseen).items():
        print(f"warning: kept in {where}, look whether they hold masks: {', '.join(names)}")
    num_masks, num_removed = strip_masks(data["annotations"], unseen)
    try:
        with open_atomically(args.output) as f:
            write_json(f, data)
    except WriteError as error:
        print(f"error: {error.strerror}")
        return 1
    print(class_table(report, num_masks, num_removed))
    print(f"Written to {args.output}: {sum(num_removed.values())} masks removed")
    return 0


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN.json", help="in COCO's format; not changed")
    parser.add_argument("output", metavar="OUT.json", help="must not exist, or see --force")
    parser.add_argument(
        "--seen-classes",
        required=True,
        metavar="SPEC",
        help='classes that keep their masks: "voc", "nonvoc", "all", names separated by commas, or '
        "the path of a list; as DATASETS.SEEN_CLASSES",
    )
    parser.add_argument("--force", action="store_true", help="replace an OUT.json that exists")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.input):
        parser.error(f"{args.input}: no such file.")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        parser.error(f"{args.output}: there is no folder {folder}.")
    if os.path.isdir(args.output):
        parser.error(f"{args.output}: a folder; name a file.")
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        parser.error(f"{args.output}: the input itself; it is never replaced.")
    if os.path.lexists(args.output) and not args.force:
        parser.error(f"{args.output}: exists; --force replaces it.")
    return parser, args


def strip_masks(annotations: list[dict], unseen: set[int]) -> tuple[Counter, Counter]:
    """
    Take the masks of unseen classes out of a list of COCO annotations, in place.

    Args:
        annotations: with boxes that the checks have found to be ones.
        unseen: category ids.

    Returns:
        The masks there were and those removed of them, {category id: number}.
    """
    num_masks, num_removed = Counter(), Counter()
    for annotation in annotations:
        category_id = annotation["category_id"]
        has_mask = bool(annotation.get("segmentation"))
        num_masks[category_id] += has_mask
        if category_id not in unseen:
            continue
        num_removed[category_id] += has_mask
        annotation.pop("segmentation", None)
        if "area" in annotation:
            width, height = annotation["bbox"][2:]
            annotation["area"] = width * height
    return num_masks, num_removed


def unknown_fields(data: dict, unseen: set[int]) -> dict[str, list[str]]:
    """The fields, sorted, that COCO does not have, by where they are; places without are absent."""

    def fields_of(rows: Iterable[dict]) -> set[str]:
        return set().union(*map(dict.keys, rows))

    rows = (x for x in data["annotations"] if x["category_id"] in unseen)
    found = dict(zip(_KNOWN, (set(data), fields_of(data["images"]), fields_of(rows))))
    unknown = {where: sorted(fields - _KNOWN[where]) for where, fields in found.items()}
    return {where: names for where, names in unknown.items() if names}


def write_json(f: IO[str], data: dict) -> None:
    """Write a dict as json, its lists row by row: json.dump takes minutes for COCO's."""
    f.write("{")
    for i, (key, value) in enumerate(data.items()):
        f.write(f"{', ' if i else ''}{json.dumps(key)}: ")
        if not isinstance(value, list):
            f.write(json.dumps(value))
            continue
        f.write("[")
        for j, row in enumerate(value):
            f.write(f"{', ' if j else ''}{json.dumps(row)}")
        f.write("]")
    f.write("}")


def class_table(report: AnnotationReport, num_masks: Counter, num_removed: Counter) -> str:
    """What became of the masks of each class; "boxes" is all annotations, with the crowds."""
    rows = []
    for x in report.classes:
        masks, removed = num_masks[x.category_id], num_removed[x.category_id]
        boxes = x.masks + x.boxes_only + x.crowd
        split = "seen" if x.is_seen else "unseen"
        rows.append([x.name, split, boxes, x.crowd, masks - removed, removed])
    totals = [sum(numbers) for numbers in list(zip(*rows))[2:]]
    headers = ["class", "split", "boxes", "of them crowds", "masks kept", "masks removed"]
    # Names such as "1e3" are no numbers.
    return tabulate([*rows, ["all", "", *totals]], headers=headers, disable_numparse=[0])


if __name__ == "__main__":
    sys.exit(main())
