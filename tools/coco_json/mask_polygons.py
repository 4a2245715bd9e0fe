"""Polygons of binary masks in COCO's frame, checked against the masks that they stand for."""

from __future__ import annotations

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = ["MIN_IOU", "mask_to_polygons"]

# Of the polygons with the mask; below it a coarser outline is given up for a finer one.
MIN_IOU = 0.98

# How far, in pixels, an outline may be from the edges of the mask's pixels; tried in this order.
# At the last one it is those edges themselves.
_TOLERANCES = (1.0, 0.5, 0.0)


def mask_to_polygons(mask: np.ndarray) -> list[list[float]] | None:
    """
    Trace the outlines of a mask along the edges of its pixels, and leave out points that do not
    matter.

    A pixel (x, y) is the square from (x, y) to (x + 1, y + 1), as in COCO; OpenCV's own contours
    run through the centres of the pixels and would lose half a pixel on every side.

    Args:
        mask: bool or uint8, shape (H, W).

    Returns:
        COCO's polygons [[x, y, x, y, ...], ...], one for each part of the mask, whose mask (as
        pycocotools fills it) has an IoU of at least ``MIN_IOU`` with the given one. None where
        polygons cannot say it: the mask has a hole, or is empty.
    """
    outlines = _outlines(mask)
    if outlines is None:
        return None
    for tolerance in _TOLERANCES:
        simple = [cv2.approxPolyDP(x, tolerance, closed=True)[:, 0] for x in outlines]
        if any(len(x) < 3 for x in simple):
            continue
        polygons = [x.astype(float).ravel().tolist() for x in simple]
        if _iou(polygons, mask) >= MIN_IOU:
            return polygons
    return None


def _outlines(mask: np.ndarray) -> list[np.ndarray] | None:
    # Each int32 of shape (points, 1, 2), corners of pixels; None if there is a hole or no pixel.
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    top, left = rows[0], columns[0]
    window = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    # With two by two points a pixel, the point of an outline tells the corner of its pixel that it
    # belongs to: the left or upper one if even, else the right or lower one. The empty margin
    # keeps the outline from the window's border.
    window = np.pad(window.repeat(2, axis=0).repeat(2, axis=1), 2)
    contours, hierarchy = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # A contour with a parent is a hole.
    if (hierarchy[0, :, 3] >= 0).any():
        return None
    origin = np.array([left, top], np.int32)
    return [((x - 2) + 1) // 2 + origin for x in contours]


def _iou(polygons: list[list[float]], mask: np.ndarray) -> float:
    filled = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
    given = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return float(mask_util.iou([filled], [given], [0])[0, 0])
