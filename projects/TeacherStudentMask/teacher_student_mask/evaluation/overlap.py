"""How much of each object's box is covered by other objects: Eq. (1) of the paper."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from ..coco_json import has_mask
from ..coco_json.masks import compress_mask
from ..errors import InputError

logger = logging.getLogger(__name__)

__all__ = ["OverlapBin", "compute_overlaps", "overlap_bins"]


@dataclass(frozen=True)
class OverlapBin:
    """The objects with low < O <= high, or O = 0 where both are 0."""

    low: float
    high: float

    def contains(self, overlaps: np.ndarray) -> np.ndarray:
        """Which overlaps, of any shape, in [0, 1], are in the bin: bool, the same shape."""
        if self.high == 0:
            return overlaps == 0
        return (overlaps > self.low) & (overlaps <= self.high)


def overlap_bins(edges: Sequence[float]) -> list[OverlapBin]:
    """
    The bins of Fig. 2 of the paper: objects that stand alone, O = 0, then one per two edges.

    Raises:
        InputError: the edges (``TEST.OVERLAP_BINS``) do not rise from 0 to 1.
    """
    edges = [float(x) for x in edges]
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not all(np.diff(edges) > 0):
        raise InputError(
            f"The overlap bins have the edges {edges}; they must rise from 0 to 1, for example "
            "[0, 0.25, 0.5, 1]."
        )
    bins = [OverlapBin(low, high) for low, high in zip(edges, edges[1:])]
    return [OverlapBin(0.0, 0.0), *bins]


def compute_overlaps(coco: COCO) -> dict[int, float]:
    """
    Overlap O_i of every non-crowd object with the others of its image, Eq. (1) of the paper.

    O_i is the largest share of the box b_i that the mask s_j of one other object covers. i and j
    range over all non-crowd annotations of the image, of any class. A pixel counts with the
    fraction of it that lies in b_i, so COCO's fractional boxes are measured exactly. Objects
    without a mask cover nothing, of which is warned; a box without area has overlap 0.

    Returns:
        {annotation id: overlap in [0, 1]} for all non-crowd annotations of the listed images.
    """
    overlaps = {}
    num_without_mask = 0
    for image_id in coco.imgs:
        annotations = [x for x in coco.imgToAnns.get(image_id, []) if not x.get("iscrowd", 0)]
        boxes = np.asarray([x["bbox"] for x in annotations], dtype=np.float64).reshape(-1, 4)
        size = coco.imgs[image_id]["height"], coco.imgs[image_id]["width"]
        masks = [x["segmentation"] if has_mask(x) else None for x in annotations]
        rles = [None if x is None else compress_mask(x, size) for x in masks]
        num_without_mask += rles.count(None)
        values = _overlaps_of_image(boxes, rles).tolist()
        overlaps.update({x["id"]: value for x, value in zip(annotations, values)})
    if num_without_mask:
        logger.warning(
            f"Overlaps of {len(overlaps)} objects: {num_without_mask} have no mask, so they are "
            "taken to cover nothing."
        )
    return overlaps


def _overlaps_of_image(boxes: np.ndarray, rles: list) -> np.ndarray:
    """Of n boxes, shape (n, 4), XYWH absolute, and n compressed RLEs or None; shape (n,)."""
    overlaps = np.zeros(len(boxes))
    x0, y0, widths, heights = boxes.T
    x1, y1 = x0 + widths, y0 + heights
    is_valid = (widths > 0) & (heights > 0)
    for j, rle in enumerate(rles):
        if rle is None:
            continue
        left, top, width, height = (int(v) for v in mask_util.toBbox(rle))
        touches = (x0 < left + width) & (x1 > left) & (y0 < top + height) & (y1 > top) & is_valid
        touches[j] = False
        others = np.flatnonzero(touches)
        if len(others) == 0:
            continue
        window = mask_util.decode(rle)[top : top + height, left : left + width].astype(np.float64)
        rows = _pixel_coverage(y0[others], y1[others], top, height)
        columns = _pixel_coverage(x0[others], x1[others], left, width)
        # The fraction of a pixel inside a box is the product of its row's and its column's.
        # einsum, not @: on matrices this small BLAS threads cost more than they save.
        covered = (np.einsum("np,pq->nq", rows, window) * columns).sum(axis=1)
        shares = covered / (widths[others] * heights[others])
        overlaps[others] = np.maximum(overlaps[others], shares)
    # Rounding of fractional boxes can end a few ulp above 1.
    return np.minimum(overlaps, 1.0)


def _pixel_coverage(starts: np.ndarray, ends: np.ndarray, first: int, length: int) -> np.ndarray:
    # How much of each pixel [p, p + 1] lies in each of n intervals along one axis: (n, length).
    pixels = first + np.arange(length)
    inside = np.minimum(ends[:, None], pixels + 1) - np.maximum(starts[:, None], pixels)
    return np.clip(inside, 0.0, 1.0)
