"""
Draws the objects of a COCO json as a page for a browser, which needs no network.

The output folder then holds index.html, and pictures/ and crops/ that belong to it:
  classes    how many objects, masks and boxes without a mask each class has, and what the checks of
             the json warn of
  pictures   images with their objects, whose colour says what is known of them: a mask, a mask that
             a model made ("mask_source": "model"), a box only, a crowd; with --seen-classes also
             which masks training does not read. Below each, its objects with their annotation ids
             and their overlap O, Eq. (1) of the paper
  crops      objects of each class, half with and half without a mask

examples:
  100 images, drawn at random:
    tsmask view data/train.json --image-root data/images --output-dir output/look

  others, and the masks of unseen classes told apart:
    tsmask view data/train.json --image-root data/images --output-dir output/look \\
        --seed 2 --max-images 300 --seen-classes "cat, dog"

Images that cannot be read are listed on the page, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import random
from collections import Counter, defaultdict
from html import escape
from pathlib import Path

from ..errors import InputError

__all__ = ["add_arguments", "run"]

_CROP_SIDE = 240  # pixels

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 24rem; } .crops figure { max-width: 11rem; }
img { max-width: 100%; height: auto; } figcaption { overflow-wrap: anywhere; font-size: .9em; }
.key { display: inline-block; width: 1em; height: 1em; vertical-align: -.1em; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("annotations", metavar="JSON", help="in COCO's format")
    add("--image-root", required=True, type=Path, metavar="DIR", help="folder of the images")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    text = 'whose masks training reads, as DATASETS.SEEN_CLASSES: "voc", "nonvoc", "auto", names'
    add("--seen-classes", metavar="SPEC", help=f"{text} separated by commas, a list (default: all)")
    text = "at most so many pictures (default: %(default)s)"
    add("--max-images", type=int, default=100, metavar="N", help=text)
    text = "at most so many objects of each class (default: %(default)s)"
    add("--crops-per-class", type=int, default=8, metavar="N", help=text)
    text = "another number is another choice of images and objects (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Check the json, draw, and write the page."""
    from tqdm import tqdm

    if not args.image_root.is_dir():
        raise InputError(f"--image-root {args.image_root}: no such folder.")
    if min(args.max_images, args.crops_per_class) < 0:
        raise InputError("--max-images and --crops-per-class must be 0 or more.")
    report, images, annotations_of = _read(args.annotations, args.seen_classes)
    classes = {x.category_id: x for x in report.classes}
    shown, crops = _choose(annotations_of, list(images), args)
    overlaps = _overlaps([images[x] for x in images if x in shown | crops.keys()], annotations_of)

    for name in ("pictures", "crops"):
        (args.output_dir / name).mkdir(parents=True, exist_ok=True)
    pictures, crops_of_class, failures = [], defaultdict(list), []
    for image_id in tqdm(sorted(shown | crops.keys()), desc="Images", unit="image", disable=None):
        try:
            pixels = _read_image(images[image_id], args.image_root)
        except InputError as error:
            failures.append(str(error))
            continue
        annotations = annotations_of[image_id]
        names = [classes[x["category_id"]].name for x in annotations]
        lines = [_line(x, name, overlaps) for x, name in zip(annotations, names)]
        figures = _draw(
            pixels,
            annotations,
            names,
            image_id,
            image_id in shown,
            crops[image_id],
            args.output_dir,
        )
        if image_id in shown:
            title = escape(images[image_id]["file_name"])
            items = "".join(f"<li>{x}</li>" for x in lines)
            objects = f"<details><summary>{len(lines)} objects</summary><ul>{items}</ul></details>"
            pictures.append(_figure(figures[None], title + objects))
        for i in crops[image_id]:
            category_id = annotations[i]["category_id"]
            crops_of_class[category_id].append(_figure(figures[i], lines[i]))
    title = f"Objects of {os.path.basename(args.annotations)}"
    kinds = Counter(x["kind"] for rows in annotations_of.values() for x in rows)
    page = args.output_dir / "index.html"
    page.write_text(
        _page(title, report, kinds, pictures, crops_of_class, failures),
        encoding="utf-8",
        errors="backslashreplace",
    )
    print(report.class_table())
    print(f"{page}: {len(pictures)} of {len(images)} images")
    for failure in failures:
        print(f"not shown: {failure}")
    return 1 if failures else 0


