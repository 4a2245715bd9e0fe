"""
Makes a COCO json, in which any object may lack its mask, of the annotations of another tool.

An object that has no outline there gets no mask, never the rectangle of its box. Images are not
copied: the last line says what DATASETS.TRAIN_IMAGE_ROOT must be.

examples:
  tsmask import yolo my_data/data.yaml --split train --output train.json
  tsmask import labelme my_folder --classes classes.txt --output train.json
  tsmask import voc VOC2012/Annotations --images VOC2012/JPEGImages --output train.json
  tsmask import cvat annotations/instances_default.json --output train.json
  tsmask import lvis lvis_v1_train.json --output train.json

The COCO json of Label Studio needs no import, nor does that of CVAT without brush masks and turned
boxes: name it in DATASETS.TRAIN.

labelme and voc name classes in each file: without --classes, the ids follow the alphabet of those
that occur, so training and test data get the same ids only if both have objects of all classes.

Images are as large as training sees them, which turns them by their EXIF orientation. Where the
input says another size the import stops. An output that is not written as a whole is not written.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import InputError

__all__ = ["add_arguments", "run"]

# Format -> (its input, what is read of it).
_FORMATS = {
    "yolo": ("data.yaml", "Ultralytics: 5 numbers a line are a box, more are an outline"),
    "labelme": ("FOLDER", "polygons (a group_id is one object), masks; rectangles are boxes"),
    "voc": ("FOLDER", "Pascal VOC: boxes, and outlines where there is a <polygon>"),
    "cvat": ("FILE", '"COCO 1.0" (json) or "CVAT for images 1.1" (xml); brush masks are no crowds'),
    "lvis": ("lvis_v1_train.json", "LVIS; gives the images a file_name"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each format, with the options that it has."""
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    add_option = {}
    for name, (metavar, text) in _FORMATS.items():
        one = formats.add_parser(name, help=text, description=text)
        one.add_argument("input", metavar=metavar, type=Path)
        one.add_argument("--output", required=True, type=Path, metavar="OUT.json")
        one.add_argument("--force", action="store_true", help="replace an OUT.json that exists")
        add_option[name] = one.add_argument
    add_option["yolo"]("--split", default="train", metavar="KEY", help="of data.yaml: train, val")
    text = "folder of the images (default: FOLDER)"
    add_option["voc"]("--images", type=Path, metavar="DIR", help=text)
    for name in ("cvat", "lvis"):
        text = "folder of the images, to compare their sizes with the input"
        add_option[name]("--images", type=Path, metavar="DIR", help=text)
    for name in ("labelme", "voc"):
        add_option[name]("--classes", type=Path, metavar="TXT", help="one class name a line")
    text = "coordinates begin with 0, as some tools write them, not with VOC's 1"
    add_option["voc"]("--zero-based", action="store_true", help=text)
    text = "bitmaps are crowds, not brush masks"
    add_option["cvat"]("--keep-crowds", action="store_true", help=text)


def run(args: argparse.Namespace) -> int | None:
    """Import, check and write."""
    from ..coco_json import check_coco, write_json

    _check_paths(args)
    dataset = _import(args)
    # Before the errors: what was left out may be the reason for them.
    for note, count in dataset.notes.items():
        print(f"note: {count} {note}")
    for warning in dataset.warnings:
        print(f"warning: {warning}")
    if not dataset.coco["annotations"]:
        raise InputError(f"{args.input}: there is no object to import; allowed: at least one.")
    # The ids in a message are those of a COCO json: of the input where it is one.
    checked = args.input if args.input.suffix == ".json" else args.output
    report = check_coco(str(checked), data=dataset.coco, image_root=dataset.image_root)
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        raise InputError(f"{args.output}: not written, as the input has errors, see above.")
    write_json(args.output, dataset.coco)
    print(report.class_table())
    number = len(dataset.coco["images"])
    print(f"{args.output}: {number} images, {len(dataset.coco['annotations'])} objects")
    print(_training_options(args.output, dataset.image_root))


def _import(args: argparse.Namespace):
    from .. import importers
    from ..imported_dataset import read_class_list

    if args.format == "yolo":
        return importers.import_yolo(args.input, args.split)
    if args.format == "cvat":
        return importers.import_cvat(args.input, args.images, args.keep_crowds)
    if args.format == "lvis":
        return importers.import_lvis(args.input, args.images)
    names = None if args.classes is None else read_class_list(args.classes)
    if args.format == "labelme":
        return importers.import_labelme(args.input, names)
    return importers.import_voc(args.input, args.images, names, args.zero_based)


def _check_paths(args: argparse.Namespace) -> None:
    is_folder = args.format in ("labelme", "voc")
    if not (args.input.is_dir() if is_folder else args.input.is_file()):
        raise InputError(f"{args.input}: no such {'folder' if is_folder else 'file'}.")
    images = getattr(args, "images", None)
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: no such folder.")
    output = args.output
    if not output.parent.is_dir() or output.is_dir():
        raise InputError(f"--output {output}: must be the path of a file in a folder that exists.")
    if output.exists() and output.samefile(args.input):
        raise InputError(f"--output {output}: the input itself; it is never replaced.")
    if output.exists() and not args.force:
        raise InputError(f"--output {output}: exists; --force replaces it.")


def _training_options(output: Path, image_root: Path | None) -> str:
    """What a training needs to know, to be pasted into its command line."""
    train = f"({str(output)!r},)"
    # It has single quotes, so double ones around it are easier to read, where the shell sees
    # nothing of its own in between.
    train = shlex.quote(train) if set(train) & set('"$`\\!') else f'"{train}"'
    root = "DIR" if image_root is None else shlex.quote(str(image_root))
    return f"DATASETS.TRAIN {train} DATASETS.TRAIN_IMAGE_ROOT {root}"
