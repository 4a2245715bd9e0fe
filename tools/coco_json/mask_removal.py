"""What programs that write a COCO json share: their files, and how a mask is taken out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import IO

from teacher_student_mask.checks import AnnotationReport, check_annotations
from teacher_student_mask.checks.reading import read_json
from teacher_student_mask.engine import WriteError, open_atomically

__all__ = [
    "add_file_arguments",
    "check_file_arguments",
    "read_checked",
    "remove_mask",
    "use_area_of_box",
    "write_json",
    "write_or_explain",
]


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add IN.json, OUT.json and --force."""
    parser.add_argument("input", metavar="IN.json", help="in COCO's format; not changed")
    parser.add_argument("output", metavar="OUT.json", help="must not exist, or see --force")
    parser.add_argument("--force", action="store_true", help="replace an OUT.json that exists")


def check_file_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program, with a sentence, unless the input is there and the output may be written."""
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


def read_checked(path: str, classes: str) -> tuple[dict, AnnotationReport] | None:
    """
    Read a COCO json and print what the checks find.

    Args:
        path: of the json.
        classes: a spec as DATASETS.SEEN_CLASSES; ``is_seen`` in the report marks its classes.

    Returns:
        The content and the report on it; None, with a message, where either has errors.
    """
    # Names in the json may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        print(f"error: {path}: unreadable ({error}).")
        return None
    report = check_annotations(path, seen_classes=classes, data=data)
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        print(f"Not written: {len(report.errors)} kinds of errors in {path}.")
        return None
    return data, report


def remove_mask(annotation: dict) -> None:
    """
    Take the mask out of a COCO annotation, in place; its area becomes that of the box.

    Args:
        annotation: with a box that the checks have found to be one.
    """
    annotation.pop("segmentation", None)
    use_area_of_box(annotation)


def use_area_of_box(annotation: dict) -> None:
    """
    Make the area of a COCO annotation, if it has one, width * height of its box, in place.

    COCO's is counted in the mask, and with the box would tell how much of it the object fills.

    Args:
        annotation: with a box that the checks have found to be one.
    """
    if "area" in annotation:
        width, height = annotation["bbox"][2:]
        annotation["area"] = width * height


def write_or_explain(path: str, data: dict) -> bool:
    """Write :func:`write_json`'s text as a whole or not at all; False, with a message, if not."""
    try:
        with open_atomically(path) as f:
            write_json(f, data)
    except WriteError as error:
        print(f"error: {error.strerror}")
        return False
    return True


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
