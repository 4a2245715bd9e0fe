"""Where images and annotations stand in a COCO json, and which objects lack a mask."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO

import numpy as np

from coco_json.splicing import JsonRows, Piece, splice
from completion.entries import (
    MADE_MEMBERS,
    TARGET,
    Problem,
    kind_of,
    may_be_far,
    may_repeat_members,
    problem_of_annotation,
    problem_of_category,
    problem_of_distance,
    problem_of_image,
    problem_of_target,
)
from teacher_student_mask.checks.annotation_report import short_repr

__all__ = ["AnnotationIndex", "index_annotations", "read_categories"]

_REPEATED = Problem("id", "an id that no other has")


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
        kinds: int8, shape (m,): an index of ``entries.KINDS``.
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
        try:
            return json.loads(os.pread(self._file[1].fileno(), length, offset))
        except ValueError as error:
            # It could be read before.
            raise ValueError(
                f"{self.path} was changed during the run, at byte {offset}; begin anew (--restart)."
            ) from error

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
        ValueError: it is no COCO json, it does not say whether an object has a mask, or one that is
            to be given a mask cannot be: no box, an unknown image or category. Names file, entry,
            field, value and what is allowed.
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
    return builder.finish(rows)


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
    """Takes one entry after the other; keeps of each what :class:`AnnotationIndex` keeps."""

    def __init__(self, path: str, redo_model_masks: bool):
        self.path, self._redo = path, redo_model_masks
        self.categories: dict[int, str] = {}
        self._names: set[str] = set()
        self._image_ids, self._image_spans = array("q"), array("q")
        self._image_id_of, self._spans, self._kinds = array("q"), array("q"), array("b")
        self._counts: Counter = Counter()
        # A target of each category, for the error if the category is unknown.
        self._example_of: dict[int, int] = {}
        # Targets whose box may be too far outside of the image; images may come after them.
        self._far = array("q")

    def add_category(self, piece: Piece) -> None:
        number = len(self.categories)
        # A name is kept, so it must not be garbled.
        piece = piece._replace(value=json.loads(piece.raw))
        self._check("category", number, piece, problem_of_category)
        category = piece.value
        if int(category["id"]) in self.categories:
            raise self._error("category", number, category, _REPEATED)
        if category["name"] in self._names:
            problem = Problem("name", "a name that no other has")
            raise self._error("category", number, category, problem)
        self._names.add(category["name"])
        self.categories[int(category["id"])] = category["name"]

    def add_image(self, piece: Piece) -> None:
        self._check("image", len(self._image_ids), piece, problem_of_image)
        self._image_ids.append(int(piece.value["id"]))
        self._image_spans.extend((piece.offset, len(piece.raw)))

    def add_annotation(self, piece: Piece) -> None:
        self._check("annotation", len(self._kinds), piece, problem_of_annotation)
        annotation = piece.value
        kind = kind_of(annotation, self._redo)
        if kind == TARGET:
            self._add_target(piece)
        self._image_id_of.append(int(annotation["image_id"]))
        self._spans.extend((piece.offset, len(piece.raw)))
        self._kinds.append(kind)
        self._counts[int(annotation["category_id"]), kind] += 1

    def _add_target(self, piece: Piece) -> None:
        number, annotation = len(self._kinds), piece.value
        self._check("annotation", number, piece, problem_of_target)
        if may_repeat_members(piece.raw):
            try:
                # What would stop the program when all masks have been made stops it now.
                splice(piece.raw, dict.fromkeys(MADE_MEMBERS))
            except ValueError as error:
                where = self._where("annotation", number, json.loads(piece.raw))
                raise ValueError(f"{where}: {error}.") from error
        if may_be_far(annotation["bbox"]):
            self._far.append(number)
        self._example_of.setdefault(int(annotation["category_id"]), number)

    def finish(self, rows: JsonRows) -> AnnotationIndex:
        """
        Args:
            rows: that have been read to their end.
        """
        for key in ("images", "annotations", "categories"):
            if key not in rows.lists:
                value = rows.no_lists.get(key, "missing")
                raise ValueError(f"{self.path}: {key!r} is {value}; allowed: a list of dicts.")
        index = AnnotationIndex(
            path=self.path,
            sha256=rows.sha256,
            categories=dict(sorted(self.categories.items())),
            image_spans=np.array(self._image_spans, np.int64).reshape(-1, 2),
            annotation_spans=np.array(self._spans, np.int64).reshape(-1, 2),
            image_of=self._find_images(),
            kinds=np.array(self._kinds, np.int8),
            counts=self._counts,
        )
        for number, problem in self._problems_of_targets(index):
            annotation = index.read(index.annotation_spans[number])
            raise self._error("annotation", number, annotation, problem)
        return index

    def _find_images(self) -> np.ndarray:
        # Of each annotation, int32; -1 where there is none.
        ids = np.array(self._image_ids, dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        repeated = np.flatnonzero(np.diff(ids[order]) == 0)
        if len(repeated):
            number = int(order[repeated[0] + 1])
            raise self._error("image", number, {"id": int(ids[number])}, _REPEATED)
        wanted = np.array(self._image_id_of, dtype=np.int64)
        places = np.searchsorted(ids[order], wanted).clip(max=max(0, len(ids) - 1))
        is_known = ids[order][places] == wanted if len(ids) else np.zeros(len(wanted), bool)
        image_of = np.full(len(wanted), -1, np.int32)
        image_of[is_known] = order[places[is_known]]
        return image_of

    def _problems_of_targets(self, index: AnnotationIndex) -> Iterator[tuple[int, Problem]]:
        # Those of an annotation with images and categories, which may stand behind it in the file.
        lost = np.flatnonzero((index.image_of < 0) & (index.kinds == TARGET))
        for number in lost.tolist():
            yield number, Problem("image_id", "the id of one of the images")
        ids = ", ".join(str(i) for i in index.categories) or "no category"
        for category_id, number in self._example_of.items():
            if category_id not in self.categories:
                yield number, Problem("category_id", f"the id of one of the categories, {ids}")
        for number in self._far:
            box = index.read(index.annotation_spans[number])["bbox"]
            image = index.read(index.image_spans[index.image_of[number]])
            problem = problem_of_distance(box, image)
            if problem is not None:
                yield number, problem

    def _check(
        self,
        unit: str,
        number: int,
        piece: Piece,
        find_problem: Callable[[dict], Problem | None],
    ) -> None:
        if type(piece.value) is not dict:
            value = short_repr.repr(json.loads(piece.raw))
            raise ValueError(
                f"{self.path}: {unit} number {number + 1} is {value}; allowed: a dict."
            )
        problem = find_problem(piece.value)
        if problem is not None:
            # Strings of piece.value may be garbled.
            raise self._error(unit, number, json.loads(piece.raw), problem)

    def _error(self, unit: str, number: int, row: dict, problem: Problem) -> ValueError:
        field, allowed, value = problem
        if value is None:
            value = short_repr.repr(row[field]) if field in row else "missing"
        where = self._where(unit, number, row)
        return ValueError(f"{where}: {field!r} is {value}; allowed: {allowed}.")

    def _where(self, unit: str, number: int, row: dict) -> str:
        name = f"id {short_repr.repr(row['id'])}" if "id" in row else "without an id"
        return f"{self.path}: {unit} number {number + 1} ({name})"
