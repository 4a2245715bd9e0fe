"""Drawing of masks and of their errors on crops of an image."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, features

from .chart_style import FALSE_POSITIVE_COLOURS

__all__ = [
    "CORRECT",
    "FALSE_POSITIVE_KINDS",
    "MISSED",
    "WHITE",
    "crop_window",
    "draw_kinds",
    "draw_mask",
    "join_columns",
    "pixel_kinds",
    "resize_crop",
    "resize_mask",
    "rgb",
    "to_data_uri",
]

# Labels of pixels.
CORRECT, MISSED = 1, 5
FALSE_POSITIVE_KINDS = {"background": 2, "seen": 3, "unseen": 4}
WHITE = (255, 255, 255)

_PANEL_SIZE = 160  # longer side, pixels
_GAP = 2
_GAP_GREY = 150
_ENLARGEMENT = 1.3
_MIN_SIDE = 24.0
# Of a crop: a ski would otherwise be a strip in which nothing can be recognised.
_MIN_ASPECT = 0.75
_QUALITY = 75


def crop_window(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """
    The part of the image to show around a box: 30 % larger, not too narrow, inside the image.

    Args:
        box: XYWH, absolute.
        height, width: of the image.

    Returns:
        x0, y0, x1, y1 with 0 <= x0 < x1 <= width, 0 <= y0 < y1 <= height.
    """
    x, y, w, h = (float(v) for v in box)
    sides = [max(_ENLARGEMENT * w, _MIN_SIDE), max(_ENLARGEMENT * h, _MIN_SIDE)]
    sides = [max(sides[0], _MIN_ASPECT * sides[1]), max(sides[1], _MIN_ASPECT * sides[0])]
    x0, x1 = _place(x + w / 2, sides[0], width)
    y0, y1 = _place(y + h / 2, sides[1], height)
    return x0, y0, x1, y1


def pixel_kinds(
    mask: np.ndarray, own: np.ndarray, seen: np.ndarray, objects: np.ndarray, everything: np.ndarray
) -> np.ndarray:
    """
    What is right and wrong about a mask, pixel by pixel.

    Args:
        mask: bool, shape (H, W), of a model.
        own: the same, of the object.
        seen, objects, everything: the same, the regions of `find_object_regions`: what belongs to
            seen objects, to any object, to any object or crowd. They may contain `own`.

    Returns:
        uint8, shape (H, W): CORRECT, MISSED, a value of FALSE_POSITIVE_KINDS, or 0 (no error, or
        one under a crowd alone, which counts as nothing).
    """
    kinds = np.zeros(mask.shape, dtype=np.uint8)
    wrong = mask & ~own
    kinds[wrong & ~everything] = FALSE_POSITIVE_KINDS["background"]
    kinds[wrong & objects] = FALSE_POSITIVE_KINDS["unseen"]
    kinds[wrong & seen] = FALSE_POSITIVE_KINDS["seen"]
    kinds[mask & own] = CORRECT
    kinds[own & ~mask] = MISSED
    return kinds


def resize_crop(pixels: np.ndarray) -> np.ndarray:
    """Resize a crop so that its longer side has the size of a panel."""
    height, width = pixels.shape[:2]
    scale = _PANEL_SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, size, interpolation=method)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a bool mask to (height, width): pixels covered by half of it or more stay in it."""
    method = cv2.INTER_AREA if size[0] < mask.shape[0] else cv2.INTER_LINEAR
    resized = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=method)
    return resized >= 0.5


def draw_mask(pixels: np.ndarray, mask: np.ndarray, colour: Sequence[int]) -> np.ndarray:
    """A copy of RGB pixels, shape (H, W, 3), with a bool mask, shape (H, W), in a colour."""
    drawn = pixels.astype(np.float32)
    drawn[mask] = 0.55 * drawn[mask] + 0.45 * np.array(colour)
    edge, halo = _edges(mask)
    drawn[halo] *= 0.35
    drawn[edge] = colour
    return drawn.astype(np.uint8)


def draw_kinds(pixels: np.ndarray, kinds: np.ndarray, own: np.ndarray) -> np.ndarray:
    """A grey copy of RGB pixels with what :func:`pixel_kinds` found, and the object's contour."""
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    drawn = 0.5 * grey
    drawn[kinds == CORRECT] = 0.45 * grey[kinds == CORRECT] + 130
    for kind, label in FALSE_POSITIVE_KINDS.items():
        is_kind = kinds == label
        colour = np.array(rgb(FALSE_POSITIVE_COLOURS[kind]))
        drawn[is_kind] = 0.25 * grey[is_kind] + 0.75 * colour
    rows, columns = np.indices(kinds.shape)
    is_stripe = (rows + columns) % 6 < 3
    drawn[(kinds == MISSED) & is_stripe] = 245
    drawn[(kinds == MISSED) & ~is_stripe] = 20
    edge, _ = _edges(own)
    drawn[edge] = WHITE
    return drawn.astype(np.uint8)


def join_columns(columns: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """One picture of columns of an upper and a lower panel each, all of one shape (H, W, 3)."""
    height, width = columns[0][0].shape[:2]
    joined = np.full(
        (2 * height + _GAP, len(columns) * (width + _GAP) - _GAP, 3), _GAP_GREY, dtype=np.uint8
    )
    for i, column in enumerate(columns):
        left = i * (width + _GAP)
        for top, panel in zip((0, height + _GAP), column):
            joined[top : top + height, left : left + width] = panel
    return joined


def rgb(colour: str) -> tuple[int, int, int]:
    """ "#rrggbb" as numbers."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def to_data_uri(pixels: np.ndarray) -> str:
    """RGB pixels as a compressed image that an HTML page can hold."""
    file_format = "WEBP" if features.check("webp") else "JPEG"
    buffer = io.BytesIO()
    # WebP's method 2 is three times as fast as the default and 4 % larger.
    Image.fromarray(pixels).save(buffer, file_format, quality=_QUALITY, method=2)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{file_format.lower()};base64,{data}"


def _place(centre: float, length: float, limit: int) -> tuple[int, int]:
    """An interval of pixels of about this centre and length, moved and cut to [0, limit]."""
    size = min(max(1, math.ceil(length)), limit)
    start = min(max(0, math.floor(centre - size / 2 + 0.5)), limit - size)
    return start, start + size


def _edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outermost pixels of a mask, and the pixels around it."""
    kernel = np.ones((3, 3), dtype=np.uint8)
    # Without the border value, a mask that the crop cuts would have no edge there.
    inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    outer = cv2.dilate(mask.astype(np.uint8), kernel)
    return mask & (inner == 0), (outer > 0) & ~mask
