"""
Masks of COCO jsons: which are usable, measured for many objects at once.

pycocotools trusts a mask. Its C code reads past the end of a cut RLE, writes past its memory where
runs of length 0 meet, and walks along a polygon however far that goes. So masks are measured here,
in numpy, before it sees them.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np
import pycocotools.mask as mask_util

__all__ = [
    "BOX_TOLERANCE",
    "HUMAN",
    "KEYS_OF_MODELS",
    "MAX_COORDINATE",
    "MAX_PIXELS",
    "MODEL",
    "MaskState",
    "MeasuredMasks",
    "compress_mask",
    "decode_mask",
    "forget_mask",
    "has_mask",
    "is_from_model",
    "measure_masks",
    "valid_polygons",
]

# Values of an annotation's "mask_source". Without the key a mask is a human's.
HUMAN, MODEL = "human", "model"
# What tsmask complete says of a mask.
KEYS_OF_MODELS = ("mask_source", "score", "teacher_student_agreement", "mask_fallback")

# pycocotools shifts 32-bit integers; an RLE of more pixels may need more.
MAX_PIXELS = 2**29
# pycocotools keeps every fifth of a pixel along a polygon, so one that ends far away takes all
# memory. Nor has an image longer sides.
MAX_COORDINATE = 100_000
# Exports that round or count pixels from 1 move a box by no more than this.
BOX_TOLERANCE = 1.0

# A polygon needs three points; pycocotools would read four numbers as a box.
_MIN_COORDINATES = 6
# A polygon of less than this share of its extents may have crossing edges, unless pycocotools fills
# no more of it than a thin outline has.
_SMALL_SHARE, _THIN_SHARE, _MIN_SIDE_OF_CROSSING = 0.25, 0.1, 4
_Coordinate = Annotated[float, msgspec.Meta(ge=-MAX_COORDINATE, le=MAX_COORDINATE)]
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
    NOT_A_MASK = 4  # neither polygons nor an RLE: point pairs, nan, or a point too far away
    BROKEN_RLE = 5  # not of its image's size, or its runs cannot be read or do not add up to it


@dataclass
class MeasuredMasks:
    """Arrays with a row for each of n objects."""

    state: np.ndarray  # values of MaskState, int8
    is_rectangle: np.ndarray  # one polygon, the rectangle of the object's box to a pixel; bool
    # Edges of a polygon cross, so that its area by the shoelace formula is less than half of the
    # pixels that pycocotools fills; bool.
    is_crossing: np.ndarray
    has_short_part: np.ndarray  # beside a polygon, an outline of one or two points; bool
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


def forget_mask(annotation: dict) -> None:
    """
    Take the mask out of a COCO annotation; of a model's with what the model has said of it.

    "area", which COCO counts in the mask, becomes that of the box: it would tell how much of the
    box the object fills.
    """
    for key in ("segmentation", *(KEYS_OF_MODELS if is_from_model(annotation) else ())):
        annotation.pop(key, None)
    annotation.pop("mask_source", None)
    if "area" in annotation:
        width, height = annotation["bbox"][2:]
        annotation["area"] = width * height


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
        sizes: (height, width) of the images, shape (n, 2); inf: polygons of any size will do.
        boxes: XYWH of the objects, shape (n, 4); None: nothing but ``state`` is measured.
    """
    chunks = range(0, max(1, len(segmentations)), _CHUNK_MASKS)
    parts = [slice(start, start + _CHUNK_MASKS) for start in chunks]
    columns = zip(
        *(_measure(segmentations[x], sizes[x], None if boxes is None else boxes[x]) for x in parts)
    )
    return MeasuredMasks(*map(np.concatenate, columns))


