"""Where images and annotations stand in a COCO json, and which objects lack a mask."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO

import numpy as np

from coco_json.splicing import JsonRows, Piece
from teacher_student_mask.checks.mask_measures import has_mask, is_whole

__all__ = ["KINDS", "AnnotationIndex", "index_annotations", "read_categories"]

# What an annotation is for this program. TARGET is to be given a mask.
CROWD, HUMAN_MASK, MODEL_MASK, TARGET = range(4)
KINDS = ("crowd", "human mask", "model mask", "to be given a mask")


@dataclass
class AnnotationIndex:
    """
    What is kept of a COCO json in memory: 12 bytes an image, and 21 an annotation.

    The n images and m annotations are numbered as they stand in the file.

    Attributes:
        path, sha256: of the file.
        categories: {category id: name}, sorted by id, which is the order of the model's classes.
        image_spans: int64, shape (n, 2): offset and length of each image's text in the file.
        annotation_spans: int64, shape (m, 2), likewise.
        image_of: int32, shape (m,): the number of each annotation's image; -1 if there is none.
        kinds: int8, shape (m,): an index of ``KINDS``.
        counts: {(category id, kind): number of annotations}.
    """

    path: str
    sha256: str = ""
    categories: dict[int, str] = field(default_factory=dict)
    image_spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    annotation_spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    image_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    kinds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._file: tuple[int, FileIO] | None = None
        # The annotations of one image side by side, each image's in the order of the file.
        self._order = np.argsort(self.image_of, kind="stable").astype(np.int32)
        edges = np.arange(len(self.image_spans) + 1)
        self._starts = np.searchsorted(self.image_of[self._order], edges)

    def images_with_targets(self) -> np.ndarray:
        """int64, sorted: the numbers of the images in which an object is to be given a mask."""
        return np.unique(self.image_of[self.kinds == TARGET]).astype(np.int64)

    def annotations_of(self, image: int) -> np.ndarray:
        """int32: the numbers of an image's annotations."""
        return self._order[self._starts[image] : self._starts[image + 1]]

    def read(self, span: np.ndarray) -> dict:
        """Read one image or annotation again, by its row of ``image_spans`` or the other."""
        offset, length = (int(x) for x in span)
        # A number of an open file says nothing in another process.
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), open(self.path, "rb", buffering=0))
        return json.loads(os.pread(self._file[1].fileno(), length, offset))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def index_annotations(
    path: str | os.PathLike,
    redo_model_masks: bool = False,
    progress: Callable[[int], None] | None = None,
) -> AnnotationIndex:
    """
    Read a COCO json once, piece by piece.

    An object is given a mask if it is no crowd and has none: no "segmentation", ``null``, ``[]``,
    or polygons none of which has three points.

    Args:
        path: of the json; its annotations have boxes, and any of them masks.
        redo_model_masks: also objects whose "mask_source" is "model".
        progress: called with the number of bytes that have been read since the last call.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no COCO json, or an object that is to be given a mask cannot be: no box,
            an unknown image or category. Names file, entry, field, value and what is allowed.
    """
    rows = JsonRows(path)
    builder = _Builder(rows.path, redo_model_masks)
    lists = {
        "images": builder.add_image,
        "annotations": builder.add_annotation,
        "categories": builder.add_category,
    }
    last = 0
    for piece in rows:
        if piece.key in lists:
            lists[piece.key](piece)
        if progress is not None and piece.offset - last > 1 << 20:
            progress(piece.offset - last)
            last = piece.offset
    if progress is not None:
        progress(os.path.getsize(path) - last)
    return builder.finish(rows.sha256)


def read_categories(path: str | os.PathLike) -> dict[int, str]:
    """
    The categories of a COCO json alone, {category id: name}, sorted by id.

    Raises:
        OSError, ValueError: as of :func:`index_annotations`.
    """
    rows = JsonRows(path)
    builder = _Builder(rows.path, False)
    for piece in rows:
        if piece.key == "categories":
            builder.add_category(piece)
    return dict(sorted(builder.categories.items()))


