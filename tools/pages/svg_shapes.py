"""Masks as paths of SVG, whose coordinates are the pixels of the image."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = ["polygons_to_path", "rle_to_path"]


def polygons_to_path(polygons: Sequence[Sequence[float]]) -> str:
    """
    Args:
        polygons: [x, y, x, y, ...] in pixels.

    Returns:
        The "d" of a path, to a tenth of a pixel. Fill it by the rule "nonzero": polygons of a mask
        are joined where they overlap.
    """
    parts = []
    for polygon in polygons:
        points = zip(polygon[0::2], polygon[1::2])
        parts.append("M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) + "Z")
    return "".join(parts)


def rle_to_path(rle: dict) -> str:
    """
    Trace the outlines of a mask, those of its holes too.

    Args:
        rle: compressed.

    Returns:
        The "d" of a path, a quarter of a pixel inside of the mask's edge, which gives an area to
        lines of a single pixel. Fill it by the rule "evenodd".
    """
    left, top, width, height = (int(v) for v in mask_util.toBbox(rle))
    window = mask_util.decode(rle)[top : top + height, left : left + width]
    fine = np.repeat(np.repeat(window, 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # The middle of pixel i of the fine grid is at (i + 0.5) / 2.
    polygons = [((x.reshape(-1, 2) + 0.5) / 2 + (left, top)).ravel().tolist() for x in contours]
    return polygons_to_path(polygons)


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
