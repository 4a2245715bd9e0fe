"""What the readers of ground-truth and result files share: errors, warnings, checks of values."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..coco_json import read_json
from ..coco_masks import has_mask
from ..coco_rules import shorten

logger = logging.getLogger(__name__)

__all__ = [
    "InputError",
    "InputFile",
    "InputWarning",
    "boxes_outside",
    "is_known_by_box_only",
    "is_whole",
    "list_some",
    "refusal",
    "to_floats",
    "to_id",
]

# Exports that round or count pixels from 1 move a box by no more than this.
_BOX_TOLERANCE = 1.0


class InputError(ValueError):
    """A file that cannot be analysed: which row, which field, its value and what is allowed."""


@dataclass(frozen=True)
class InputWarning:
    """Something odd in a file that is analysed all the same."""

    file: str
    message: str  # with the count and the first places
    count: int


class InputFile:
    """
    A json file that is being checked. Errors and warnings begin with its name.

    A `where` below says how row i of a list is called in an error: "entry 17".
    """

    def __init__(self, path: str | os.PathLike, warnings: list[InputWarning] | None) -> None:
        """
        Args:
            path: the file.
            warnings: where :meth:`warn` appends; None if the log suffices.
        """
        self.path = os.fspath(path)
        self._warnings = warnings

    def read_json(self) -> object:
        """
        Raises:
            InputError: if the file cannot be read, or is not json.
        """
        try:
            return read_json(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InputError(f"{self.path}: is not a json file: {error}") from error

    def error(self, problem: str, where: str | None = None) -> InputError:
        """The error to raise, about one row or about the whole file."""
        return InputError(": ".join([self.path, *([where] if where else []), problem]))

    def warn(self, what: str, count: int | None = None, places: str = "") -> None:
        """
        Log "what: count (places)" and keep it as an :class:`InputWarning`.

        Args:
            count: 0: there is nothing to warn of; None: `what` is true of the whole file.
        """
        if count == 0:
            return
        message = what if count is None else f"{what}: {count}"
        message += f" ({places})" if places else ""
        logger.warning(f"{self.path}: {message}")
        if self._warnings is not None:
            count = 1 if count is None else count
            self._warnings.append(InputWarning(self.path, message, count))

    def check_dicts(self, rows: Sequence, where: Callable[[int], str]) -> None:
        """Raise InputError unless every row is a dict."""
        for i, row in enumerate(rows):
            if type(row) is not dict:
                raise self.error(f"is {shorten(row)}; allowed: a dict", where(i))

    def required(self, row: dict, field: str, where: str) -> object:
        """The value of a field; InputError where there is none."""
        if field not in row:
            raise self.error(f'"{field}" is missing', where)
        return row[field]

    def boxes(self, boxes: list, where: Callable[[int], str]) -> np.ndarray:
        """
        Args:
            boxes: the value of "bbox" of each row.

        Returns:
            Shape (n, 4), float64, XYWH absolute; all finite, widths and heights >= 0.

        Raises:
            InputError: for the first value that is no such box.
        """
        is_regular = set(map(type, boxes)) <= {list} and set(map(len, boxes)) <= {4}
        values = to_floats(list(chain.from_iterable(boxes))) if is_regular else None
        if values is not None and (values.reshape(-1, 4)[:, 2:] >= 0).all():
            return values.reshape(-1, 4)
        index = next(i for i, box in enumerate(boxes) if not _is_box(box))
        allowed = "four finite numbers [x, y, width, height], width and height not negative"
        raise self.error(refusal("bbox", boxes[index], allowed), where(index))


def refusal(field: str, value: object, allowed: str) -> str:
    """The sentence about a value that is not allowed; a long value is cut."""
    return f'"{field}" is {shorten(value)}; allowed: {allowed}'


def list_some(values: Sequence, num: int = 5) -> str:
    """The first `num` values with commas between, and "..." where there are more."""
    return ", ".join([str(x) for x in values[:num]] + ["..."] * (len(values) > num))


def to_id(value: object) -> int | None:
    """`value` as an int if it is a whole number of 64 bits (1 or 1.0, not True), else None."""
    return int(value) if is_whole(value) else None


def boxes_outside(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """
    Args:
        boxes: shape (n, 4), XYWH absolute.
        sizes: shape (n, 2), the images' (height, width).

    Returns:
        Shape (n,), whether the box reaches more than 1 pixel outside its image.
    """
    with np.errstate(over="ignore"):
        ends = boxes[:, :2] + boxes[:, 2:]
    is_before = (boxes[:, :2] < -_BOX_TOLERANCE).any(axis=1)
    return is_before | (ends > sizes[:, ::-1] + _BOX_TOLERANCE).any(axis=1)


def _is_box(box: object) -> bool:
    if type(box) is not list or len(box) != 4:
        return False
    numbers = to_floats(box)
    return numbers is not None and bool((numbers[2:] >= 0).all())


def is_known_by_box_only(annotation: dict) -> bool:
    """Whether the "segmentation" is missing or empty; False where it is no mask of any kind."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and not all(isinstance(x, list) for x in segmentation):
        return False
    return isinstance(segmentation, (dict, list, type(None))) and not has_mask(annotation)


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