def _measure(segmentations: Sequence, sizes: np.ndarray, boxes: np.ndarray | None) -> tuple:
    # The columns of MeasuredMasks.
    num = len(segmentations)
    state = np.full(num, MaskState.NONE, dtype=np.int8)
    is_rectangle, is_crossing, has_short_part = np.zeros((3, num), dtype=bool)
    object_extents = np.full((num, 4), np.nan)
    outlines, owners = [], []
    for i, segmentation in enumerate(segmentations):
        if type(segmentation) is dict:
            state[i], object_extents[i] = _measure_rle(segmentation, sizes[i].tolist())
        elif segmentation is not None and segmentation != []:
            try:
                found = msgspec.convert(segmentation, list[list[_Coordinate]])
            except (msgspec.ValidationError, UnicodeEncodeError):  # half a surrogate pair
                state[i] = MaskState.NOT_A_MASK
                continue
            outlines += found
            owners += [i] * len(found)
    owners, lengths = np.array(owners, dtype=int), np.array([*map(len, outlines)], dtype=int)
    # The last state that is set holds.
    state[owners] = MaskState.TOO_SHORT
    # Three points or more, in pieces such as [[x, y], [x, y], [x, y]].
    state[np.bincount(owners, lengths, num) >= _MIN_COORDINATES] = MaskState.NOT_A_MASK
    of_half_points = owners[lengths % 2 == 1]
    has_short_part[owners[lengths < _MIN_COORDINATES]] = True
    polygons = valid_polygons(outlines)
    owners = owners[(lengths >= _MIN_COORDINATES) & (lengths % 2 == 0)]
    limits = sizes[owners, ::-1]
    extents, areas, num_filled = _measure_polygons(polygons, limits, boxes is not None)
    low, high = extents[:, :2], extents[:, 2:]
    covers = (high > 0).all(axis=1) & (low < limits).all(axis=1)
    covers &= (areas > 0) | (num_filled > 0)
    state[owners] = MaskState.EMPTY
    state[owners[covers]] = MaskState.MASK
    state[of_half_points] = MaskState.NOT_A_MASK
    has_short_part &= state == MaskState.MASK
    if boxes is None:
        return state, is_rectangle, is_crossing, has_short_part, object_extents

    first = np.flatnonzero(np.diff(owners, prepend=-1))
    object_extents[owners[first], :2] = np.minimum.reduceat(low, first)
    object_extents[owners[first], 2:] = np.maximum.reduceat(high, first)
    sides = high - low
    is_thick = (sides >= _MIN_SIDE_OF_CROSSING).all(axis=1)
    is_thick &= num_filled >= _THIN_SHARE * sides.prod(axis=1)
    is_crossing[owners[is_thick & (areas < num_filled / 2)]] = True
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)[owners]
    # A polygon as large as its extents is a rectangle.
    is_box = covers & (areas >= 0.999 * sides.prod(axis=1))
    is_box &= (abs(extents - corners) <= BOX_TOLERANCE).all(axis=1)
    is_rectangle[owners[is_box & (np.bincount(owners)[owners] == 1)]] = True
    return state, is_rectangle, is_crossing, has_short_part, object_extents


def _measure_polygons(
    polygons: Sequence[Sequence[float]], limits: np.ndarray, may_cross: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Args:
        limits: (width, height) of the image of each of n polygons, shape (n, 2).
        may_cross: whether edges that cross are looked for.

    Returns:
        Left, top, right and bottom, shape (n, 4); the area by the shoelace formula, shape (n,); and
        the pixels that pycocotools fills, shape (n,), 0 where the area is enough to know.
    """
    points = np.fromiter(chain.from_iterable(polygons), np.float64).reshape(-1, 2)
    num_points = np.array([len(x) // 2 for x in polygons], dtype=int)
    ends = np.cumsum(num_points)
    starts = ends - num_points
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    x, y = (points - np.repeat(low, num_points, axis=0)).T
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    areas = abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    is_doubtful = areas == 0
    if may_cross:
        # Where edges cross, parts count as negative, and little of the extents is left.
        is_small = areas < _SMALL_SHARE * (high - low).prod(axis=1)
        is_doubtful |= is_small & (high - low >= _MIN_SIDE_OF_CROSSING).all(axis=1)
    is_doubtful &= (limits.prod(axis=1) < MAX_PIXELS) & ~((high <= 0) | (low >= limits)).any(axis=1)
    num_filled = np.zeros(len(polygons))
    for i in np.flatnonzero(is_doubtful).tolist():
        width, height = limits[i].astype(int).tolist()
        (rle,) = mask_util.frPyObjects([list(polygons[i])], height, width)
        num_filled[i] = mask_util.area(rle)
    return np.concatenate([low, high], axis=1), areas, num_filled


def _measure_rle(rle: dict, size: list[float]) -> tuple[MaskState, Sequence[float]]:
    # State, and left, top, right and bottom.
    given, runs = rle.get("size"), _runs_of(rle.get("counts"))
    is_of_size = type(given) in (list, tuple) and list(given) == size
    if not is_of_size or runs is None or runs.sum() != size[0] * size[1]:
        return MaskState.BROKEN_RLE, [np.nan] * 4
    if not runs[1::2].any():
        return MaskState.EMPTY, [np.nan] * 4
    return MaskState.MASK, _extents_of_runs(runs, int(size[0]))


def _extents_of_runs(runs: np.ndarray, length: int) -> list[int]:
    # The first line and the first pixel of the lines of a length, the end of the last ones.
    ends = np.cumsum(runs)[1::2][runs[1::2] > 0]
    starts = ends - runs[1::2][runs[1::2] > 0]
    lines, last_lines = starts // length, (ends - 1) // length
    pixels, last_pixels = starts % length, (ends - 1) % length
    is_broken = last_lines > lines
    if is_broken.any():  # from one line to the next
        return [lines[0], 0, last_lines[-1] + 1, length]
    return [lines[0], pixels.min(), last_lines[-1] + 1, last_pixels.max() + 1]


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


def decode_mask(rle: dict) -> np.ndarray:
    """The mask of a usable RLE, bool (H, W), in a third of the time of mask_util.decode."""
    runs = _runs_of(rle["counts"])
    height, width = rle["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
