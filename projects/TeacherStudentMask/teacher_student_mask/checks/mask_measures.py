"""Extents and areas of many polygons and run-length masks at once, however broken they are."""

from __future__ import annotations

from itertools import chain

import numpy as np

__all__ = [
    "BOX_TOLERANCE",
    "MAX_PIXELS",
    "are_rectangles",
    "covers_image",
    "has_mask",
    "have_pixels",
    "is_whole",
    "measure_points",
    "measure_polygons",
    "measure_rles",
    "to_floats",
    "valid_polygons",
]

# pycocotools shifts 32-bit integers; an RLE of more pixels may need more.
MAX_PIXELS = 2**29

# Exports that round or count pixels from 1 move a box by no more than this.
BOX_TOLERANCE = 1.0

# A polygon needs three points; pycocotools would read four numbers as a box.
_MIN_POLYGON_COORDINATES = 6

# Numbers of polygons, or characters of RLEs, that are checked at a time.
_CHUNK = 2**22
# Of 5 bits each, with a sign: enough for every run below MAX_PIXELS.
_MAX_CHARACTERS = 6


def has_mask(annotation: dict) -> bool:
    """
    Whether a COCO annotation carries a mask: an RLE, or at least one polygon of three points.

    Args:
        annotation: one entry of the json's "annotations". A "segmentation" that is missing, null
            or empty means that the object is known by its box only.
    """
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts"))
    return bool(valid_polygons(segmentation or []))


def valid_polygons(polygons: list[list[float]]) -> list[list[float]]:
    """Those of at least three points, with two numbers each."""
    return [x for x in polygons if len(x) >= _MIN_POLYGON_COORDINATES and len(x) % 2 == 0]


def to_floats(values: list) -> np.ndarray | None:
    """Float64 of shape (n,), or None unless all are finite numbers (True is not one)."""
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        array = np.array(values, dtype=np.float64)
    except OverflowError:  # an int beyond the range of floats
        return None
    return array if np.isfinite(array).all() else None


def is_whole(value: object) -> bool:
    """Whether a value is a whole number of 64 bits: 1 or 1.0, not True."""
    if type(value) is float:
        return value.is_integer() and abs(value) < 2.0**63
    return type(value) is int and -(2**63) <= value < 2**63


def _chunks(lengths: np.ndarray) -> list[slice]:
    """Parts of a list whose items have these lengths, about _CHUNK in a part."""
    part = (np.cumsum(lengths) - lengths) // _CHUNK
    starts = np.flatnonzero(np.diff(part, prepend=-1)).tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)])]


