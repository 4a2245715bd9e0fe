"""
Masks of COCO jsons: which are usable, measured for many objects at once.

pycocotools trusts a mask. Its C code reads past the end of a cut RLE, writes past its memory where
runs of length 0 meet, and walks along a polygon however far that goes. So masks are measured here,
in numpy, before it sees them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import msgspec
import numpy as np
import pycocotools.mask as mask_util

__all__ = [
    "BOX_TOLERANCE",
    "HUMAN",
    "MAX_PIXELS",
    "MAX_PIXELS_OUTSIDE",
    "MODEL",
    "MaskState",
    "MeasuredMasks",
    "compress_mask",
    "has_mask",
    "is_from_model",
    "measure_masks",
    "measure_polygons",
    "polygons_cover",
    "valid_polygons",
]

# Values of an annotation's "mask_source". Without the key a mask is a human's.
HUMAN, MODEL = "human", "model"

# pycocotools shifts 32-bit integers; an RLE of more pixels may need more.
MAX_PIXELS = 2**29
# pycocotools keeps every fifth of a pixel along a polygon, so one that ends far away takes all
# memory.
MAX_PIXELS_OUTSIDE = 100_000
# Exports that round or count pixels from 1 move a box by no more than this.
BOX_TOLERANCE = 1.0

# A polygon needs three points; pycocotools would read four numbers as a box.
_MIN_COORDINATES = 6
# Masks that are measured at a time.
_CHUNK_MASKS = 2**14
# Of 5 bits each, with a sign: enough for every run below MAX_PIXELS.
_MAX_CHARACTERS = 6


class MaskState(enum.IntEnum):
    """What the "segmentation" of an object is; from ``NOT_A_MASK`` on it cannot be used."""

    NONE = 0  # missing, null or []
    MASK = 1  # covers something of its image
    TOO_SHORT = 2  # no polygon of three points
    EMPTY = 3  # covers nothing of its image
    NOT_A_MASK = 4  # neither polygons of finite numbers, nor an RLE
    TOO_FAR = 5  # a polygon ends more than MAX_PIXELS_OUTSIDE from its image
    WRONG_SIZE = 6  # an RLE of another size than its image
    BROKEN_RUNS = 7  # an RLE whose runs cannot be read, or do not add up to its image


@dataclass
class MeasuredMasks:
    """
    Attributes:
        state: values of :class:`MaskState`, int8 of shape (n,).
        has_short_polygon: whether there is a polygon of fewer than three points, or with half a
            point; bool, shape (n,).
        is_rectangle: whether the mask is one polygon, the rectangle of the object's box to a pixel;
            bool, shape (n,).
        has_empty_run: whether an RLE has a run of length 0 that is not its first; bool, shape (n,).
    """

    state: np.ndarray
    has_short_polygon: np.ndarray
    is_rectangle: np.ndarray
    has_empty_run: np.ndarray


def is_from_model(annotation: dict) -> bool:
    """
    Whether the mask of an annotation is one that a model made: SAM, an earlier run, ...

    Args:
        annotation: of a COCO json, or in Detectron2's format; its mask may be missing.
    """
    return annotation.get("mask_source") == MODEL


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


def valid_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Those of at least three points, with two numbers each."""
    return [x for x in polygons if len(x) >= _MIN_COORDINATES and len(x) % 2 == 0]


def measure_masks(
    segmentations: Sequence, sizes: np.ndarray, boxes: np.ndarray | None = None
) -> MeasuredMasks:
    """
    Find out what masks are, without pycocotools.

    Args:
        segmentations: n values of "segmentation", of any kind, as json holds them.
        sizes: (height, width) of the images, shape (n, 2); nan: not known, any will do.
        boxes: XYWH of the objects, shape (n, 4); None: no mask is compared with its box.
    """
    num = len(segmentations)
    found = MeasuredMasks(np.zeros(num, np.int8), *np.zeros((3, num), dtype=bool))
    sizes = np.asarray(sizes, dtype=np.float64).reshape(num, 2)
    boxes = np.full((num, 4), np.nan) if boxes is None else boxes
    for start in range(0, num, _CHUNK_MASKS):
        part = slice(start, start + _CHUNK_MASKS)
        views = MeasuredMasks(*(x[part] for x in vars(found).values()))
        _measure_objects_of_polygons(views, segmentations[part], sizes[part], boxes[part])
        _measure_rles(views, segmentations[part], sizes[part])
    return found


