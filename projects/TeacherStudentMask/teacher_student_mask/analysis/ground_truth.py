"""Reads a ground truth in COCO's format, checks it, and turns every mask into compressed RLE."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO

from ..coco_masks import MAX_PIXELS
from ..coco_rules import shorten
from ..json_files import paused_gc
from .input_checks import (
    InputFile,
    InputWarning,
    boxes_outside,
    is_known_by_box_only,
    list_some,
    refusal,
    to_floats,
    to_id,
)
from .rle import check_rles, compress_mask

__all__ = ["load_ground_truth"]

# The lists of a file, and what messages call one row of each.
_LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
_LAYOUT = (
    'a COCO ground truth, which is a dict with the lists "images", "annotations", "categories"'
)


@paused_gc()
def load_ground_truth(path: str | os.PathLike, warnings: list[InputWarning] | None = None) -> COCO:
    """
    Read a COCO json in which every object, crowds included, has a mask.

    Args:
        path: the json file.
        warnings: where to append what is odd but can be analysed; it is logged in any case.

    Returns:
        The annotations, indexed. In every annotation, "segmentation" is a compressed RLE
        {"size": [height, width], "counts": bytes}, "bbox" has finite numbers, "area" and "iscrowd"
        are there, and "id" is positive. A missing "iscrowd" means 0, as in COCO. The attribute
        `annotation_file` is `path`.

    Raises:
        InputError: if it is no such file.
    """
    file = InputFile(path, warnings)
    data = file.read_json()
    _check_layout(file, data)
    sizes = _check_images(file, data["images"])
    _check_categories(file, data["categories"])
    _Annotations(file, data, sizes).normalize()
    coco = COCO()
    coco.dataset = data
    coco.annotation_file = file.path
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _check_layout(file: InputFile, data: object) -> None:
    if isinstance(data, list):
        is_result = bool(data) and isinstance(data[0], dict) and "score" in data[0]
        hint = ": this is a result file" if is_result else ""
        raise file.error(f"is a list{hint}; allowed: {_LAYOUT}")
    if not isinstance(data, dict):
        raise file.error(f"is a {type(data).__name__}; allowed: {_LAYOUT}")
    for key, unit in _LISTS.items():
        if key not in data:
            raise file.error(f'"{key}" is missing; allowed: {_LAYOUT}')
        if not isinstance(data[key], list):
            raise file.error(refusal(key, data[key], "a list"))
        if not data[key] and key != "annotations":
            raise file.error(f'"{key}" is empty; allowed: at least one')
        file.check_dicts(data[key], f"{unit} {{}}".format)


def _check_images(file: InputFile, images: list[dict]) -> dict[int, list[int]]:
    """Returns {image id: [height, width]}; makes these fields ints."""
    sizes = {}
    for i, image in enumerate(images):
        where = f"image {i}"
        _set_new_id(file, image, sizes, where)
        where += f" (id {image['id']})"
        for field in ("height", "width"):
            value = to_id(file.required(image, field, where))
            if value is None or value <= 0:
                allowed = "a whole number of pixels, at least 1"
                raise file.error(refusal(field, image[field], allowed), where)
            image[field] = value
        size = [image["height"], image["width"]]
        if size[0] * size[1] >= MAX_PIXELS:
            problem = f"has {size[0]} x {size[1]} pixels; allowed: fewer than {MAX_PIXELS}"
            raise file.error(problem, where)
        sizes[image["id"]] = size
    return sizes


def _check_categories(file: InputFile, categories: list[dict]) -> None:
    """Makes the ids ints."""
    ids, names = set(), set()
    for i, category in enumerate(categories):
        where = f"category {i}"
        _set_new_id(file, category, ids, where)
        ids.add(category["id"])
        name = file.required(category, "name", where)
        if not isinstance(name, str) or not name.strip():
            raise file.error(refusal("name", name, "the name of the class"), where)
        if name in names:
            allowed = "names that differ from one another"
            raise file.error(refusal("name", name, allowed), where)
        names.add(name)


def _set_new_id(file: InputFile, row: dict, known: dict | set, where: str) -> None:
    value = to_id(file.required(row, "id", where))
    if value is None:
        raise file.error(refusal("id", row["id"], "a whole number"), where)
    if value in known:
        allowed = "ids that differ from one another"
        raise file.error(refusal("id", value, allowed), where)
    row["id"] = value


class _Annotations:
    """The annotations of a file whose images and categories have been checked."""

    def __init__(self, file: InputFile, data: dict, sizes: dict[int, list[int]]) -> None:
        self._file = file
        self._rows = data["annotations"]
        self._size_by_image = sizes
        self._category_ids = {x["id"] for x in data["categories"]}
        # What messages call the rows, whatever becomes of their ids.
        self._ids = [x.get("id") for x in self._rows]

    def normalize(self) -> None:
        """
        Check all annotations and bring their fields into the form of :func:`load_ground_truth`.

        Raises:
            InputError: for the first that is not allowed.
        """
        if not self._rows:
            self._file.warn("no annotations: there is nothing to measure")
            return
        self._check_references()
        self._normalize_ids()
        sizes = [self._size_by_image[x["image_id"]] for x in self._rows]
        self._normalize_boxes(sizes)
        areas = self._normalize_masks(sizes)
        self._normalize_numbers(areas)

    def _where(self, index: int) -> str:
        where = f"annotation {index}"
        if self._ids[index] is not None:
            where += f" (id {shorten(self._ids[index])})"
        return where

    def _warn(self, what: str, indices: Sequence[int]) -> None:
        places = list_some([shorten(self._ids[i]) for i in indices[:6]])
        self._file.warn(what, len(indices), f"ids {places}")

    def _check_references(self) -> None:
        for field, known in (
            ("image_id", self._size_by_image.keys()),
            ("category_id", self._category_ids),
        ):
            for i, row in enumerate(self._rows):
                value = to_id(self._file.required(row, field, self._where(i)))
                if value not in known:
                    allowed = f'an id of "{"images" if field == "image_id" else "categories"}"'
                    raise self._file.error(refusal(field, row[field], allowed), self._where(i))
                row[field] = value

    def _normalize_ids(self) -> None:
        first_uses = {}
        for i, value in enumerate(self._ids):
            # Without an id, or with one that can be no key, it is not meant to be that of another.
            if isinstance(value, (int, float, str)) and first_uses.setdefault(value, i) != i:
                allowed = f"another id than {self._where(first_uses[value])} has"
                raise self._file.error(refusal("id", value, allowed), self._where(i))
        ids = [to_id(value) for value in self._ids]
        is_bad = [value is None or value <= 0 for value in ids]
        if any(is_bad):
            what = (
                "annotations whose id is not a whole number above 0, as COCOeval takes a match "
                "with id 0 for none; all annotations of the file are renumbered from 1"
            )
            self._warn(what, np.flatnonzero(is_bad))
            ids = range(1, len(ids) + 1)
        for row, value in zip(self._rows, ids):
            row["id"] = value

    def _normalize_boxes(self, sizes: list[list[int]]) -> None:
        for i, row in enumerate(self._rows):
            self._file.required(row, "bbox", self._where(i))
        boxes = self._file.boxes([x["bbox"] for x in self._rows], self._where)
        self._warn("boxes without area", np.flatnonzero((boxes[:, 2:] == 0).any(axis=1)))
        is_outside = boxes_outside(boxes, np.array(sizes))
        what = "boxes that reach more than 1 pixel outside their image"
        self._warn(what, np.flatnonzero(is_outside))
        for row, box in zip(self._rows, boxes.tolist()):
            row["bbox"] = box

    def _normalize_masks(self, sizes: list[list[int]]) -> np.ndarray:
        """Returns the masks' areas in pixels, shape (n,)."""
        self._check_all_have_masks()
        counts = []
        num_dropped = 0
        for i, (row, size) in enumerate(zip(self._rows, sizes)):
            try:
                mask, num = compress_mask(row["segmentation"], size)
            except ValueError as error:
                raise self._file.error(str(error), self._where(i)) from None
            counts.append(mask)
            num_dropped += num
        areas = check_rles(self._file, counts, sizes, self._where)
        self._file.warn("polygons of fewer than three points (left out)", num_dropped)
        self._warn("masks without any pixel", np.flatnonzero(areas == 0))
        for row, size, mask in zip(self._rows, sizes, counts):
            row["segmentation"] = {"size": list(size), "counts": mask}
        return areas

    def _check_all_have_masks(self) -> None:
        without = [i for i, row in enumerate(self._rows) if is_known_by_box_only(row)]
        if without:
            places = list_some([self._where(i) for i in without[:11]], num=10)
            raise self._file.error(
                f"{len(without)} of {len(self._rows)} objects have no mask: {places}; allowed: a "
                '"segmentation" with a mask for each, as mask AP needs a mask on every object'
            )

    def _normalize_numbers(self, areas: np.ndarray) -> None:
        without_area = []
        for i, row in enumerate(self._rows):
            if row.get("area") is None:
                without_area.append(i)
                row["area"] = float(areas[i])
            elif to_floats([row["area"]]) is None or row["area"] < 0:
                allowed = "a finite number of pixels, not negative"
                raise self._file.error(refusal("area", row["area"], allowed), self._where(i))
            is_crowd = row.get("iscrowd", 0)
            if not isinstance(is_crowd, (int, float)) or is_crowd not in (0, 1):
                raise self._file.error(refusal("iscrowd", is_crowd, "0 or 1"), self._where(i))
            row["iscrowd"] = int(is_crowd)
        self._warn('no "area", the mask\'s is taken', without_area)
