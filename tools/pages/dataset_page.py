"""The page that shows the pictures and the classes of an annotated dataset."""

from __future__ import annotations

import colorsys
import logging
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.annotated_images import KINDS, AnnotatedImages, AnnotatedObject
from inference.media import SourceError, read_image_file
from inference.overlays import color_of
from pages.html_pages import make_thumbnail, to_url, write_page, write_picture
from pages.svg_shapes import polygons_to_path, rle_to_path
from teacher_student_mask.analysis.picture_drawing import crop_window

__all__ = ["Choice", "DatasetPage", "choose"]

logger = logging.getLogger("teacher_student_mask")

_PICTURE_SIDE, _CROP_SIDE = 1000, 300  # the longer side at most, pixels


@dataclass(frozen=True)
class Choice:
    """
    What is shown.

    Args:
        image_ids: of the pictures, sorted.
        crops: for each class, (image id, position among the annotations of the image).
    """

    image_ids: list[int]
    crops: list[list[tuple[int, int]]]


def choose(annotated: AnnotatedImages, num_images: int, num_crops: int, seed: int) -> Choice:
    """
    Draw images, and objects of every class, at random: the same for the same json and seed.

    Args:
        annotated: all images can be drawn, those without objects too.
        num_images, num_crops: at most so many images, and objects of each class; of these half have
            a mask that is shown and half a box only, where there are as many. Crowds are left out.
        seed: any.
    """
    ids = [x["id"] for x in annotated.images]
    rng = random.Random(seed)  # nosec B311  # A draw that can be repeated.
    chosen = rng.sample(ids, min(num_images, len(ids)))
    pools: dict[tuple[int, bool], list[tuple[int, int]]] = defaultdict(list)
    for image_id in ids:
        for k, annotation in enumerate(annotated.annotations.get(image_id, [])):
            kind = annotated.kind_of(annotation)
            if kind != "crowd":
                has_mask = kind in ("human", "model")
                pools[annotated.class_of(annotation), has_mask].append((image_id, k))
    crops = []
    for k in range(len(annotated.names)):
        # A generator for each, so that one class does not change the choice of the next.
        rng = random.Random(f"{seed}, {k}")  # nosec B311  # A draw that can be repeated.
        of_class = [pools.get((k, has_mask), []) for has_mask in (True, False)]
        with_mask = min(len(of_class[0]), max(-(-num_crops // 2), num_crops - len(of_class[1])))
        numbers = (with_mask, min(len(of_class[1]), num_crops - with_mask))
        crops.append([x for pool, n in zip(of_class, numbers) for x in rng.sample(pool, n)])
    return Choice(sorted(chosen), crops)


class DatasetPage:
    """
    Writes ``index.html``, and the ``pictures`` and ``crops`` beside it.

    Attributes:
        failures: sentences about images that could not be shown.
    """

    def __init__(self, annotated: AnnotatedImages, image_root: str, output_dir: Path) -> None:
        """
        Args:
            annotated: what is shown; not changed.
            image_root: folder that the file names are relative to; nothing outside of it is read.
            output_dir: made if new.
        """
        self.failures: list[str] = []
        self._annotated, self._root, self._folder = annotated, image_root, output_dir
        self._image = {x["id"]: x for x in annotated.images}

    def write(
        self,
        choice: Choice,
        crops_per_class: int,
        provenance: list[tuple[str, str]],
        progress: Callable[[Iterable, int], Iterable],
    ) -> Path:
        """
        Args:
            choice: of :func:`choose`.
            crops_per_class: what the page says about it.
            provenance: names and values for the head of the page.
            progress: ``progress(iterable, total)`` gives its items and shows how many.

        Raises:
            OSError: something cannot be written.
        """
        crops_of = defaultdict(list)
        for class_index, crops in enumerate(choice.crops):
            for number, (image_id, k) in enumerate(crops):
                crops_of[image_id].append((class_index, number, k))
        shown = set(choice.image_ids)
        image_ids = sorted(shown | set(crops_of))
        objects = self._annotated.objects_of(image_ids)
        pictures, tiles = [], []
        found_crops: dict[int, dict[int, dict]] = defaultdict(dict)
        for image_id in progress(image_ids, len(image_ids)):
            try:
                pixels = self._read(self._image[image_id])
            except SourceError as error:
                self.failures.append(str(error))
                continue
            for class_index, number, k in crops_of[image_id]:
                name = f"{class_index}_{number}.jpg"
                crop = self._crop(pixels, objects[image_id][k], name)
                found_crops[class_index][number] = crop
            if image_id in shown:
                pictures.append(self._picture(pixels, image_id, objects[image_id]))
                tiles.append(_tile(pictures[-1]["name"], objects[image_id]))
        content = {
            **self._facts(pictures, objects.values(), provenance),
            "classes": self._classes(found_crops),
            "has_split": len(self._annotated.seen) < len(self._annotated.names),
            "warnings": [str(x) for x in self._annotated.report.warnings],
            "kinds": KINDS,
            "pictures": pictures,
            "crops_per_class": crops_per_class,
            "failures": self.failures,
        }
        path = self._folder / "index.html"
        write_page(path, "dataset.html.j2", content, tiles)
        return path

    def _facts(self, pictures, objects, provenance) -> dict:
        annotated = self._annotated
        counts = sum(annotated.count_kinds(), Counter())
        masks = counts["human"] + counts["model"] + counts["unused"]
        facts = [
            ("images, of which shown", f"{len(annotated.images)}, {len(pictures)}"),
            ("objects", counts.total() - counts["crowd"]),
            ("with a mask", masks),
            ("box only", counts["box"]),
            ("crowds", counts["crowd"]),
        ]
        name = Path(annotated.json_file).name
        return {"title": f"Objects of {name}", "facts": facts, "provenance": provenance}

    def _classes(self, found_crops: dict[int, dict[int, dict]]) -> list[dict]:
        rows = []
        for k, counts in enumerate(self._annotated.count_kinds()):
            rows.append(
                {
                    "index": k,
                    "name": self._annotated.names[k],
                    "is_seen": k in self._annotated.seen,
                    "objects": counts.total() - counts["crowd"],
                    "masks": counts["human"] + counts["model"] + counts["unused"],
                    "model": counts["model"],
                    "box": counts["box"],
                    "crowd": counts["crowd"],
                    "crops": [crop for _, crop in sorted(found_crops.get(k, {}).items())],
                }
            )
        return rows

    def _read(self, image: dict) -> np.ndarray:
        name = image["file_name"]
        path = os.path.join(self._root, name)
        # A page is passed on: a json of a stranger must not put a private picture into it.
        root = os.path.abspath(self._root)
        if os.path.commonpath([root, os.path.abspath(path)]) != root:
            raise SourceError(f"image {image['id']}: {name!r} is outside of {self._root}.")
        pixels = read_image_file(Path(path))
        said = (int(image["height"]), int(image["width"]))
        if pixels.shape[:2] != said:
            raise SourceError(
                f"{path}: the image has (height, width) {pixels.shape[:2]}, the json says {said}."
            )
        return pixels

    def _picture(self, pixels, image_id: int, objects: list[AnnotatedObject]) -> dict:
        picture = make_thumbnail(pixels, _PICTURE_SIDE)
        path = Path("pictures") / f"{image_id}.jpg"
        write_picture(self._folder / path, picture)
        height, width = pixels.shape[:2]
        # Small objects last, that is above, where the mouse reaches them.
        order = sorted(range(len(objects)), key=lambda k: -objects[k].box[2] * objects[k].box[3])
        size = round(max(height, width) / 40, 1)
        name = self._image[image_id]["file_name"]
        return {
            "name": name,
            "image_id": image_id,
            "source": to_url(path),
            "alt": name,
            "width": picture.shape[1],
            "height": picture.shape[0],
            "view": f"0 0 {width} {height}",
            "objects": [self._shape(objects[k], k, (height, width), size) for k in order],
        }

    def _crop(self, pixels: np.ndarray, shown: AnnotatedObject, name: str) -> dict:
        left, top, right, bottom = crop_window(shown.box, *pixels.shape[:2])
        picture = make_thumbnail(pixels[top:bottom, left:right], _CROP_SIDE)
        write_picture(self._folder / "crops" / name, picture)
        overlap = "" if shown.overlap is None else f", O {_overlap_text(shown)}"
        return {
            "source": to_url(Path("crops") / name),
            "alt": f"annotation {shown.annotation_id}",
            "width": right - left,
            "height": bottom - top,
            "view": f"{left} {top} {right - left} {bottom - top}",
            "caption": f"{shown.annotation_id}: {KINDS[shown.kind]}{overlap}",
            "objects": [self._shape(shown, 0, pixels.shape[:2], None)],
        }

    def _shape(
        self, shown: AnnotatedObject, index: int, size: tuple[int, int], font_size: float | None
    ) -> dict:
        """An object as the template draws it; without a name where there is no font size."""
        x, y, w, h = shown.box
        name = self._annotated.names[shown.class_index]
        path, rule = "", "nonzero"
        if shown.polygons and shown.kind != "crowd":
            path = polygons_to_path(shown.polygons)
        elif shown.rle is not None and shown.kind != "crowd":
            path, rule = rle_to_path(shown.rle), "evenodd"
        rgb = (round(255 * v) for v in _light(color_of(shown.class_index)))
        label = {"label": "", "x": 0, "y": 0, "size": 0}
        if font_size is not None:
            length = 0.6 * font_size * len(name)
            label = {
                "label": f"{name} (crowd)" if shown.kind == "crowd" else name,
                "x": round(max(0, min(x + 2, size[1] - length)), 1),
                "y": round(min(max(y - 3, font_size), size[0] - 3), 1),
                "size": font_size,
            }
        return {
            **label,
            "index": index,
            "kind": shown.kind,
            "colour": "#{:02x}{:02x}{:02x}".format(*rgb),
            "path": path,
            "fill_rule": rule,
            "rect": {"x": x, "y": y, "width": w, "height": h},
            "tip": _tip(name, shown),
        }


def _light(color: tuple[float, float, float]) -> tuple[float, float, float]:
    """The hue of a colour, light enough to be seen on the dark casing of the lines."""
    hue, _, _ = colorsys.rgb_to_hls(*color)
    return colorsys.hls_to_rgb(hue, 0.62, 0.95)


def _tile(name: str, objects: list[AnnotatedObject]) -> dict:
    items = [
        (x.class_index, x.kind, None if x.overlap is None else round(x.overlap, 4)) for x in objects
    ]
    return {"name": name, "items": items}


def _overlap_text(shown: AnnotatedObject) -> str:
    return f"{'≥' if shown.is_lower_bound else '='} {shown.overlap:.2f}"


def _tip(name: str, shown: AnnotatedObject) -> str:
    lines = [f"{name}, annotation {shown.annotation_id}", KINDS[shown.kind]]
    if shown.overlap is not None:
        lines.append(f"overlap O {_overlap_text(shown)}")
    if shown.is_lower_bound:
        lines.append("an object without a mask reaches into this box")
    lines.append(f"box {shown.box[2]:g} x {shown.box[3]:g} pixels")
    return "\n".join(lines)