def _measure_objects_of_polygons(
    found: MeasuredMasks, segmentations: Sequence, sizes: np.ndarray, boxes: np.ndarray
) -> None:
    rows, objects = [], []
    for i, segmentation in enumerate(segmentations):
        if segmentation is None or type(segmentation) is dict:
            continue
        if type(segmentation) is list and not segmentation:
            continue
        try:
            objects.append(msgspec.convert(segmentation, list[list[float]]))
            rows.append(i)
        except (msgspec.ValidationError, UnicodeEncodeError):  # the latter: half a surrogate pair
            found.state[i] = MaskState.NOT_A_MASK
    polygons = list(chain.from_iterable(objects))
    owners = np.repeat(np.array(rows, dtype=int), [len(x) for x in objects])
    lengths = np.array([len(x) for x in polygons], dtype=int)
    is_short = (lengths < _MIN_COORDINATES) | (lengths % 2 == 1)
    found.has_short_polygon[owners[is_short]] = True
    extents, areas = measure_polygons(valid_polygons(polygons))
    owners = owners[~is_short]
    limits = sizes[owners, ::-1]
    covers = _covers(extents, areas, limits)
    is_far = extents[:, :2] < -MAX_PIXELS_OUTSIDE
    is_far |= extents[:, 2:] > limits + MAX_PIXELS_OUTSIDE
    # The last state that is set holds.
    found.state[rows] = MaskState.TOO_SHORT
    found.state[owners] = MaskState.EMPTY
    found.state[owners[covers]] = MaskState.MASK
    found.state[owners[is_far.any(axis=1)]] = MaskState.TOO_FAR
    found.state[owners[np.isnan(areas)]] = MaskState.NOT_A_MASK
    sides = extents[:, 2:] - extents[:, :2]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)[owners]
    # A polygon as large as its extents is a rectangle.
    is_rectangle = covers & (areas >= 0.999 * sides.prod(axis=1))
    is_rectangle &= (abs(extents - corners) <= BOX_TOLERANCE).all(axis=1)
    is_rectangle &= np.bincount(owners, minlength=len(segmentations))[owners] == 1
    found.is_rectangle[owners[is_rectangle]] = True


