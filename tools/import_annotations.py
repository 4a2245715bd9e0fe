#!/usr/bin/env python
"""Make a COCO json for training of the annotations of another tool. See --help."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from coco_json.mask_removal import write_or_explain
from importers.coco_exports import check_images, read_cvat, read_lvis
from importers.input_files import InputError, check_different, read_text
from importers.labelme import read_labelme
from importers.voc import read_voc
from importers.yolo import read_yolo
from teacher_student_mask.checks import check_annotations

DESCRIPTION = """
Makes a COCO json, in which any object may lack its mask, of the annotations of another tool. An
object that has no outline there gets no mask, never the rectangle of its box.

  FORMAT   INPUT                   what it reads
  yolo     data.yaml               Ultralytics: 5 numbers a line are a box, more are an outline
  labelme  folder of jsons         polygons (a group_id is one object), masks; rectangles are boxes
  voc      folder of xmls          Pascal VOC: boxes
  cvat     instances_default.json  "COCO 1.0" of CVAT; marks brush masks no longer as crowds
  lvis     lvis_v1_train.json      LVIS; gives the images a file_name

The COCO json of Label Studio needs no import, nor does that of CVAT without brush masks: name it in
DATASETS.TRAIN. Images are not copied: the last line says what DATASETS.TRAIN_IMAGE_ROOT must be.
"""

EXAMPLES = """
examples:
  %(prog)s yolo my_data/data.yaml --split train --output train.json
  %(prog)s labelme my_folder --classes classes.txt --output train.json
  %(prog)s voc VOC2012/Annotations --images VOC2012/JPEGImages --output train.json
  %(prog)s cvat annotations/instances_default.json --output train.json

labelme and voc name classes in each file: without --classes, the ids follow the alphabet of those
that occur, so training and test data get the same ids only if both have objects of all classes.

Images are as large as training sees them, which turns them by their EXIF orientation. Where the
input says another size the import stops.

exit code: 0 written; 1 not written, because of errors in the input or on the disk; 2 for a wrong
command line. An output that is not written as a whole is not written at all.
"""


# The formats that have it, of each option that not all have.
_FORMATS_WITH = {
    "split": ("yolo",),
    "images": ("voc", "cvat", "lvis"),
    "classes": ("labelme", "voc"),
    "zero_based": ("voc",),
    "keep_crowds": ("cvat",),
}


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    # Names may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        data, notes, image_root = read_input(args)
    except (InputError, OSError) as error:
        print(f"error: {error}")
        return 1
    # Before the errors: what was left out may be the reason for them.
    for note, count in notes.items():
        print(f"note: {count} {note}")
    if not data["annotations"]:
        print(f"error: {args.input}: there is no object to import; allowed: at least one.")
        return 1
    # The ids in a message are those of a COCO json: of the input where it is one.
    checked = args.input if args.format in ("cvat", "lvis") else args.output
    report = check_annotations(checked, image_root, data=data)
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        print(f"Not written: {len(report.errors)} kinds of errors.")
        return 1
    if not write_or_explain(args.output, data):
        return 1
    print(report.class_table())
    print(f"{args.output}: {report.num_images} images, {report.num_annotations} objects")
    print(_settings_for(args.output, image_root))
    return 0


def _settings_for(output: str, image_root: str | None) -> str:
    """What a training needs to know, to be pasted into its command line."""
    train = f"({output!r},)"
    # It has single quotes, so double ones around it are easier to read, where the shell sees
    # nothing of its own in between.
    train = shlex.quote(train) if set(train) & set('"$`\\!') else f'"{train}"'
    root = "DIR" if image_root is None else shlex.quote(image_root)
    return f"DATASETS.TRAIN {train} DATASETS.TRAIN_IMAGE_ROOT {root}"


def read_input(args: argparse.Namespace) -> tuple[dict, Counter, str | None]:
    """
    Returns:
        The content of the COCO json, {what was changed: how often}, and the folder of the images,
        None where the input does not say.

    Raises:
        InputError: see its message.
    """
    path = Path(args.input)
    if args.format in ("cvat", "lvis"):
        is_lvis = args.format == "lvis"
        data, notes = read_lvis(path) if is_lvis else read_cvat(path, args.keep_crowds)
        if args.images is not None:
            notes += check_images(path, data, Path(args.images), show_progress)
        return data, notes, args.images
    class_names = None if args.classes is None else _read_classes(Path(args.classes))
    if args.format == "yolo":
        dataset = read_yolo(path, "train" if args.split is None else args.split, show_progress)
    elif args.format == "labelme":
        dataset = read_labelme(path, class_names, show_progress)
    else:
        images = path if args.images is None else Path(args.images)
        dataset = read_voc(path, images, class_names, args.zero_based, show_progress)
    return dataset.to_coco(), dataset.notes, str(dataset.image_root)


def _read_classes(path: Path) -> list[str]:
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: empty; allowed: one class name a line.")
    check_different(names, str(path))
    return names


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = ("yolo", "labelme", "voc", "cvat", "lvis")
    parser.add_argument("format", metavar="FORMAT", choices=formats, help=", ".join(formats))
    parser.add_argument("input", metavar="INPUT", help="a file or folder, see above")
    parser.add_argument("--output", required=True, metavar="OUT.json", help="see also --force")
    parser.add_argument("--split", metavar="KEY", help="yolo: key of data.yaml (default: train)")
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="voc: folder of the images (default: INPUT); cvat, lvis: also look whether all images "
        "are there and as large as INPUT says",
    )
    parser.add_argument("--classes", metavar="TXT", help="labelme, voc: one class name a line")
    parser.add_argument(
        "--zero-based",
        action="store_true",
        help="voc: coordinates begin with 0, as some tools write them, not with VOC's 1",
    )
    parser.add_argument(
        "--keep-crowds", action="store_true", help="cvat: bitmaps are crowds, not brush masks"
    )
    parser.add_argument("--force", action="store_true", help="replace an OUT.json that exists")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    wants_folder = args.format in ("labelme", "voc")
    exists = os.path.isdir(args.input) if wants_folder else os.path.isfile(args.input)
    if not exists:
        parser.error(f"{args.input}: no such {'folder' if wants_folder else 'file'}.")
    for name, formats in _FORMATS_WITH.items():
        value = getattr(args, name)
        if value not in (None, False) and args.format not in formats:
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            parser.error(f"{option}: not for {args.format}; it is for: {', '.join(formats)}.")
    if args.images is not None and not os.path.isdir(args.images):
        parser.error(f"--images {args.images}: no such folder.")
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder) or os.path.isdir(args.output):
        parser.error(f"--output {args.output}: the path of a file in a folder that exists.")
    if os.path.lexists(args.output) and not args.force:
        parser.error(f"--output {args.output}: exists; --force replaces it.")
    if os.path.exists(args.output) and os.path.samefile(args.input, args.output):
        parser.error(f"--output {args.output}: the input itself; it is never replaced.")


def show_progress(iterable: Iterable) -> Iterable:
    return tqdm(iterable, desc="Read", unit="file", dynamic_ncols=True)


if __name__ == "__main__":
    sys.exit(main())