def _read(json_file: str, seen_classes: str | None):
    """Check a json; return the report, {image id: image}, {image id: annotations}."""
    from ..coco_json import check_coco, read_json, valid_polygons

    coco = read_json(json_file)
    # Of all classes, as masks that training does not read are drawn, too.
    report = check_coco(json_file, data=coco)
    report.raise_on_error()
    if seen_classes is not None:
        report = check_coco(json_file, data=coco, seen_classes=seen_classes)
        report.raise_on_error()
    classes = {x.category_id: x for x in report.classes}
    images = {x["id"]: x for x in sorted(coco["images"], key=lambda x: x["id"])}
    annotations_of = defaultdict(list)
    for number, annotation in enumerate(coco["annotations"], start=1):
        is_unseen = classes[annotation["category_id"]].is_seen is False
        name = annotation.get("id", "-")  # ids may be missing, so they are numbered anew
        annotation = {
            **annotation,
            "id": number,
            "name": name,
            "kind": _kind(annotation, is_unseen),
        }
        if isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = valid_polygons(annotation["segmentation"])
        annotations_of[annotation["image_id"]].append(annotation)
    return report, images, annotations_of


def _kinds() -> dict[str, tuple[str, str]]:
    # What is known of an object -> (colour, in words).
    from .. import drawing

    return {
        "seen": (drawing.SEEN_COLOR, "mask"),
        "unseen": (drawing.UNSEEN_COLOR, "mask that training does not read (unseen class)"),
        "model": (drawing.MODEL_COLOR, "mask made by a model"),
        "box": (drawing.BOX_COLOR, "box only"),
        "crowd": (drawing.CROWD_COLOR, "crowd: left out of training"),
    }


def _kind(annotation: dict, is_unseen: bool) -> str:
    from ..coco_json import has_mask, is_from_model

    if annotation.get("iscrowd"):
        return "crowd"
    if not has_mask(annotation):
        return "box"
    if is_from_model(annotation):
        return "model"
    return "unseen" if is_unseen else "seen"


def _choose(
    annotations_of: dict, image_ids: list[int], args: argparse.Namespace
) -> tuple[set[int], dict[int, list[int]]]:
    """Draw images, and objects of each class as {image id: indices of its annotations}."""
    rng = random.Random(args.seed)  # nosec B311  # A draw that can be repeated.
    shown = set(rng.sample(image_ids, min(args.max_images, len(image_ids))))
    pools = defaultdict(lambda: ([], []))  # of each class: with a mask, and without
    for image_id in image_ids:
        for i, annotation in enumerate(annotations_of[image_id]):
            if annotation["kind"] != "crowd":
                pool = pools[annotation["category_id"]][annotation["kind"] == "box"]
                pool.append((image_id, i))
    crops = defaultdict(list)
    for _, (masks, boxes) in sorted(pools.items()):
        half = -(-args.crops_per_class // 2)
        num_masks = min(len(masks), max(half, args.crops_per_class - len(boxes)))
        num_boxes = min(len(boxes), args.crops_per_class - num_masks)
        for image_id, i in rng.sample(masks, num_masks) + rng.sample(boxes, num_boxes):
            crops[image_id].append(i)
    return shown, crops


def _overlaps(images: list[dict], annotations_of: dict) -> dict[int, float]:
    """Overlap O of the objects of some images by id; objects without a mask cover nothing."""
    import contextlib
    import io

    from pycocotools.coco import COCO

    from ..evaluation import compute_overlaps

    coco = COCO()
    annotations = [x for image in images for x in annotations_of[image["id"]]]
    coco.dataset = {"images": images, "annotations": annotations, "categories": []}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    return compute_overlaps(coco)


def _line(annotation: dict, name: str, overlaps: dict[int, float]) -> str:
    text = f"annotation {annotation['name']}: {name}, {_kinds()[annotation['kind']][1]}"
    overlap = overlaps.get(annotation["id"])
    return escape(text if overlap is None else f"{text}, O = {overlap:.2f}")


def _read_image(image: dict, root: Path):
    from detectron2.data.detection_utils import read_image

    path = root / image["file_name"]
    # A page is passed on: a json of a stranger must not put a private picture into it.
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"image {image['id']}: {image['file_name']!r} is outside of {root}.")
    try:
        pixels = read_image(str(path), "BGR")
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {error}.") from error
    size = (image["height"], image["width"])
    if pixels.shape[:2] != size:
        raise InputError(f"{path}: is (height, width) {pixels.shape[:2]}, the json says {size}.")
    return pixels


