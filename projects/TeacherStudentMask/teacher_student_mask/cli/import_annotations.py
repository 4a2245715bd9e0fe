"""
Makes a COCO json, in which any object may lack its mask, of the annotations of another tool.

An object that has no outline there gets no mask, never the rectangle of its box. Images are not
copied: the last line says where training finds them.

examples:
  tsmask import yolo my_data/data.yaml --split train --output train.json
  tsmask import labelme my_folder --classes classes.txt --output train.json
  tsmask import voc VOC2012/Annotations --images VOC2012/JPEGImages --output train.json
  tsmask import cvat annotations/instances_default.json --output train.json
  tsmask import masks train.json --masks corrected/ --output corrected.json

The COCO json of Label Studio needs no import: name it in DATASETS.TRAIN.

labelme and voc name classes in each file: without --classes, the ids follow the alphabet of those
that occur.
"""

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
    "masks": ("FILE.json", "COCO's format, and pngs named after annotations or images"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a parser for each format, with the arguments of its function in importers.py."""
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, (metavar, text) in _FORMATS.items():
        add = formats.add_parser(name, help=text, description=text).add_argument
        add("input", metavar=metavar, type=Path)
        add("--output", required=True, type=Path, metavar="OUT.json")
        add("--force", action="store_true", help="replace an OUT.json that exists")
        if name == "yolo":
            add("--split", default="train", metavar="KEY", help="of data.yaml: train, val or test")
        if name in ("labelme", "voc"):
            text = "one class name a line"
            add("--classes", dest="class_names", type=Path, metavar="TXT", help=text)
        if name in ("voc", "cvat"):
            text = "folder of the images, which are checked then"
            add("--images", dest="image_root", type=Path, metavar="DIR", help=text)
        if name == "masks":
            text = "pngs: 17.png is the mask of annotation 17; the pixels of street.png, of the "
            text += "size of street.jpg, are ids of annotations"
            add("--masks", required=True, type=Path, metavar="DIR", help=text)
            add("--replace", action="store_true", help="also masks that a human has drawn before")
        if name == "voc":
            text = "coordinates begin with 0, as some tools write them, not with VOC's 1"
            add("--zero-based", action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
    """Import, check and write."""
    from .. import importers, mask_files
    from ..coco_json import check_coco, write_json

    is_input = args.output.resolve() == args.input.resolve()
    if args.output.exists() and (is_input or not args.force):
        problem = "the input itself, which is never replaced" if is_input else "--force replaces it"
        raise InputError(f"--output {args.output}: exists; {problem}.")
    names = ("split", "class_names", "image_root", "zero_based", "masks", "replace")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if options.get("class_names"):
        lines = importers.read_text(args.class_names).splitlines()
        options["class_names"] = [x.strip() for x in lines if x.strip()]
    module = mask_files if args.format == "masks" else importers
    dataset = getattr(module, f"import_{args.format}")(args.input, **options)
    # Before the errors: what was left out may be the reason for them.
    for note, count in dataset.notes.items():
        print(f"note: {count} {note}")
    report = check_coco(
        args.input,
        data=dataset.coco,
        image_root=dataset.image_root,
        check_images=dataset.image_root is not None,
    )
    for finding in report.findings:
        print(f"{finding.severity}: {finding}")
    if report.errors:
        raise InputError(f"{args.output}: not written, as the input has errors, see above.")
    write_json(args.output, dataset.coco)
    print(report.class_table())
    print(f"{args.output}: {report.num_images} images, {report.num_annotations} objects")
    words = ["tsmask", "train", str(args.output), "--image-root", str(dataset.image_root or "DIR")]
    print(f"Train with it: {shlex.join(words)}")