class _Builder:
    def __init__(self, path: str, redo_model_masks: bool):
        self.path, self._redo = path, redo_model_masks
        self.categories: dict[int, str] = {}
        self._lists: set[str] = set()
        self._image_ids, self._image_spans = array("q"), array("q")
        self._image_id_of, self._spans, self._kinds = array("q"), array("q"), array("b")
        self._counts: Counter = Counter()
        # A target of each category, for the error if the category is unknown.
        self._example_of: dict[int, int] = {}

    def add_category(self, piece: Piece) -> None:
        category = json.loads(piece.raw)
        number = len(self.categories)
        self._check_dict("category", number, category)
        self._check_whole("category", number, category, "id")
        if type(category.get("name")) is not str:
            raise self._error("category", number, category, "name", "a text")
        if int(category["id"]) in self.categories:
            raise self._error("category", number, category, "id", "an id that no other has")
        self.categories[int(category["id"])] = category["name"]

    def add_image(self, piece: Piece) -> None:
        image, number = piece.value, len(self._image_ids)
        self._check_dict("image", number, image)
        for name in ("id", "height", "width"):
            self._check_whole("image", number, image, name, 1 if name != "id" else None)
        if type(image.get("file_name")) is not str or not image["file_name"]:
            raise self._error("image", number, image, "file_name", "a path below --image-root")
        self._image_ids.append(int(image["id"]))
        self._image_spans.extend((piece.offset, len(piece.raw)))

    def add_annotation(self, piece: Piece) -> None:
        annotation, number = piece.value, len(self._kinds)
        self._check_dict("annotation", number, annotation)
        self._check_whole("annotation", number, annotation, "image_id")
        self._check_whole("annotation", number, annotation, "category_id")
        category_id = int(annotation["category_id"])
        kind = self._kind_of(annotation)
        if kind == TARGET:
            box = annotation.get("bbox")
            if type(box) is not list or len(box) != 4 or not all(map(_is_finite, box)):
                raise self._error(
                    "annotation", number, annotation, "bbox", "[x, y, width, height] in pixels"
                )
            self._example_of.setdefault(category_id, number)
        self._image_id_of.append(int(annotation["image_id"]))
        self._spans.extend((piece.offset, len(piece.raw)))
        self._kinds.append(kind)
        self._counts[category_id, kind] += 1

    def _kind_of(self, annotation: dict) -> int:
        if annotation.get("iscrowd", 0):
            return CROWD
        if not _has_mask(annotation):
            return TARGET
        if annotation.get("mask_source") == "model":
            return TARGET if self._redo else MODEL_MASK
        return HUMAN_MASK

    def finish(self, sha256: str) -> AnnotationIndex:
        ids = np.array(self._image_ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        repeated = np.flatnonzero(np.diff(ids[order]) == 0)
        if len(repeated):
            number = int(order[repeated[0] + 1])
            image = {"id": int(ids[number])}
            raise self._error("image", number, image, "id", "an id that no other has")

        wanted = np.array(self._image_id_of, dtype=np.int64)
        places = np.searchsorted(ids[order], wanted).clip(max=max(0, len(ids) - 1))
        is_known = ids[order][places] == wanted if len(ids) else np.zeros(len(wanted), bool)
        image_of = np.full(len(wanted), -1, np.int32)
        image_of[is_known] = order[places[is_known]]
        index = AnnotationIndex(
            path=self.path,
            sha256=sha256,
            categories=dict(sorted(self.categories.items())),
            image_spans=np.array(self._image_spans, np.int64).reshape(-1, 2),
            annotation_spans=np.array(self._spans, np.int64).reshape(-1, 2),
            image_of=image_of,
            kinds=np.array(self._kinds, np.int8),
            counts=self._counts,
        )
        lost = np.flatnonzero((image_of < 0) & (index.kinds == TARGET))
        problems = [(int(lost[0]), "image_id", "the id of one of the images")] if len(lost) else []
        unknown = [n for i, n in self._example_of.items() if i not in self.categories]
        if unknown:
            ids = ", ".join(str(i) for i in index.categories) or "no category"
            problems.append((unknown[0], "category_id", f"the id of one of the categories, {ids}"))
        for number, name, allowed in problems:
            annotation = index.read(index.annotation_spans[number])
            raise self._error("annotation", number, annotation, name, allowed)
        return index

    def _check_dict(self, unit: str, number: int, row: object) -> None:
        if type(row) is not dict:
            raise ValueError(
                f"{self.path}: {unit} number {number + 1} is {str(row)[:80]}; allowed: an object "
                "with fields."
            )

    def _check_whole(
        self, unit: str, number: int, row: dict, name: str, least: int | None = None
    ) -> None:
        value = row.get(name)
        if not is_whole(value) or (least is not None and value < least):
            allowed = "a whole number" if least is None else f"a whole number from {least} on"
            raise self._error(unit, number, row, name, allowed)

    def _error(self, unit: str, number: int, row: dict, name: str, allowed: str) -> ValueError:
        value = str(row[name])[:80] if name in row else "missing"
        return ValueError(
            f"{self.path}: {unit} number {number + 1} (id {row.get('id')}): {name!r} is {value}; "
            f"allowed: {allowed}."
        )


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _has_mask(annotation: dict) -> bool:
    # A segmentation of another kind is left to whoever wrote it.
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        if not all(isinstance(x, list) for x in segmentation):
            return True
    elif not isinstance(segmentation, dict):
        return segmentation is not None
    return has_mask(annotation)
