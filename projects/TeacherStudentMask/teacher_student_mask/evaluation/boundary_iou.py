"""Boundary IoU: how well the outlines of two masks agree, whatever the size of the object."""

from __future__ import annotations

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = ["boundary_iou", "boundary_region"]

# Boundaries are as wide as this share of the image's diagonal, the value for COCO in the paper.
_WIDTH_RATIO = 0.02


def boundary_iou(mask: dict, other: dict) -> float:
    """
    Boundary IoU of Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation
    Evaluation", CVPR 2021: the IoU of the parts of both masks that lie within d of their outline,
    d being 2 % of the image's diagonal, at least one pixel.

    Args:
        mask, other: compressed RLE of one size.

    Returns:
        In [0, 1]; nan if both are empty.
    """
    height, width = mask["size"]
    distance = max(1, round(_WIDTH_RATIO * float(np.hypot(height, width))))
    # Decoded pixels outside both boxes say nothing.
    window = _window(mask_util.toBbox([mask, other]))
    first, second = (
        boundary_region(mask_util.decode(x)[window].astype(bool), distance) for x in (mask, other)
    )
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else float("nan")


def boundary_region(mask: np.ndarray, distance: int) -> np.ndarray:
    """
    The pixels of a mask within a distance of its outline.

    Args:
        mask: bool, shape (H, W). What lies beyond the array is background.
        distance: in pixels, in the maximum norm; 1 gives the outermost pixels.

    Returns:
        bool, shape (H, W), a subset of ``mask``.
    """
    if mask.size == 0:
        return mask.copy()
    padded = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & (eroded[1:-1, 1:-1] == 0)


def _window(boxes: np.ndarray) -> tuple[slice, slice]:
    boxes = boxes[(boxes[:, 2:] > 0).all(axis=1)].astype(int)
    if len(boxes) == 0:
        return slice(0, 0), slice(0, 0)
    left, top = boxes[:, :2].min(axis=0)
    right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    return slice(top, bottom), slice(left, right)
