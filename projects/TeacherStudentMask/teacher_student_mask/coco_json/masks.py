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
    "extents_of_rles",
    "has_mask",
    "is_from_model",
    "is_outline",
    "measure_masks",
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
# A polygon of less than this share of its extents may have crossing edges, unless pycocotools fills
# no more of it than a thin outline has.
_SMALL_SHARE, _THIN_SHARE, _MIN_SIDE_OF_CROSSING = 0.25, 0.1, 4
# Masks that are measured at a time.
_CHUNK_MASKS = 2**14
# Of 5 bits each, with a sign: enough for every run below MAX_PIXELS.
_MAX_CHARACTERS = 6


class MaskState(enum.IntEnum):
    """What the "segmentation" of an object is; from ``NOT_A_MASK`` on it cannot be used."""

    NONE = 0  # missing, null or []
    MASK = 1  # covers something of its image
    TOO_SHORT = 2  # one or two points
    EMPTY = 3  # covers nothing of its image
    NOT_A_MASK = 4  # neither polygons of finite numbers, nor an RLE: point pairs, for instance
    TOO_FAR = 5  # a polygon ends more than MAX_PIXELS_OUTSIDE from its image
    WRONG_SIZE = 6  # an RLE of another size than its image
    BROKEN_RUNS = 7  # an RLE whose runs cannot be read, or do not add up to its image


@dataclass
class MeasuredMasks:
    """Arrays with a row for each of n objects."""

    state: np.ndarray  # values of MaskState, int8
    is_rectangle: np.ndarray  # one polygon, the rectangle of the object's box to a pixel; bool
    # Edges of a polygon cross, so that its area by the shoelace formula is less than half of the
    # pixels that pycocotools fills; bool.
    is_crossing: np.ndarray
    extents: np.ndarray  # left, top, right and bottom, (n, 4); nan where there is no mask


def is_from_model(annotation: dict) -> bool:
    """
    Whether the mask of an annotation, in COCO's or Detectron2's format, is one that a model made.
    """
    return annotation.get("mask_source") == MODEL


def has_mask(annotation: dict) -> bool:
    """
    Whether a COCO annotation carries a mask: an RLE, or at least one polygon of three points. If
    not ("segmentation" may be missing, null or empty), the object is known by its box only.
    """
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return bool(segmentation.get("counts"))
    return bool(valid_polygons(segmentation or []))


