"""Boxes of COCO jsons against their masks, their images and one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .masks import BOX_TOLERANCE, MeasuredMasks, extents_by_rows
from .report import GOOD_IOU, MAX_SHARE_OUTSIDE, MIN_BOX_IOU

__all__ = ["check_geometry", "check_repeated"]

# Sides up to this are those of no box.
_EMPTY_SIDE = 1e-5
# How much better a box has to fit when it is read in another way.
_GAIN = 0.05
# Share of boxes that leave their image, from which on those of objects without masks may be XYXY.
_SHARE_REACHING_OUT = 0.1


def check_geometry(
    find: Callable,
    boxes: np.ndarray,
    sizes: np.ndarray,
    segmentations: Sequence,
    masks: MeasuredMasks,
    is_crowd: np.ndarray,
) -> np.ndarray:
    """
    Compare each box with the extents of its mask, and with its image where there is no mask.

    Args:
        find: takes the name of a rule and which of the n objects it is about.
        boxes: as they are in the json, shape (n, 4).
        sizes: (height, width) of the images, shape (n, 2); nan: not known.
        masks: of ``segmentations``, n values.
        is_crowd: bool, shape (n,).

    Returns:
        Which boxes seem to be [x0, y0, x1, y1], bool of shape (n,).
    """
    limits = sizes[:, ::-1]
    with np.errstate(invalid="ignore", over="ignore"):
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        sides = boxes[:, 2:]
        is_small = ((sides < 1) & (sides > _EMPTY_SIDE)).all(axis=1)
        # All of them, those that fill their image included.
        if (sides > _EMPTY_SIDE).all() and (boxes >= 0).all() and (corners <= 1.01).all():
            is_small[:] = True
        find("small box", is_small)
        shown, share_inside = _compare(corners, masks.extents, limits)
        as_xyxy, _ = _compare(boxes, masks.extents, limits)
        # What is wrong with the box alone is told elsewhere.
        is_sound = (sides > _EMPTY_SIDE).all(axis=1) & (corners[:, 2:] > 0).all(axis=1)
        is_sound &= ~(corners[:, :2] >= limits).any(axis=1)
        is_compared = ~np.isnan(shown) & ~is_crowd & ~is_small & is_sound
        is_xyxy = is_compared & (as_xyxy >= GOOD_IOU) & (as_xyxy > shown + _GAIN)
        is_beside = is_compared & ~is_xyxy
        is_beside &= (shown < MIN_BOX_IOU) | (share_inside < 1 - MAX_SHARE_OUTSIDE)
        # Without masks: all of them would do as corners, and some leave their image as they are.
        others = np.isnan(shown) & ~is_crowd & ~is_small
        may_be_xyxy = (sides > boxes[:, :2]).all(axis=1) & (boxes >= -BOX_TOLERANCE).all(axis=1)
        may_be_xyxy &= (sides <= limits + BOX_TOLERANCE).all(axis=1)
        reaches_out = (corners[:, 2:] > limits + BOX_TOLERANCE).any(axis=1) & others
    if is_compared.any():
        is_likely = 2 * is_xyxy.sum() > is_compared.sum()
    else:
        is_likely = reaches_out.sum() > max(1, _SHARE_REACHING_OUT * others.sum())
    if is_likely and may_be_xyxy[others].all():
        is_xyxy |= others
    find("XYXY box", is_xyxy)

    rows = [i for i in np.flatnonzero(is_beside).tolist() if type(segmentations[i]) is dict]
    is_by_rows = np.zeros(len(boxes), dtype=bool)
    if rows:
        extents = extents_by_rows([segmentations[i] for i in rows], sizes[rows, 1])
        is_by_rows[rows] = _compare(corners[rows], extents, limits[rows])[0] >= GOOD_IOU
    find("RLE by rows", is_by_rows)
    find("box beside its mask", is_beside & ~is_by_rows)
    return is_xyxy


def _compare(
    corners: np.ndarray, extents: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    # The IoU, and the share of the extents inside; both are cut to the image, and half a pixel
    # larger on each side, as exports round. nan where there are no extents.
    low, high = np.maximum(corners[:, :2], 0), np.fmin(corners[:, 2:], limits)
    mask_low, mask_high = np.maximum(extents[:, :2], 0), np.fmin(extents[:, 2:], limits)
    both = np.minimum(high, mask_high) - np.maximum(low, mask_low) + BOX_TOLERANCE
    both = np.maximum(both, 0).prod(axis=1)
    of_box = np.maximum(high - low + BOX_TOLERANCE, 0).prod(axis=1)
    of_mask = (mask_high - mask_low + BOX_TOLERANCE).prod(axis=1)
    return both / (of_box + of_mask - both), both / of_mask


def check_repeated(find: Callable, objects: np.ndarray, boxes: np.ndarray) -> None:
    """
    Look for objects that are there twice.

    Args:
        find: as for :func:`check_geometry`.
        objects: image and class, numbers from 0, shape (n, 2); -1: not compared.
        boxes: XYWH, shape (n, 4).
    """
    with np.errstate(over="ignore"):
        keys = np.concatenate([objects, np.round(boxes, 1)], axis=1)
    index = np.flatnonzero((objects >= 0).all(axis=1) & np.isfinite(boxes).all(axis=1))
    index = index[np.lexsort(keys[index].T)]  # stable, so the first of equal ones stays first
    is_repeated = np.zeros(len(boxes), dtype=bool)
    is_repeated[index[1:]] = (keys[index[1:]] == keys[index[:-1]]).all(axis=1)
    find("object twice", is_repeated)
