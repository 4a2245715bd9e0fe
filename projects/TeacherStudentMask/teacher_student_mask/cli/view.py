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
import html
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

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

    from ..coco_json import check_coco, read_json

    if not args.image_root.is_dir():
        raise InputError(f"--image-root {args.image_root}: no such folder.")
    if min(args.max_images, args.crops_per_class) < 0:
        raise InputError("--max-images and --crops-per-class must be 0 or more.")
    coco = read_json(args.annotations)
    # Of all classes, as masks that training does not read are drawn, too.
    report = check_coco(args.annotations, data=coco)
    report.raise_on_error()
    if args.seen_classes is not None:
        report = check_coco(args.annotations, data=coco, seen_classes=args.seen_classes)
        report.raise_on_error()
    dataset = _Dataset(coco, [x.category_id for x in report.classes if x.is_seen is False])
    shown, crops = _choose(dataset, args.max_images, args.crops_per_class, args.seed)
    for name in ("pictures", "crops"):
        (args.output_dir / name).mkdir(parents=True, exist_ok=True)
    pictures, crops_of_class, failures = [], defaultdict(list), []
    image_ids = [x for x in dataset.images if x in shown or x in crops]
    for image_id in tqdm(image_ids, desc="Images", unit="image", disable=None):
        try:
            pixels = _read_image(dataset.images[image_id], args.image_root)
        except InputError as error:
            failures.append(str(error))
            continue
        figures = dataset.draw(
            image_id, pixels, image_id in shown, crops[image_id], args.output_dir
        )
        pictures += figures.pop(None, [])
        for category_id, figure in figures.items():
            crops_of_class[category_id] += figure
    page = args.output_dir / "index.html"
    title = f"Objects of {os.path.basename(args.annotations)}"
    parts = _page(title, report, dataset, pictures, crops_of_class, failures)
    page.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")
    print(report.class_table())
    print(f"{page}: {len(pictures)} of {len(dataset.images)} images")
    for failure in failures:
        print(f"not shown: {failure}")
    return 1 if failures else 0


class _Dataset:
    """
    The images of a checked COCO json, and their objects.

    Attributes:
        images: entries of the json by id, in the order of the ids.
        annotations: of each image id.
        names: of the classes by category id, in the order of the ids.
    """

    def __init__(self, coco: dict, unseen: Iterable[int]) -> None:
        from ..coco_json import valid_polygons

        self.images = {x["id"]: x for x in sorted(coco["images"], key=lambda x: x["id"])}
        categories = sorted(coco["categories"], key=lambda x: x["id"])
        self.names = {x["id"]: x["name"] for x in categories}
        self.unseen = set(unseen)
        self.annotations = defaultdict(list)
        for annotation in coco["annotations"]:
            if isinstance(annotation.get("segmentation"), list):
                polygons = valid_polygons(annotation["segmentation"])
                annotation = {**annotation, "segmentation": polygons}
            self.annotations[annotation["image_id"]].append(annotation)

    def kind_of(self, annotation: dict) -> str:
        """Return a key of :func:`_kinds`: what is known of an object."""
        from ..coco_json import has_mask, is_from_model

        if annotation.get("iscrowd"):
            return "crowd"
        if not has_mask(annotation):
            return "box"
        if is_from_model(annotation):
            return "model"
        return "unseen" if annotation["category_id"] in self.unseen else "seen"

    def draw(self, image_id: int, pixels, is_shown: bool, crops: set[int], folder: Path) -> dict:
        """
        Write the picture of an image, and crops of some of its objects.

        Args:
            pixels: uint8 (H, W, 3), BGR.
            crops: indices of annotations of the image.

        Returns:
            Figures in HTML: of the whole image under None, of objects under their category ids.
        """
        import cv2

        from ..drawing import annotations_to_detections, draw_instances

        annotations = self.annotations[image_id]
        ids = [x["category_id"] for x in annotations]
        detections = annotations_to_detections(annotations, pixels.shape[:2], ids)
        kinds = [self.kind_of(x) for x in annotations]
        colors = [_kinds()[kind][0] for kind in kinds]
        overlaps = _overlaps(self.images[image_id], annotations)
        lines = [
            f"annotation {x.get('id', '-')}: {self.names[x['category_id']]}, {_kinds()[kind][1]}"
            + (f", O = {overlap:.2f}" if overlap is not None else "")
            for x, kind, overlap in zip(annotations, kinds, overlaps)
        ]
        figures = defaultdict(list)
        if is_shown:
            labels = [self.names[i] for i in ids]
            picture = draw_instances(pixels, detections, labels, colors=colors)
            cv2.imwrite(str(folder / f"pictures/{image_id}.jpg"), picture)
            items = "".join(f"<li>{html.escape(x)}</li>" for x in lines)
            name = html.escape(self.images[image_id]["file_name"])
            caption = (
                f"{name}<details><summary>{len(ids)} objects</summary><ul>{items}</ul></details>"
            )
            figures[None].append(_figure(f"pictures/{image_id}.jpg", name, caption))
        for i in sorted(crops):
            x, y, w, h = annotations[i]["bbox"]
            margin = 0.2 * max(w, h) + 2
            left, top = max(0, int(x - margin)), max(0, int(y - margin))
            picture = draw_instances(pixels, detections[[i]], colors=[colors[i]], scale=1)
            picture = picture[top : int(y + h + margin), left : int(x + w + margin)]
            scale = _CROP_SIDE / max(picture.shape[:2])
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            source = f"crops/{image_id}_{i}.jpg"
            cv2.imwrite(str(folder / source), picture)
            figures[ids[i]].append(_figure(source, "", html.escape(lines[i])))
        return figures


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