def measure_polygons(polygons: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """
    Args:
        polygons: n of them, each [x, y, x, y, ...] of numbers, or an array; none empty.

    Returns:
        Left, top, right and bottom of each, shape (n, 4), and the area, shape (n,); nan where one
        has anything but finite numbers.
    """
    if not polygons:
        return np.zeros((0, 4)), np.zeros(0)
    points = np.fromiter(chain.from_iterable(polygons), np.float64).reshape(-1, 2)
    num_points = np.array([len(x) // 2 for x in polygons])
    ends = np.cumsum(num_points)
    starts = ends - num_points
    low = np.minimum.reduceat(points, starts)
    extents = np.concatenate([low, np.maximum.reduceat(points, starts)], axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = (points - np.repeat(low, num_points, axis=0)).T
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = starts
        doubled = np.add.reduceat(x * y[following] - x[following] * y, starts)
    return extents, abs(doubled) / 2


def polygons_cover(objects: Sequence[Sequence[np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """
    Whether objects have a polygon with an area that lies, at least with its extents, in the image.

    Args:
        objects: the polygons of each object, of three points or more.
        size: height and width of the image.

    Returns:
        bool, shape (number of objects,).
    """
    owners = np.repeat(np.arange(len(objects)), [len(x) for x in objects])
    found = np.zeros(len(objects), dtype=bool)
    found[owners[_covers(*measure_polygons(list(chain.from_iterable(objects))), size[::-1])]] = True
    return found


def _covers(extents: np.ndarray, areas: np.ndarray, limits: object) -> np.ndarray:
    # limits: (width, height) of the image, or of each image.
    is_outside = (extents[:, 2:] <= 0) | (extents[:, :2] >= limits)
    return (areas > 0) & ~is_outside.any(axis=1)


def _measure_rles(found: MeasuredMasks, segmentations: Sequence, sizes: np.ndarray) -> None:
    # -1 pixels where the runs cannot be read or one is negative.
    pixels, areas = np.full((2, len(segmentations)), -1, dtype=np.int64)
    rows = [i for i, x in enumerate(segmentations) if type(x) is dict]
    strings = {}
    for i in rows:
        counts = segmentations[i].get("counts")
        if type(counts) in (str, bytes) and counts:
            # Whatever is not ASCII becomes bytes that no RLE has.
            is_text = type(counts) is str
            strings[i] = counts.encode("utf-8", "surrogatepass") if is_text else counts
        elif type(counts) is list and set(map(type, counts)) == {int} and min(counts) >= 0:
            if sum(counts) < MAX_PIXELS:
                pixels[i], areas[i] = sum(counts), sum(counts[1::2])
                found.has_empty_run[i] = 0 in counts[1:]
    if strings:
        index = list(strings)
        measured = _measure_strings(list(strings.values()))
        pixels[index], areas[index], found.has_empty_run[index] = measured
    for i in rows:
        size = segmentations[i].get("size")
        is_known = not np.isnan(sizes[i]).any()
        if is_known and (type(size) not in (list, tuple) or list(size) != sizes[i].tolist()):
            found.state[i] = MaskState.WRONG_SIZE
        elif pixels[i] < 0 or is_known and pixels[i] != sizes[i].prod():
            found.state[i] = MaskState.BROKEN_RUNS
        else:
            found.state[i] = MaskState.MASK if areas[i] > 0 else MaskState.EMPTY


def _measure_strings(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Of compressed RLEs. A number is 5 bits a character, the lowest first; all but its last
    # character have bit 32, and the highest bit of the last is the sign.
    lengths = np.array([len(x) for x in strings])
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(strings)), lengths)
    data = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    is_bad = data[ends - 1] >= 32
    is_bad[owner[(data < 0) | (data > 63)]] = True
    data[ends - 1] &= 31  # so that no number runs on into the next mask
    stops = np.flatnonzero(data < 32) + 1
    starts = np.append(0, stops[:-1])
    num_characters = stops - starts
    is_bad[owner[starts[num_characters > _MAX_CHARACTERS]]] = True
    shifts = 5 * (np.arange(len(data)) - np.repeat(starts, num_characters))
    numbers = np.add.reduceat((data & 31) << np.minimum(shifts, 50), starts)
    sign_shifts = 5 * np.minimum(num_characters - 1, 10)
    numbers -= ((data[stops - 1] & 16) << 1) << sign_shifts
    owner = owner[starts]
    # From the fourth number on, it is the difference to the run before the last: of all numbers but
    # the first, those at odd places and those at even ones are two running sums.
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    place = np.arange(len(owner)) - first[owner]
    runs = numbers.copy()
    for parity in (0, 1):
        part = np.flatnonzero((place % 2 == parity) & (place > 0))
        sums = np.cumsum(numbers[part])
        heads = np.flatnonzero(np.diff(owner[part], prepend=-1))
        before = sums[heads] - numbers[part[heads]]
        runs[part] = sums - np.repeat(before, np.diff(np.append(heads, len(part))))
    is_bad |= np.minimum.reduceat(runs, first) < 0
    pixels = np.add.reduceat(runs, first)
    areas = np.add.reduceat(runs * (place % 2), first)
    has_empty_run = np.logical_or.reduceat((runs == 0) & (place > 0), first)
    return np.where(is_bad, -1, pixels), np.where(is_bad, -1, areas), has_empty_run


def compress_mask(
    segmentation: list | dict, size: tuple[int, int], has_empty_run: bool = False
) -> dict:
    """
    Args:
        segmentation: polygons or an RLE whose :class:`MaskState` says that it can be used.
        size: height and width of the image.
        has_empty_run: runs of length 0, on which pycocotools goes wrong, are joined.

    Returns:
        The compressed RLE {"size": [height, width], "counts": bytes}.
    """
    size = [int(x) for x in size]
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(valid_polygons(segmentation), *size))
    else:
        counts = segmentation["counts"]
        if isinstance(counts, list):
            counts = mask_util.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
        elif isinstance(counts, str):
            counts = counts.encode("ascii")
        rle = {"size": size, "counts": counts}
        if has_empty_run:
            rle = mask_util.encode(mask_util.decode(rle))
    return {"size": size, "counts": rle["counts"]}
