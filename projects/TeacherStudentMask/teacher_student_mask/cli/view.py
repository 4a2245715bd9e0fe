"""
Draw the objects of a COCO json as a page for a browser, which needs no network.

The output folder then holds index.html, and pictures/ that belong to it:
  classes    how many objects, masks and boxes without a mask each class has, and what the checks of
             the json warn of
  pictures   images with their objects, whose colour says what is known of them: a mask, a mask that
             a model made ("mask_source": "model"), a box only, a crowd; with --seen-classes also
             which masks training does not read. Below each, its objects with their annotation ids

example, with masks of unseen classes told apart:
  tsmask view data/train.json --image-root data/images --output-dir output/look \\
      --max-images 300 --seen-classes "cat, dog"

Images that cannot be read are listed on the page, and the exit status is then 1.
"""

import argparse
import csv
import os
from collections import defaultdict
from html import escape
from pathlib import Path

from ..errors import InputError

__all__ = ["add_arguments", "run"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; padding: 0 1rem; }
pre { overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 24rem; }
img { max-width: 100%; height: auto; } figcaption { overflow-wrap: anywhere; font-size: .9em; }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -.1em; }
"""
# Colour and words for what is known of an object; Okabe and Ito, "Color Universal Design", 2008.
_MASK = "#009e73", "mask"
_UNREAD_MASK = "#56b4e9", "mask that training does not read (unseen class)"
_MODEL_MASK = "#e69f00", "mask made by a model"
_BOX_ONLY = "#d55e00", "box only"
_CROWD = "#999999", "crowd: left out of training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("annotations", metavar="JSON", help="in COCO's format")
    add("--image-root", required=True, type=Path, metavar="DIR", help="folder of the images")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    text = 'whose masks training reads, as DATASETS.SEEN_CLASSES: "voc", "nonvoc", "auto", names'
    add("--seen-classes", metavar="SPEC", help=f"{text} separated by commas, a list (default: all)")
    text = "at most so many pictures, from all parts of the json (default: %(default)s)"
    add("--max-images", type=int, default=100, metavar="N", help=text)
    text = "of tsmask complete: the images whose objects need a human most, in this order"
    add("--rank", metavar="CSV", help=text)


def run(args: argparse.Namespace) -> int:
    """Check the json, draw, and write the page."""
    from tqdm import tqdm

    from ..coco_json import check_coco, read_json

    coco = read_json(args.annotations)
    report = check_coco(args.annotations, data=coco, seen_classes=args.seen_classes)
    report.raise_on_error()
    classes = {x.category_id: x for x in report.classes}
    annotations_of = defaultdict(list)
    for annotation in coco["annotations"]:
        annotations_of[annotation["image_id"]].append(annotation)
    if args.rank:
        try:
            with open(args.rank, encoding="utf-8", newline="") as file:
                places = {row["image_id"]: None for row in csv.DictReader(file)}
        except (OSError, KeyError) as error:
            raise InputError(
                f"--rank {args.rank}: no csv of tsmask complete: {error!r}."
            ) from error
        by_id = {str(x["id"]): x for x in coco["images"]}
        shown = [by_id[x] for x in places if x in by_id][: args.max_images]
    else:
        shown = coco["images"][:: -(-len(coco["images"]) // max(1, args.max_images))]

    (args.output_dir / "pictures").mkdir(parents=True, exist_ok=True)
    figures, failures = [], []
    for image in tqdm(shown, unit="image", disable=None):
        source = f"pictures/{image['id']}.jpg"
        annotations = annotations_of[image["id"]]
        try:
            lines = _draw(image, args.image_root, annotations, classes, args.output_dir / source)
        except InputError as error:
            failures.append(str(error))
            continue
        figures.append(
            f'<figure><a href="{source}"><img loading="lazy" src="{source}" alt=""></a>'
            f"<figcaption>{escape(image['file_name'])}<details><summary>{len(lines)} objects"
            f"</summary><ul>{''.join(lines)}</ul></details></figcaption></figure>"
        )
    title = escape(f"Objects of {os.path.basename(args.annotations)}")
    parts = [
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        f"<h2>Classes</h2><pre>{escape(report.class_table())}</pre>",
    ]
    for heading, texts in (("Warnings", report.warnings), ("Images not shown", failures)):
        if texts:
            items = "".join(f"<li>{escape(str(x))}" for x in texts)
            parts.append(f"<h2>{heading}</h2><ul>{items}</ul>")
    parts.append(f"<h2>Pictures</h2><div class=tiles>{''.join(figures)}</div></html>")
    page = args.output_dir / "index.html"
    page.write_text("\n".join(parts), encoding="utf-8")
    print(report.class_table())
    print(f"{page}: {len(figures)} of {len(coco['images'])} images")
    for failure in failures:
        print(f"not shown: {failure}")
    return 1 if failures else 0


def _draw(image: dict, root: Path, annotations: list[dict], classes: dict, target: Path):
    """Write the picture of an image; return a line of html for each of its objects."""
    import cv2

    from ..drawing import annotations_to_detections, draw_instances, read_image

    path = root / image["file_name"]
    # A page is passed on: a json of a stranger must not put a private picture into it.
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise InputError(f"image {image['id']}: {image['file_name']!r} is outside of {root}.")
    pixels = read_image(path)
    size = int(image["height"]), int(image["width"])
    if pixels.shape[:2] != size:
        raise InputError(f"{path}: is (height, width) {pixels.shape[:2]}, the json says {size}.")
    known = [_describe(x, classes[x["category_id"]].is_seen is False) for x in annotations]
    names = [classes[x["category_id"]].name for x in annotations]
    detections = annotations_to_detections(annotations, size, range(len(annotations)))
    colors = [color for color, _ in known]
    cv2.imwrite(str(target), draw_instances(pixels, detections, names, colors=colors))
    return [
        f'<li><span class="key" style="background:{color}"></span> annotation '
        f"{escape(str(x.get('id', '-')))}: {escape(name)}, {text}</li>"
        for x, name, (color, text) in zip(annotations, names, known)
    ]


def _describe(annotation: dict, is_unseen: bool) -> tuple[str, str]:
    """Colour of an object, and what is known of it."""
    from ..coco_json import has_mask, is_from_model

    if annotation.get("iscrowd"):
        return _CROWD
    if not has_mask(annotation):
        return _BOX_ONLY
    if is_from_model(annotation):
        return _MODEL_MASK
    return _UNREAD_MASK if is_unseen else _MASK