def _choose(
    dataset: _Dataset, max_images: int, crops_per_class: int, seed: int
) -> tuple[set[int], dict[int, set[int]]]:
    """Draw images, and objects of each class as {image id: indices of its annotations}."""
    rng = random.Random(seed)  # nosec B311  # A draw that can be repeated.
    shown = set(rng.sample(list(dataset.images), min(max_images, len(dataset.images))))
    pools = defaultdict(list)
    for image_id in dataset.images:
        for i, annotation in enumerate(dataset.annotations[image_id]):
            kind = dataset.kind_of(annotation)
            if kind != "crowd":
                pools[annotation["category_id"], kind != "box"].append((image_id, i))
    crops = defaultdict(set)
    for category_id in dataset.names:
        masks, boxes = (
            rng.sample(x, len(x)) for x in (pools[category_id, True], pools[category_id, False])
        )
        num_masks = max(-(-crops_per_class // 2), crops_per_class - len(boxes))
        chosen = masks[:num_masks]
        for image_id, i in chosen + boxes[: crops_per_class - len(chosen)]:
            crops[image_id].add(i)
    return shown, crops


def _overlaps(image: dict, annotations: list[dict]) -> list[float | None]:
    """Overlap O of each annotation, None of crowds; objects without a mask cover nothing."""
    import contextlib
    import io

    from pycocotools.coco import COCO

    from ..evaluation import compute_overlaps

    coco = COCO()
    # Annotations may lack an id, so they are numbered anew.
    numbered = [{**x, "id": i} for i, x in enumerate(annotations, start=1)]
    coco.dataset = {"images": [image], "annotations": numbered, "categories": []}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    overlaps = compute_overlaps(coco)
    return [overlaps.get(i) for i in range(1, len(annotations) + 1)]


def _read_image(image: dict, root: Path):
    from detectron2.data.detection_utils import read_image

    path = root / image["file_name"]
    # A page is passed on: a json of a stranger must not put a private picture into it.
    if not path.absolute().resolve().is_relative_to(root.resolve()):
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


def _figure(source: str, alt: str, caption: str) -> str:
    url = quote(source)
    return (
        f'<figure><a href="{url}"><img loading="lazy" src="{url}" alt="{alt}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _page(title, report, dataset, pictures, crops_of_class, failures) -> list[str]:
    escape = html.escape
    kinds = _kinds()
    total = Counter(dataset.kind_of(x) for rows in dataset.annotations.values() for x in rows)
    legend = [
        f'<li><span class="key" style="background:{color}"></span> {escape(text)}: {total[kind]}'
        for kind, (color, text) in kinds.items()
        if total[kind]
    ]
    rows = [
        f"<tr><td>{escape(x.name)}<td>{ {True: 'seen', False: 'unseen'}.get(x.is_seen, '-')}"
        f"<td>{x.num_objects}<td>{x.masks}<td>{x.model_masks}<td>{x.boxes_only}<td>{x.crowd}"
        for x in report.classes
    ]
    parts = [
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1><ul>{''.join(legend)}</ul>",
        "<h2>Classes</h2><div class=wide><table><tr><th>class<th>split<th>objects<th>human masks"
        f"<th>model masks<th>boxes only<th>crowd{''.join(rows)}</table></div>",
    ]
    for heading, texts in (("Warnings", report.warnings), ("Images not shown", failures)):
        if texts:
            items = "".join(f"<li>{escape(str(x))}" for x in texts)
            parts.append(f"<h2>{heading}</h2><ul>{items}</ul>")
    if pictures:
        parts.append(f"<h2>Pictures</h2><div class=tiles>{''.join(pictures)}</div>")
    for category_id, name in dataset.names.items():
        if crops_of_class[category_id]:
            tiles = "".join(crops_of_class[category_id])
            parts.append(f'<h3>{escape(name)}</h3><div class="tiles crops">{tiles}</div>')
    return [*parts, "</html>"]