def valid_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Those of at least three points, with two numbers each."""
    return [x for x in polygons if len(x) >= _MIN_COORDINATES and len(x) % 2 == 0]


def is_outline(polygons: Sequence[Sequence[float]]) -> bool:
    """
    Whether lists of numbers are polygons, or at most two points, and no outline in another form:
    three points or more in pieces, such as [[x, y], [x, y], [x, y]], or with half a point.
    """
    lengths = [len(x) for x in polygons]
    is_short = sum(lengths) < _MIN_COORDINATES
    return not any(x % 2 for x in lengths) and (is_short or max(lengths) >= _MIN_COORDINATES)


def measure_masks(
    segmentations: Sequence, sizes: np.ndarray, boxes: np.ndarray | None = None
) -> MeasuredMasks:
    """
    Find out what masks are, without pycocotools.

    Args:
        segmentations: n values of "segmentation", of any kind, as json holds them.
        sizes: (height, width) of the images, shape (n, 2); nan: polygons of any size will do.
        boxes: XYWH of the objects, shape (n, 4); None: rectangles, crossing edges and extents are
            not looked for.
    """
    num = len(segmentations)
    flags, extents = np.zeros((2, num), dtype=bool), np.full((num, 4), np.nan)
    found = MeasuredMasks(np.zeros(num, np.int8), *flags, extents)
    sizes = np.asarray(sizes, dtype=np.float64).reshape(num, 2)
    for start in range(0, num, _CHUNK_MASKS):
        part = slice(start, start + _CHUNK_MASKS)
        views = MeasuredMasks(*(x[part] for x in vars(found).values()))
        of_part = None if boxes is None else boxes[part]
        _measure_outlines(views, segmentations[part], sizes[part], of_part)
        _measure_rles(views, segmentations[part], sizes[part], boxes is not None)
    return found


def _measure_outlines(
    found: MeasuredMasks, segmentations: Sequence, sizes: np.ndarray, boxes: np.ndarray | None
) -> None:
    rows, objects = [], []
    for i, segmentation in enumerate(segmentations):
        if segmentation is None or segmentation == [] or type(segmentation) is dict:
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
    # Most have nothing but polygons.
    other_forms = [i for i in np.unique(owners[is_short]) if not is_outline(segmentations[i])]
    polygons, owners = valid_polygons(polygons), owners[~is_short]
    extents, areas = _measure_polygons(polygons)
    limits = sizes[owners, ::-1]
    is_far = (extents[:, :2] < -MAX_PIXELS_OUTSIDE).any(axis=1)
    is_far |= (extents[:, 2:] > limits + MAX_PIXELS_OUTSIDE).any(axis=1)
    covers = _covers(polygons, extents, areas, limits)
    # The last state that is set holds.
    found.state[rows] = MaskState.TOO_SHORT
    found.state[owners] = MaskState.EMPTY
    found.state[owners[covers]] = MaskState.MASK
    found.state[owners[is_far]] = MaskState.TOO_FAR
    found.state[owners[np.isnan(areas)]] = MaskState.NOT_A_MASK
    found.state[other_forms] = MaskState.NOT_A_MASK
    if boxes is None or not len(owners):
        return
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    found.extents[owners[first], :2] = np.minimum.reduceat(extents[:, :2], first)
    found.extents[owners[first], 2:] = np.maximum.reduceat(extents[:, 2:], first)
    sides = extents[:, 2:] - extents[:, :2]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)[owners]
    # A polygon as large as its extents is a rectangle.
    is_rectangle = covers & (areas >= 0.999 * sides.prod(axis=1))
    is_rectangle &= (abs(extents - corners) <= BOX_TOLERANCE).all(axis=1)
    is_rectangle &= np.bincount(owners, minlength=len(segmentations))[owners] == 1
    found.is_rectangle[owners[is_rectangle]] = True
    # Where edges cross, parts count as negative, and little of the extents is left.
    is_doubtful = covers & ~is_far & (areas < _SMALL_SHARE * sides.prod(axis=1))
    is_doubtful &= (sides >= _MIN_SIDE_OF_CROSSING).all(axis=1)
    for i in np.flatnonzero(is_doubtful).tolist():
        num_pixels = _filled_pixels(polygons[i], extents[i], limits[i])
        is_thick = num_pixels >= _THIN_SHARE * sides[i].prod()
        found.is_crossing[owners[i]] |= is_thick and areas[i] < num_pixels / 2


def _measure_polygons(polygons: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    # Left, top, right and bottom of each, shape (n, 4), and the area, shape (n,); nan where one has
    # anything but finite numbers.
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
    polygons = list(chain.from_iterable(objects))
    limits = np.full((len(polygons), 2), size[::-1], dtype=np.float64)
    covers = _covers(polygons, *_measure_polygons(polygons), limits)
    return np.isin(np.arange(len(objects)), owners[covers])


def _covers(
    polygons: Sequence, extents: np.ndarray, areas: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    # limits: (width, height) of each image.
    covers = ~((extents[:, 2:] <= 0) | (extents[:, :2] >= limits)).any(axis=1)
    # Where edges cross, the parts may cancel out; pycocotools fills both.
    for i in np.flatnonzero(covers & (areas == 0)).tolist():
        covers[i] = _filled_pixels(polygons[i], extents[i], limits[i]) > 0
    return covers & ~np.isnan(areas)


def _filled_pixels(polygon: Sequence[float], extents: np.ndarray, limits: np.ndarray) -> int:
    # By pycocotools. Where the size of the image is not known, in one that holds the polygon.
    width, height = np.where(np.isnan(limits), np.ceil(extents[2:]) + 1, limits)
    reach = max(-extents.min(), *(extents[2:] - (width, height)))
    if not reach <= MAX_PIXELS_OUTSIDE or width * height >= MAX_PIXELS:
        return 0
    (rle,) = mask_util.frPyObjects([list(polygon)], int(height), int(width))
    return int(mask_util.area(rle))


def _measure_rles(
    found: MeasuredMasks, segmentations: Sequence, sizes: np.ndarray, with_extents: bool
) -> None:
    masks = {}
    for i, rle in enumerate(segmentations):
        if type(rle) is not dict:
            continue
        runs, size = _runs_of(rle.get("counts")), rle.get("size")
        if type(size) not in (list, tuple) or list(size) != sizes[i].tolist():
            found.state[i] = MaskState.WRONG_SIZE
        elif runs is None or runs.sum() != sizes[i].prod():
            found.state[i] = MaskState.BROKEN_RUNS
        else:
            found.state[i] = MaskState.MASK if runs[1::2].any() else MaskState.EMPTY
            if runs[1::2].any():
                masks[i] = rle
    if with_extents:
        found.extents[list(masks)] = extents_of_rles(list(masks.values()))


def _runs_of(counts: object) -> np.ndarray | None:
    # The run lengths of an RLE; None: they cannot be read, or one is negative.
    if type(counts) is list and set(map(type, counts)) == {int}:
        return np.array(counts) if min(counts) >= 0 and sum(counts) < MAX_PIXELS else None
    if type(counts) not in (str, bytes) or not counts:
        return None
    # Whatever is not ASCII becomes bytes that no RLE has.
    text = counts.encode("utf-8", "surrogatepass") if type(counts) is str else counts
    data = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    # A number is 5 bits a character, the lowest first; all but its last character have bit 32, and
    # the highest bit of the last is the sign.
    stops = np.flatnonzero(data < 32) + 1
    if data.min() < 0 or data.max() > 63 or data[-1] >= 32:
        return None
    starts = np.append(0, stops[:-1])
    lengths = stops - starts
    if lengths.max() > _MAX_CHARACTERS:
        return None
    shifts = 5 * (np.arange(len(data)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((data & 31) << shifts, starts)
    runs -= (data[stops - 1] & 16) << (5 * lengths - 4)
    # From the fourth number on, it is the difference to the run before the last.
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return runs if runs.min() >= 0 else None


def extents_of_rles(rles: Sequence[dict], by_rows: bool = False) -> np.ndarray:
    """
    Left, top, right and bottom of RLEs that can be used, shape (n, 4).

    Args:
        by_rows: read the runs as those of the rows of the image, not of its columns.
    """
    if not rles:
        return np.zeros((0, 4))
    order = [1, 0] if by_rows else [0, 1]
    boxes = mask_util.toBbox([compress_mask(x, [x["size"][i] for i in order]) for x in rles])
    low = boxes[:, :2]
    return np.concatenate([low[:, order], (low + boxes[:, 2:])[:, order]], axis=1)


def compress_mask(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """
    Args:
        segmentation: polygons or an RLE whose :class:`MaskState` says that it can be used.
        size: height and width of the image.

    Returns:
        The compressed RLE {"size": [height, width], "counts": bytes}. Runs of length 0, on which
        pycocotools goes wrong, are joined.
    """
    size = [int(x) for x in size]
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(valid_polygons(segmentation), *size))
        return {"size": size, "counts": rle["counts"]}
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = mask_util.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
    elif isinstance(counts, str):
        counts = counts.encode("ascii")
    rle = {"size": size, "counts": counts}
    if not _runs_of(counts)[1:].all():
        rle["counts"] = mask_util.encode(mask_util.decode(rle))["counts"]
    return rle