def measure_polygons(polygons: list[list]) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        polygons: n lists [x, y, x, y, x, y, ...], none empty.

    Returns:
        Left, top, right and bottom of each, shape (n, 4), and the area, shape (n,); nan where one
        has anything but finite numbers.
    """
    extents, areas = np.empty((len(polygons), 4)), np.empty(len(polygons))
    lengths = np.array(list(map(len, polygons)), dtype=int)
    for part in _chunks(lengths):
        flat = to_floats(list(chain.from_iterable(polygons[part])))
        if flat is None:
            of_each = [(to_floats(x), len(x)) for x in polygons[part]]
            flat = np.concatenate([np.full(n, np.nan) if x is None else x for x, n in of_each])
        extents[part], areas[part] = measure_points(flat.reshape(-1, 2), lengths[part] // 2)
    return extents, areas


def measure_points(points: np.ndarray, num_points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :func:`measure_polygons` of polygons that are one array.

    Args:
        points: x and y of the points of n polygons, one after the other, shape (points, 2).
        num_points: of each polygon, none 0; int64, shape (n,).
    """
    ends = np.cumsum(num_points)
    starts = ends - num_points
    low = np.minimum.reduceat(points, starts)
    extents = np.concatenate([low, np.maximum.reduceat(points, starts)], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        points = points - np.repeat(low, num_points, axis=0)
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        x, y = points.T
        doubled = np.add.reduceat(x * y[following] - x[following] * y, starts)
    return extents, abs(doubled) / 2


def covers_image(extents: np.ndarray, areas: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """
    Whether polygons have an area and lie, at least with their extents, in their image.

    Args:
        extents, areas: as :func:`measure_polygons` returns them.
        sizes: (height, width) of the images, shape (n, 2) or (2,); nan: not known, any will do.

    Returns:
        bool, shape (n,).
    """
    is_outside = (extents[:, 2:] <= 0) | (extents[:, :2] >= sizes[..., ::-1])
    return (areas > 0) & ~is_outside.any(axis=1)


def are_rectangles(extents: np.ndarray, areas: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """
    Whether polygons are the rectangles of these boxes, to a pixel.

    Args:
        extents, areas: as :func:`measure_polygons` returns them.
        corners: left, top, right and bottom of the box of each polygon's object, shape (n, 4).

    Returns:
        bool, shape (n,).
    """
    sides = extents[:, 2:] - extents[:, :2]
    # A polygon as large as its extents is a rectangle.
    is_full = areas >= 0.999 * sides[:, 0] * sides[:, 1]
    return is_full & (abs(extents - corners) <= BOX_TOLERANCE).all(axis=1) & (areas > 0)


def have_pixels(segmentations: list, sizes: np.ndarray) -> np.ndarray:
    """
    Whether segmentations of a json are masks that cover something of their image.

    Args:
        segmentations: n values of "segmentation", of any kind; polygons may be arrays.
        sizes: (height, width) of the images, shape (n, 2); nan: not known.

    Returns:
        bool, shape (n,); False where there is no mask, or none that can be read.
    """
    found = np.zeros(len(segmentations), dtype=bool)
    lists = {i: _as_lists(x) for i, x in enumerate(segmentations) if type(x) is list}
    rows = [i for i, x in lists.items() if x is not None]
    valid = [valid_polygons(lists[i]) for i in rows]
    owners = np.repeat(np.array(rows, dtype=int), [len(x) for x in valid])
    extents, areas = measure_polygons(list(chain.from_iterable(valid)))
    found[owners[covers_image(extents, areas, sizes[owners])]] = True
    rows = [i for i, x in enumerate(segmentations) if type(x) is dict]
    counts = [segmentations[i].get("counts") for i in rows]
    counts = [x.decode("latin-1") if type(x) is bytes else x for x in counts]
    pixels, areas, _ = measure_rles(counts)
    expected = sizes[rows].prod(axis=1)
    found[rows] = (areas > 0) & ((pixels == expected) | np.isnan(expected))
    return found


def _as_lists(polygons: list) -> list[list] | None:
    # None where something else is among them.
    types = set(map(type, polygons))
    if types <= {list}:
        return polygons
    return [np.asarray(x).tolist() for x in polygons] if types <= {list, np.ndarray} else None


def measure_rles(counts: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Measure run-length masks without pycocotools, whose C code trusts them.

    Args:
        counts: "counts" of n RLEs, strings or lists of run lengths, as json holds them.

    Returns:
        Pixels of the whole image and of the mask, int64 of shape (n,) each; -1 where the runs
        cannot be read or one is negative. And whether a run but the first has length 0, bool.
    """
    pixels, areas = np.full((2, len(counts)), -1, dtype=np.int64)
    has_empty_run = np.zeros(len(counts), dtype=bool)
    strings = {}
    for i, runs in enumerate(counts):
        if type(runs) is str:
            # Whatever is not ASCII becomes bytes that no RLE has.
            strings[i] = runs.encode("utf-8", "surrogatepass") or b"\0"
        elif type(runs) is list and set(map(type, runs)) <= {int} and min(runs, default=-1) >= 0:
            total = sum(runs)
            if total < MAX_PIXELS:
                pixels[i], areas[i] = total, sum(runs[1::2])
                has_empty_run[i] = 0 in runs[1:]
    rows, values = list(strings), list(strings.values())
    for part in _chunks(np.array(list(map(len, values)), dtype=int)):
        index = rows[part]
        pixels[index], areas[index], has_empty_run[index] = _measure_strings(values[part])
    return pixels, areas, has_empty_run


def _measure_strings(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = np.array(list(map(len, strings)))
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(strings)), lengths)
    data = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    is_bad = (data[ends - 1] & 32) > 0
    is_bad[owner[(data < 0) | (data > 63)]] = True
    data[is_bad[owner]] = 0
    # A number is 5 bits a character, the lowest first; all but its last character have bit 32.
    stops = np.flatnonzero(data < 32) + 1
    starts = np.append(0, stops[:-1])
    num_characters = stops - starts
    is_bad[owner[starts[num_characters > _MAX_CHARACTERS]]] = True
    bits = 5 * np.minimum(np.arange(len(data)) - np.repeat(starts, num_characters), 10)
    numbers = np.add.reduceat((data & 31) << bits, starts)
    numbers -= ((data[stops - 1] & 16) << 1) << (5 * (np.minimum(num_characters, 11) - 1))
    owner = owner[starts]
    numbers[is_bad[owner]] = 0
    # From the fourth number on, it is the difference to the run before the last.
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    order = np.arange(len(owner)) - first[owner]
    runs = numbers.copy()
    for parity in (0, 1):
        part = np.flatnonzero((order % 2 == parity) & (order > 0))
        sums = np.cumsum(numbers[part])
        heads = np.flatnonzero(np.diff(owner[part], prepend=-1))
        before = sums[heads] - numbers[part[heads]]
        runs[part] = sums - np.repeat(before, np.diff(np.append(heads, len(part))))
    is_bad |= np.minimum.reduceat(runs, first) < 0
    pixels = np.add.reduceat(runs, first)
    areas = np.add.reduceat(np.where(order % 2 == 1, runs, 0), first)
    has_empty_run = np.logical_or.reduceat((runs == 0) & (order > 0), first)
    return np.where(is_bad, -1, pixels), np.where(is_bad, -1, areas), has_empty_run
