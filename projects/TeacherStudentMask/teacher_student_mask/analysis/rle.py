"""
Masks of json files as compressed RLE that pycocotools can read safely.

pycocotools trusts an RLE. Its C code reads past the end of a cut string, compares masks whose runs
end early for ever, writes past its memory or stops early where runs of length 0 meet, and takes a
polygon's coordinates as sizes of memory. So masks are checked here before it sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pycocotools.mask as mask_util

from ..coco_masks import MAX_PIXELS_OUTSIDE
from .input_checks import InputFile, refusal, to_floats

__all__ = ["check_rles", "compress_mask"]

# Of five bits each, with a sign: enough for every run below MAX_PIXELS, and their differences.
_MAX_CHARACTERS = 6

# Three points. pycocotools would read four numbers as a box.
_MIN_POLYGON_NUMBERS = 6

# Bytes that are decoded at a time: the arrays of a chunk should fit the processor's cache.
_CHUNK_BYTES = 2**18

_ALLOWED_MASKS = (
    'a list of polygons [[x, y, x, y, x, y, ...], ...] or an RLE {"size": [height, width], '
    '"counts": ...}'
)


def compress_mask(segmentation: object, size: list[int]) -> tuple[bytes, int]:
    """
    Args:
        segmentation: polygons, compressed or uncompressed RLE, as json holds them; not changed.
        size: [height, width] of the image.

    Returns:
        The "counts" of the compressed RLE, still to be checked by :func:`check_rles`, and how many
        polygons were left out because they have fewer than three points.

    Raises:
        ValueError: if it is no mask of this size; the sentence lacks file and entry.
    """
    if type(segmentation) is dict:
        return _compress_rle(segmentation, size), 0
    if type(segmentation) is list:
        return _compress_polygons(segmentation, size)
    raise ValueError(refusal("segmentation", segmentation, _ALLOWED_MASKS))


def check_rles(
    file: InputFile,
    counts: list[bytes],
    sizes: Sequence[list[int]],
    where: Callable[[int], str],
) -> np.ndarray:
    """
    Check that the run lengths of every mask are not negative and add up to its image.

    Runs of length 0 inside a mask say nothing and are taken out.

    Args:
        file, where: what errors name.
        counts: the n masks as compressed RLE without their size; entries are replaced where runs
            of length 0 are taken out.
        sizes: the n images' [height, width].

    Returns:
        Shape (n,), int64, the masks' areas in pixels.

    Raises:
        InputError: for the first broken mask.
    """
    num_pixels = np.array(sizes, dtype=np.int64).reshape(-1, 2).prod(axis=1)
    areas = np.zeros(len(counts), dtype=np.int64)
    for part in _chunks(counts):
        numbers = _read_numbers(counts[part])
        sums = None if numbers is None else _add_runs(*numbers)
        if sums is None or (sums[0] != num_pixels[part]).any():
            for i in range(part.start, part.stop):
                problem = _find_problem(counts[i], int(num_pixels[i]))
                if problem is not None:
                    raise file.error(f'"segmentation": "counts" {problem}', where(i))
        _, areas[part], has_empty_run = sums
        for i in part.start + np.flatnonzero(has_empty_run):
            mask = mask_util.decode({"size": sizes[i], "counts": counts[i]})
            counts[i] = mask_util.encode(mask)["counts"]
    return areas


def _compress_rle(rle: dict, size: list[int]) -> bytes:
    if rle.get("size") != size:
        allowed = f"[height, width] of its image, {size}"
        raise ValueError('"segmentation": ' + refusal("size", rle.get("size"), allowed))
    counts = rle.get("counts")
    if type(counts) is str:
        # Whatever is not ASCII becomes bytes that no RLE has.
        return counts.encode("utf-8", "surrogatepass")
    num_pixels = size[0] * size[1]
    if type(counts) is list and counts and set(map(type, counts)) <= {int}:
        if min(counts) >= 0 and max(counts) <= num_pixels:
            return mask_util.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
    allowed = f"a string, or a list of run lengths from 0 to {num_pixels}"
    raise ValueError('"segmentation": ' + refusal("counts", counts, allowed))


def _compress_polygons(polygons: list, size: list[int]) -> tuple[bytes, int]:
    if not set(map(type, polygons)) <= {list}:
        raise ValueError(refusal("segmentation", polygons, _ALLOWED_MASKS))
    long_enough = [x for x in polygons if len(x) >= _MIN_POLYGON_NUMBERS]
    if not long_enough:
        allowed = f"at least one polygon of {_MIN_POLYGON_NUMBERS} numbers"
        raise ValueError(refusal("segmentation", polygons, allowed))
    bound = MAX_PIXELS_OUTSIDE + max(size)
    arrays = []
    for polygon in long_enough:
        array = to_floats(polygon)
        if array is None or len(array) % 2 or np.abs(array).max() > bound:
            allowed = f"an even number of finite numbers from -{bound} to {bound}"
            # The values that are wrong may lie behind those that the sentence has room for.
            wrong = [x for x in polygon if to_floats([x]) is None or abs(x) > bound]
            problem = refusal("segmentation", polygon, allowed)
            raise ValueError(f"{problem} (not {wrong[0]!r})" if wrong else problem)
        arrays.append(array)
    rles = mask_util.frPyObjects(arrays, *size)
    rle = mask_util.merge(rles) if len(rles) > 1 else rles[0]
    return rle["counts"], len(polygons) - len(arrays)


def _chunks(counts: list[bytes]) -> Iterator[slice]:
    ends = np.cumsum(np.fromiter(map(len, counts), np.int64, len(counts)))
    start = 0
    while start < len(counts):
        limit = (ends[start - 1] if start else 0) + _CHUNK_BYTES
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield slice(start, stop)
        start = stop


def _read_numbers(counts: list[bytes]) -> tuple[np.ndarray, np.ndarray] | None:
    """
    The numbers that the strings of several RLEs hold, one RLE after the other.

    A character holds five bits of a number, the lowest bits first; a sixth bit says that more
    characters follow. The highest bit of the last character is the number's sign.

    Returns:
        The numbers, int32 of shape (m,), and the index in it at which each RLE's end, int64 of
        shape (n,); or None if a string is empty, cut off or not of this form.
    """
    lengths = np.fromiter(map(len, counts), np.int64, len(counts))
    ends = np.cumsum(lengths)
    data = np.frombuffer(b"".join(counts), np.uint8) - np.uint8(48)
    if lengths.min() == 0 or data.max() > 63 or data[ends - 1].max() >= 32:
        return None
    last = np.flatnonzero(data < 32)
    # Nearly all numbers have one or two characters: these are put together for all bytes at once,
    # as if a number ended at each.
    before = np.concatenate([np.zeros(1, np.uint8), data[:-1]])
    continues = before >> np.uint8(5)
    numbers = (((data & np.uint8(31)) ^ np.uint8(16)).view(np.int8) - np.int8(16)).astype(np.int16)
    numbers <<= (continues * np.uint8(5)).view(np.int8)
    numbers += (np.maximum(before, np.uint8(32)) - np.uint8(32)).view(np.int8)
    numbers = numbers[last].astype(np.int32)
    # And the rest one character after the other, from the last one back.
    is_longer = (continues[1:] & continues[:-1]).view(bool) & (data[1:] < 32)
    ends_of_longer = np.flatnonzero(is_longer) + 1
    remaining = np.searchsorted(last, ends_of_longer)
    for distance in range(2, _MAX_CHARACTERS + 1):
        characters = data[last[remaining] - distance]
        is_part = characters >= 32
        remaining, characters = remaining[is_part], characters[is_part]
        if len(remaining) == 0:
            break
        if distance == _MAX_CHARACTERS:
            return None
        numbers[remaining] = (numbers[remaining] << 5) | (characters & 31)
    return numbers, np.searchsorted(last, ends - 1) + 1


def _add_runs(numbers: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, ...]:
    """
    From the fourth number on, a number is the difference of its run to the run before the last.
    The runs are therefore two running sums per RLE. They are taken modulo 2^32, as pycocotools
    does: a run below 0 becomes so long that no image has as many pixels.

    Args:
        numbers, stops: from :func:`_read_numbers`; the first number of each RLE is set to 0.

    Returns:
        For each of the n RLEs: the sum of all runs and that of the foreground's, int64, and
        whether a run other than the first has length 0.
    """
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]])
    first_runs = numbers[starts].view(np.uint32)
    # Only the runs 1, 3, 5, ... are one running sum; of the others, the sum begins with run 2.
    numbers[starts] = 0
    sums = np.zeros((2, len(stops)), dtype=np.int64)
    has_empty_run = np.zeros(len(stops), dtype=bool)
    for column in (0, 1):
        # The numbers at even (odd) indices of the array; those of one RLE are begin .. end - 1.
        begin, end = (starts + 1 - column) // 2, (stops + 1 - column) // 2
        running = np.cumsum(numbers[column::2], dtype=np.int32)
        offsets = np.zeros(len(stops), dtype=np.int32)
        offsets[begin > 0] = running[begin[begin > 0] - 1]
        runs = (running - np.repeat(offsets, end - begin)).view(np.uint32)
        has_first = starts % 2 == column
        runs[begin[has_first]] = first_runs[has_first]
        is_used = end > begin
        sums[column, is_used] = np.add.reduceat(runs, begin[is_used], dtype=np.int64)
        runs[begin[has_first]] = 1
        if not runs.all():
            has_empty_run[is_used] |= np.minimum.reduceat(runs, begin[is_used]) == 0
    return sums.sum(axis=0), np.where(starts % 2 == 0, sums[1], sums[0]), has_empty_run


def _find_problem(counts: bytes, num_pixels: int) -> str | None:
    """What is wrong with one RLE, None if nothing is."""
    runs = []
    number = num_bits = 0
    for position, character in enumerate(counts):
        bits = character - 48
        if not 0 <= bits < 64:
            return f"has the byte {character} at position {position}; allowed: 48 to 111 (0 to o)"
        number |= (bits & 31) << num_bits
        num_bits += 5
        if num_bits > 5 * _MAX_CHARACTERS:
            return f"has a number of more than {_MAX_CHARACTERS} characters at position {position}"
        if bits & 32:
            continue
        number -= (bits & 16) << (num_bits - 4)
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = num_bits = 0
    if num_bits or not runs:
        return "is empty" if not counts else "ends in the middle of a number"
    if min(runs) < 0:
        return f"has a run of {min(runs)} pixels; allowed: 0 to {num_pixels}"
    if sum(runs) != num_pixels:
        return f"has runs of {sum(runs)} pixels in all; allowed: height x width, {num_pixels}"
    return None
