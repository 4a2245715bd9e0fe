"""Segmentations of the objects of one image: read, measured and drawn, all objects at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, BoxMode, PolygonMasks

from ..checks.mask_measures import (
    are_rectangles,
    covers_image,
    measure_points,
    measure_polygons,
    measure_rles,
    to_floats,
    valid_polygons,
)
from ..checks.object_checks import MAX_PIXELS_OUTSIDE

__all__ = [
    "are_box_rectangles",
    "box_polygons",
    "lie_in_image",
    "read_polygons",
    "union_of_masks",
    "usable_segmentations",
]

Polygons = list[np.ndarray]


def read_polygons(segmentations: Sequence, where: str) -> list:
    """
    Turn polygons into arrays, which also are copied many times faster than lists of numbers.

    Args:
        segmentations: of the objects of an image: lists of polygons, each [x, y, x, y, ...] in
            pixels; anything else is left as it is.
        where: names the image in messages.

    Returns:
        The same, the polygons as new float64 arrays of shape (2 * points,).

    Raises:
        ValueError: a polygon of fewer than 3 points, or of something else than pixels.
    """
    lists = [x for x in segmentations if isinstance(x, list)]
    polygons = list(chain.from_iterable(lists))
    arrays = _read_at_once(polygons)
    if arrays is None:
        arrays = [_read_polygon(x, where) for x in polygons]
    following = iter(arrays)
    return [[next(following) for _ in x] if isinstance(x, list) else x for x in segmentations]


def _read_at_once(polygons: list) -> list[np.ndarray] | None:
    # None where something is unusual: then each is looked at.
    if not set(map(type, polygons)) <= {list}:
        return None
    ends = np.cumsum([0, *map(len, polygons)]).tolist()
    lengths = np.diff(ends)
    values = to_floats(list(chain.from_iterable(polygons)))
    if values is None or (lengths < 6).any() or (lengths % 2).any() or not _are_pixels(values):
        return None
    return [values[start:end] for start, end in zip(ends, ends[1:])]


def _read_polygon(polygon, where: str) -> np.ndarray:
    try:
        values = np.asarray(polygon)
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    if values.ndim != 1 or len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{where}: a polygon of 'segmentation' must be a flat list of at least 3 x,y "
            f"pairs, got {str(polygon)[:80]}. Use null for an object without a mask."
        )
    if not _are_pixels(values):
        raise ValueError(
            f"{where}: a polygon of 'segmentation' must be in pixels, at most "
            f"{MAX_PIXELS_OUTSIDE} from the image, got {str(polygon)[:80]}."
        )
    return values.astype(np.float64)


def _are_pixels(values: np.ndarray) -> bool:
    # Rasterising a polygon that ends far away, or nowhere, would take all memory. NaN is not <=.
    return values.dtype.kind in "iuf" and bool((np.abs(values) <= MAX_PIXELS_OUTSIDE).all())


def usable_segmentations(segmentations: Sequence, size: tuple[int, int], where: str) -> list:
    """
    Check segmentations and make RLEs compressed.

    Args:
        segmentations: of :func:`read_polygons`.
        size: height and width of the image.
        where: names the image in messages.

    Returns:
        Polygons, a compressed RLE, or None where there is no mask: none is given (missing, null or
        ``[]``), or it covers nothing of the image.

    Raises:
        ValueError: what is neither polygons, nor an RLE of this size, nor none.
    """
    rows = [i for i, x in enumerate(segmentations) if isinstance(x, list)]
    has_pixels = dict(zip(rows, _polygons_cover([segmentations[i] for i in rows], size).tolist()))
    usable = []
    for i, segmentation in enumerate(segmentations):
        if i in has_pixels:
            usable.append(segmentation if has_pixels[i] else None)
        else:
            usable.append(None if segmentation is None else _read_rle(segmentation, size, where))
    return usable


def _read_rle(segmentation, size: tuple[int, int], where: str) -> dict | None:
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(
            f"{where}: 'segmentation' must be a list of polygons, an RLE dict with 'size' and "
            f"'counts', or null for an object without a mask, got {str(segmentation)[:80]}."
        )
    if tuple(segmentation["size"]) != size:
        raise ValueError(
            f"{where}: an RLE has size {list(segmentation['size'])}, but the image is "
            f"{list(size)} (height, width)."
        )
    # pycocotools would read beyond the runs, or make masks of what is none.
    counts = segmentation["counts"]
    (num_pixels,), (area,), _ = measure_rles([counts.decode() if type(counts) is bytes else counts])
    if num_pixels != size[0] * size[1]:
        raise ValueError(
            f"{where}: the runs of an RLE must have {size[0] * size[1]} pixels in all, those of "
            f"the image, got {str(segmentation)[:80]}."
        )
    if isinstance(counts, list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return segmentation if area > 0 else None


def are_box_rectangles(annotations: Sequence[dict]) -> list[bool]:
    """
    Which annotations have a mask that is one polygon, the rectangle of the box to a pixel.

    Such masks are mostly boxes that a program has exported as masks.

    Args:
        annotations: in Detectron2's format, with ``bbox`` and ``bbox_mode``; ``segmentation`` as a
            json has it, or missing.
    """
    polygons = {}
    for row, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and all(isinstance(x, list) for x in segmentation):
            valid = valid_polygons(segmentation)
            if len(valid) == 1:
                polygons[row] = valid[0]
    is_rectangle = [False] * len(annotations)
    if polygons:
        corners = [x[0][[0, 1, 4, 5]] for x in box_polygons([annotations[i] for i in polygons])]
        extents, areas = measure_polygons(list(polygons.values()))
        for row, value in zip(polygons, are_rectangles(extents, areas, np.stack(corners))):
            is_rectangle[row] = bool(value)
    return is_rectangle


def box_polygons(annotations: Sequence[dict]) -> list[Polygons]:
    """
    The rectangles of the boxes of annotations, one polygon for each, shape (8,).

    The corners are those that :class:`BoxMode` gives the box itself, in 32 bits for XYWH.
    """
    boxes = [x["bbox"] for x in annotations]
    modes = {x["bbox_mode"] for x in annotations}
    if modes == {BoxMode.XYWH_ABS} and set(map(type, boxes)) == {list}:
        # At once, for BoxMode.convert takes long for a single box.
        boxes = np.array(boxes, dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
    else:
        boxes = [
            BoxMode.convert(box, x["bbox_mode"], BoxMode.XYXY_ABS)
            for box, x in zip(boxes, annotations)
        ]
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[:, [0, 1, 2, 1, 2, 3, 0, 3]]
    return [[x] for x in corners]


def lie_in_image(masks: PolygonMasks | BitMasks, image_shape: tuple[int, int]) -> torch.Tensor:
    """
    Which masks have an area inside the image: bool, shape (N,).

    :meth:`PolygonMasks.nonempty` asks for a polygon, wherever it lies.
    """
    if isinstance(masks, BitMasks):
        return masks.nonempty()
    return torch.from_numpy(_polygons_cover(masks.polygons, image_shape))


def _polygons_cover(polygons_of: Sequence[Polygons], size: tuple[int, int]) -> np.ndarray:
    # Of objects with any number of polygons each; bool, shape (number of objects,).
    num_polygons = list(map(len, polygons_of))
    found = np.zeros(len(polygons_of), dtype=bool)
    polygons = list(chain.from_iterable(polygons_of))
    if polygons:
        points = np.concatenate(polygons).reshape(-1, 2)
        measures = measure_points(points, np.array([len(x) // 2 for x in polygons]))
        owners = np.repeat(np.arange(len(polygons_of)), num_polygons)
        found[owners[covers_image(*measures, np.array(size))]] = True
    return found


def union_of_masks(masks: PolygonMasks | BitMasks, image_shape: tuple[int, int]) -> torch.Tensor:
    """The pixels of any of the masks: bool, shape (H, W)."""
    if isinstance(masks, BitMasks):
        return masks.tensor.any(dim=0)
    polygons = list(chain.from_iterable(masks.polygons))
    if not polygons:
        return torch.zeros(image_shape, dtype=torch.bool)
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *image_shape))
    # As mask_util.decode, which writes one byte after the other and takes five times as long.
    runs = _runs_of(rle["counts"])
    is_mask = np.arange(len(runs)) % 2 == 1
    height, width = image_shape
    return torch.from_numpy(np.repeat(is_mask, runs).reshape(width, height).T)


def _runs_of(counts: bytes) -> np.ndarray:
    # Lengths of the runs of an RLE that pycocotools has made: numbers of 5 bits a character, lowest
    # first, with a sign; all but a number's last character have bit 32.
    data = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    stops = np.flatnonzero(data < 32) + 1
    lengths = np.diff(stops, prepend=0)
    starts = stops - lengths
    bits = 5 * (np.arange(len(data)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((data & 31) << bits, starts)
    runs -= ((data[stops - 1] & 16) << 1) << (5 * (lengths - 1))
    # From the fourth number on, it is the difference to the run before the last.
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs
