"""Checks of the annotations of a COCO json: ids, boxes, masks, and the counts of the classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from .annotation_report import AnnotationReport, short_repr
from .class_counts import count_classes
from .mask_measures import (
    BOX_TOLERANCE,
    are_rectangles,
    covers_image,
    is_whole,
    measure_polygons,
    measure_rles,
    to_floats,
)
from .mask_sources import HUMAN, MODEL, has_known_source, is_from_model

__all__ = ["MAX_PIXELS_OUTSIDE", "ObjectChecks"]

# pycocotools walks along a polygon in fifths of a pixel and keeps every step, so one that ends far
# away takes all memory.
MAX_PIXELS_OUTSIDE = 100_000
# Detectron2's filter_empty_instances: boxes with a side up to this are empty.
_EMPTY_SIDE = 1e-5
# Beyond this, matching objects with anchors needs much memory.
_MANY_OBJECTS = 1000


class ObjectChecks:
    """The annotations of a file; every array has one entry for each."""

    def __init__(
        self,
        report: AnnotationReport,
        rows: list[dict],
        row_of_image: dict[int, int],
        sizes: np.ndarray,
        names: dict[int, str],
        is_seen: np.ndarray | None,
    ):
        self.report, self.rows, self.names, self.is_seen = report, rows, names, is_seen
        class_of = {category_id: k for k, category_id in enumerate(names)}
        self.image = self._look_up("image_id", row_of_image, "images")
        self.category = self._look_up("category_id", class_of, "categories")
        # nan where the image is unknown, or has no size; what compares with it is no problem then.
        self.sizes = np.concatenate([sizes, np.full((1, 2), np.nan)])[self.image]
        crowd = [x.get("iscrowd", 0) for x in rows]
        is_flag = [type(x) in (int, bool, float) and x in (0, 1) for x in crowd]
        self._find("error", [not x for x in is_flag], "iscrowd", "allowed: 0 or 1")
        self.is_crowd = np.array([x != 0 for x in crowd], dtype=bool)
        self.is_from_model = self._check_sources()
        # Whether training reads the mask: crowds are left out, and unseen classes lose theirs,
        # unless a model made them.
        self.is_read = np.ones(len(rows), dtype=bool)
        if is_seen is not None:
            self.is_read = np.append(is_seen, False)[self.category] | self.is_from_model
            self.is_read &= ~self.is_crowd
        self.dropped, self.dropped_masks = {}, {}
        self.has_mask, self.is_rectangle = np.zeros((2, len(rows)), dtype=bool)

    def _find(self, severity: str, is_bad: Sequence[bool], *rest) -> None:
        self.report.add(severity, "annotation", self.rows, is_bad, *rest)

    def _look_up(self, field: str, known: dict[int, int], where: str) -> np.ndarray:
        values = (x.get(field) for x in self.rows)
        found = np.array(
            [known.get(x, -1) if type(x) in (int, float) else -1 for x in values], dtype=int
        )
        self._find("error", found < 0, field, f"allowed: an id of {where!r}")
        return found

    def _check_sources(self) -> np.ndarray:
        self._find(
            "error",
            [not has_known_source(x) for x in self.rows],
            "mask_source",
            f"allowed: {HUMAN!r} (as without the key), or {MODEL!r} for a mask that a model made",
            lambda i: f"{short_repr.repr(self.rows[i]['mask_source'])} (image id "
            f"{short_repr.repr(self.rows[i].get('image_id'))})",
        )
        return np.array([is_from_model(x) for x in self.rows], dtype=bool)

    def check(self, images: list[dict]) -> None:
        """Add all findings about the objects, and the counts of the classes."""
        self._check_ids()
        boxes = self._check_boxes()
        self._check_masks(boxes)
        self._count_classes()
        counts = np.bincount(self.image[(self.image >= 0) & ~self.is_crowd], minlength=len(images))
        self.report.add(
            "warning",
            "image",
            images,
            counts > _MANY_OBJECTS,
            "annotations",
            "training takes them all, but the memory for matching them grows with their number",
            lambda i: f"a list of {counts[i]} objects",
        )

    def _count_classes(self) -> None:
        is_object, is_human = ~self.is_crowd, ~self.is_from_model
        columns = {
            "masks": is_object & self.has_mask & is_human,
            "model_masks": is_object & self.has_mask & ~is_human,
            "boxes_only": is_object & ~self.has_mask,
            "crowd": self.is_crowd,
            "rectangles": is_object & self.is_rectangle & is_human,
        }
        count_classes(
            self.report,
            self.category,
            self.names,
            self.is_seen,
            columns,
            dropped={reason: x & is_object for reason, x in self.dropped.items()},
            dropped_masks={reason: x & is_object for reason, x in self.dropped_masks.items()},
        )

    def _check_ids(self) -> None:
        # Evaluation renumbers what is no positive number, so id 0 or a name is no problem.
        ids = [x.get("id") for x in self.rows]
        if (
            set(map(type, ids)) <= {int}
            and len(set(ids)) == len(ids)
            and is_whole(max(ids, default=0))
            and is_whole(min(ids, default=0))
        ):
            return  # as in most files; what follows takes longer
        is_bad = np.array([type(x) is not str and not is_whole(x) for x in ids], dtype=bool)
        is_missing = np.array(["id" not in x for x in self.rows], dtype=bool)
        counts = Counter(x for x, bad in zip(ids, is_bad) if not bad)
        self._find("error", is_bad & ~is_missing, "id", "allowed: a whole number")
        is_repeated = [not bad and counts[x] > 1 for x, bad in zip(ids, is_bad)]
        self._find("error", is_repeated, "id", "allowed: an id that no other annotation has")
        remedy = "training does without, but evaluation needs it; number the annotations"
        self._find("warning", is_missing, "id", remedy)

    def _check_boxes(self) -> np.ndarray:
        """Returns XYWH, float64 of shape (n, 4), nan where the json has no box."""
        boxes = _to_boxes([x.get("bbox") for x in self.rows])
        is_bad = np.isnan(boxes).any(axis=1)
        self._find("error", is_bad, "bbox", "allowed: four finite numbers [x, y, width, height]")
        is_negative = (boxes[:, 2:] < 0).any(axis=1)
        remedy = "allowed: [x, y, width, height] with width and height not negative"
        self._find("error", is_negative, "bbox", remedy)
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        limits = self.sizes[:, ::-1]
        is_far = _is_far(low, high, limits) & ~is_negative
        remedy = f"allowed: pixels, at most {MAX_PIXELS_OUTSIDE} outside the image"
        self._find("error", is_far, "bbox", remedy)
        # As Detectron2 computes them, in 32 bits.
        with np.errstate(invalid="ignore", over="ignore"):
            low32, high32 = (x.astype(np.float32) for x in (low, high))
            is_empty = (high32 - low32 <= _EMPTY_SIDE).any(axis=1) & ~is_negative & ~is_far
            inside = np.minimum(high32, limits) - np.maximum(low32, 0)
        self._drop(is_empty, "box without area", "bbox")
        is_outside = (inside <= _EMPTY_SIDE).any(axis=1) & ~is_negative & ~is_far & ~is_empty
        self._drop(is_outside, "box outside its image", "bbox")
        reaches_out = ((low < -BOX_TOLERANCE) | (high > limits + BOX_TOLERANCE)).any(axis=1)
        reaches_out &= ~(is_negative | is_far | is_empty | is_outside)
        remedy = "it reaches outside the image, and training cuts it there"
        self._find("warning", reaches_out, "bbox", remedy)
        return boxes

    def _drop(self, is_dropped: np.ndarray, reason: str, field: str) -> None:
        self.dropped[reason] = is_dropped & ~self.is_crowd
        remedy = f"a {reason}: training leaves the object out; correct it, or take it out"
        self._find("warning", is_dropped, field, remedy)

    def _find_in_masks(self, is_bad: np.ndarray, remedy: str, *rest) -> None:
        self._find("error", is_bad & self.is_read, "segmentation", remedy, *rest)
        remedy += "; training does not read this mask, of a crowd or an unseen class"
        self._find("warning", is_bad & ~self.is_read, "segmentation", remedy, *rest)

    def _check_masks(self, boxes: np.ndarray) -> None:
        masks = [x.get("segmentation") for x in self.rows]
        is_list = np.array([type(x) is list and bool(x) for x in masks], dtype=bool)
        is_rle = np.array([type(x) is dict for x in masks], dtype=bool)
        is_none = np.array([x is None or x == [] for x in masks], dtype=bool)
        allowed = (
            "allowed: a list of polygons [[x, y, x, y, x, y, ...], ...], an RLE with 'size' and "
            "'counts', or null for an object without a mask"
        )
        self._find_in_masks(~(is_list | is_rle | is_none), allowed)
        # The loader looks at the lists of all classes.
        is_flat = np.zeros(len(masks), dtype=bool)
        lists = np.flatnonzero(is_list)
        is_flat[lists] = [not set(map(type, masks[i])) <= {list} for i in lists]
        self._find("error", is_flat, "segmentation", allowed)
        self._check_polygons([i for i in lists if not is_flat[i]], masks, boxes)
        self._check_rles(np.flatnonzero(is_rle), masks)

    def _check_polygons(self, rows: list[int], masks: list, boxes: np.ndarray) -> None:
        polygons = list(chain.from_iterable(masks[i] for i in rows))
        owners = np.repeat(rows, [len(masks[i]) for i in rows]).astype(int)
        lengths = np.array(list(map(len, polygons)), dtype=int)
        is_short = (lengths < 6) | (lengths % 2 == 1)
        remedy = (
            "polygons of fewer than 3 points, or with half a point, are left out, and an object "
            "without any other has a box only"
        )
        self._find("warning", self._any_of(owners, is_short), "segmentation", remedy)
        owners = owners[~is_short]
        polygons = [x for x, short in zip(polygons, is_short) if not short]
        extents, areas = measure_polygons(polygons)
        low, high = extents[:, :2], extents[:, 2:]
        limits = self.sizes[owners, ::-1]
        is_bad, is_far = np.isnan(areas), _is_far(low, high, limits)
        remedy = "allowed: polygons of finite numbers"
        self._find_in_masks(self._any_of(owners, is_bad), remedy)
        remedy = f"allowed: polygons in pixels, at most {MAX_PIXELS_OUTSIDE} outside the image"
        self._find_in_masks(self._any_of(owners, is_far & ~is_bad), remedy)
        has_area = covers_image(extents, areas, self.sizes[owners])
        is_empty = self._any_of(owners, ~is_bad) & ~self._any_of(owners, has_area | is_bad)
        self._leave_out_mask(is_empty)
        is_without = np.isin(np.arange(len(self.rows)), rows)
        is_without &= ~self._any_of(owners, np.ones(len(owners), bool))
        self.dropped_masks["all polygons too short"] = is_without
        self.has_mask |= self._any_of(owners, has_area)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        is_rectangle = are_rectangles(extents, areas, corners[owners]) & has_area
        is_single = np.bincount(owners, minlength=len(self.rows)) == 1
        self.is_rectangle |= self._any_of(owners, is_rectangle) & is_single

    def _any_of(self, owners: np.ndarray, is_marked: np.ndarray) -> np.ndarray:
        marked = np.zeros(len(self.rows), dtype=bool)
        marked[owners[is_marked]] = True
        return marked

    def _leave_out_mask(self, is_empty: np.ndarray) -> None:
        none = np.zeros(len(self.rows), dtype=bool)
        self.dropped_masks.setdefault("mask without a pixel", none)
        self.dropped_masks["mask without a pixel"] |= is_empty
        remedy = (
            "the mask covers nothing of its image, so training takes the object as one without a "
            "mask; correct it, or give null"
        )
        self._find("warning", is_empty, "segmentation", remedy)

    def _check_rles(self, rows: np.ndarray, masks: list) -> None:
        known = rows[~np.isnan(self.sizes[rows]).any(axis=1)]
        sizes = {i: size for i, size in zip(known.tolist(), self.sizes[known].tolist())}
        is_other_size, is_broken, is_empty = np.zeros((3, len(self.rows)), dtype=bool)
        is_other_size[known] = [masks[i].get("size") != sizes[i] for i in sizes]
        self._find_in_masks(
            is_other_size,
            "allowed: an RLE of the [height, width] of the image in 'images'",
            lambda i: f"an RLE of size {short_repr.repr(masks[i].get('size', 'missing'))}, but "
            f"the image has {[int(x) for x in sizes[i]]}",
        )
        good = [i for i in sizes if not is_other_size[i]]
        pixels, areas, _ = measure_rles([masks[i].get("counts") for i in good])
        is_broken[good] = pixels != self.sizes[good].prod(axis=1)
        remedy = "allowed: run lengths that add up to the pixels of the image, height x width"
        self._find_in_masks(is_broken, remedy)
        is_empty[good] = areas == 0
        self._leave_out_mask(is_empty & ~is_broken)
        self.has_mask[good] = (areas > 0) & ~is_broken[good]


def _is_far(low: np.ndarray, high: np.ndarray, limits: np.ndarray) -> np.ndarray:
    return ((low < -MAX_PIXELS_OUTSIDE) | (high > limits + MAX_PIXELS_OUTSIDE)).any(axis=1)


def _to_boxes(values: list) -> np.ndarray:
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        boxes = to_floats(list(chain.from_iterable(values)))
        if boxes is not None:
            return boxes.reshape(-1, 4)
    boxes = [to_floats(x) if type(x) is list and len(x) == 4 else None for x in values]
    return np.array([np.full(4, np.nan) if x is None else x for x in boxes]).reshape(-1, 4)
