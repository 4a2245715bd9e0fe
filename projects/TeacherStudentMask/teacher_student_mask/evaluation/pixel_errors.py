"""What lies under the false-positive pixels of a mask, and how well its outline fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycocotools.mask as mask_util

__all__ = [
    "ObjectRegions",
    "PixelCounts",
    "TIE_RULES",
    "boundary_iou",
    "boundary_region",
    "count_pixels",
    "find_object_regions",
]

TIE_RULES = ("seen", "smaller")
# Boundaries are as wide as this share of the image's diagonal, the value for COCO in the paper.
_WIDTH_RATIO = 0.02


@dataclass(frozen=True)
class ObjectRegions:
    """
    The pixels of an image that its objects cover, as compressed RLE.

    Args:
        seen: pixels that count as "on an object of a seen class".
        objects: pixels of any object.
        all: ``objects`` and the pixels of crowds.
    """

    seen: dict
    objects: dict
    all: dict


@dataclass(frozen=True)
class PixelCounts:
    """
    A predicted mask against the mask of its object, in pixels.

    The false positives, predicted pixels outside the object's own mask, are each counted once:
    ``background + seen + unseen + crowd``. Those in ``crowd`` lie under a crowd alone.
    """

    intersection: int
    union: int
    background: int
    seen: int
    unseen: int
    crowd: int


def find_object_regions(
    size: tuple[int, int],
    objects: Sequence[dict],
    is_seen: Sequence[bool],
    crowds: Sequence[dict] = (),
    *,
    ties: str = "seen",
) -> ObjectRegions:
    """
    Find what lies under the pixels of an image.

    Args:
        size: height and width of the image.
        objects: compressed RLE of the non-crowd objects.
        is_seen: whether the class of each is seen.
        crowds: compressed RLE of the crowds.
        ties: whose a pixel is that objects of both kinds cover: "seen" (the seen one's), or
            "smaller" (that of the object with the smallest area, of equal ones the seen one's).

    Raises:
        ValueError: ``ties`` is neither.
    """
    if ties not in TIE_RULES:
        raise ValueError(f"ties is {ties!r}; allowed: {', '.join(TIE_RULES)}.")
    empty = mask_util.encode(np.zeros(size, dtype=np.uint8, order="F"))
    objects = list(objects)
    if ties == "seen":
        seen = mask_util.merge([empty, *(x for x, s in zip(objects, is_seen) if s)])
    else:
        seen = _region_of_smaller(size, objects, is_seen)
    return ObjectRegions(
        seen=seen,
        objects=mask_util.merge([empty, *objects]),
        all=mask_util.merge([empty, *objects, *crowds]),
    )


def count_pixels(predicted: dict, own: dict, regions: ObjectRegions) -> PixelCounts:
    """
    Attribute the pixels of a predicted mask (Fig. 3 of the paper, per instance).

    Args:
        predicted: compressed RLE of the prediction.
        own: compressed RLE of the object that it belongs to.
        regions: of the image; may contain ``own``, whose pixels are no false positives.
    """
    # On runs rather than pixels: no image is ever decoded.
    true_positive = _intersect(predicted, own)
    num_predicted, num_tp = _area(predicted), _area(true_positive)

    def count_outside_own(region: dict) -> int:
        return _area(_intersect(predicted, region)) - _area(_intersect(true_positive, region))

    regions = (regions.seen, regions.objects, regions.all)
    seen, objects, all_ = (count_outside_own(x) for x in regions)
    return PixelCounts(
        intersection=num_tp,
        union=num_predicted + _area(own) - num_tp,
        background=num_predicted - num_tp - all_,
        seen=seen,
        unseen=objects - seen,
        crowd=all_ - objects,
    )


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
    masks = mask_util.decode([mask, other]).astype(bool)
    # Pixels outside both boxes say nothing.
    left, top, width, height = mask_util.toBbox(mask_util.merge([mask, other])).astype(int)
    masks = masks[top : top + height, left : left + width]
    first, second = (boundary_region(masks[..., i], distance) for i in (0, 1))
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


def _region_of_smaller(size: tuple[int, int], objects: list, is_seen: Sequence[bool]) -> dict:
    is_seen_pixel = np.zeros(size, dtype=np.uint8, order="F")
    # Painted last wins: from large to small, seen after unseen.
    order = sorted(range(len(objects)), key=lambda i: (-_area(objects[i]), is_seen[i]))
    for i in order:
        is_seen_pixel[mask_util.decode(objects[i]).astype(bool)] = is_seen[i]
    return mask_util.encode(is_seen_pixel)


def _intersect(first: dict, second: dict) -> dict:
    return mask_util.merge([first, second], intersect=True)


def _area(rle: dict) -> int:
    return int(mask_util.area(rle))