def _draw(pixels, annotations, names, image_id, is_shown: bool, crops: list[int], folder) -> dict:
    """Write a picture of an image and crops; their paths by None and by the index of the object."""
    import cv2

    from ..drawing import annotations_to_detections, draw_instances

    ids = [x["category_id"] for x in annotations]
    detections = annotations_to_detections(annotations, pixels.shape[:2], ids)
    colors = [_kinds()[x["kind"]][0] for x in annotations]
    sources = {None: f"pictures/{image_id}.jpg"} | {i: f"crops/{image_id}_{i}.jpg" for i in crops}
    if is_shown:
        picture = draw_instances(pixels, detections, names, colors=colors)
        cv2.imwrite(str(folder / sources[None]), picture)
    for i in crops:
        x, y, w, h = annotations[i]["bbox"]
        margin = 0.2 * max(w, h) + 2
        left, top = max(0, int(x - margin)), max(0, int(y - margin))
        picture = draw_instances(pixels, detections[[i]], colors=[colors[i]], scale=1)
        picture = picture[top : int(y + h + margin), left : int(x + w + margin)]
        scale = _CROP_SIDE / max(picture.shape[:2])
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / sources[i]), picture)
    return sources


def _figure(source: str, caption: str) -> str:
    return (
        f'<figure><a href="{source}"><img loading="lazy" src="{source}" alt=""></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _page(title, report, kinds, pictures, crops_of_class, failures) -> str:
    title = escape(title)
    legend = [
        f'<li><span class="key" style="background:{color}"></span> {escape(text)}: {kinds[kind]}'
        for kind, (color, text) in _kinds().items()
        if kinds[kind]
    ]
    rows = [
        f"<tr><td>{escape(x.name)}<td>{ {True: 'seen', False: 'unseen'}.get(x.is_seen, '-')}"
        f"<td>{x.num_objects}<td>{x.masks}<td>{x.model_masks}<td>{x.boxes_only}<td>{x.crowd}"
        for x in report.classes
    ]
    parts = [
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1><ul>{''.join(legend)}</ul>",
        "<h2>Classes</h2><div class=wide><table><tr><th>class<th>split<th>objects<th>human masks"
        f"<th>model masks<th>boxes only<th>crowd{''.join(rows)}</table></div>",
    ]
    for heading, texts in (("Warnings", report.warnings), ("Images not shown", failures)):
        if texts:
            items = "".join(f"<li>{escape(str(x))}" for x in texts)
            parts.append(f"<h2>{heading}</h2><ul>{items}</ul>")
    if pictures:
        parts.append(f"<h2>Pictures</h2><div class=tiles>{''.join(pictures)}</div>")
    for x in report.classes:
        tiles = "".join(crops_of_class[x.category_id])
        if tiles:
            parts.append(f'<h3>{escape(x.name)}</h3><div class="tiles crops">{tiles}</div>')
    return "\n".join([*parts, "</html>"])
