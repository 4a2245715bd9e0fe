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
    "boundary_iou",
    "count_pixels",
    "find_object_regions",
]


@dataclass(frozen=True)
class ObjectRegions:
    """
    The pixels of an image that its objects cover, as compressed RLE.

    Args:
        seen: pixels of objects of seen classes, those of unseen classes on them included.
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
) -> ObjectRegions:
    """
    Find what lies under the pixels of an image.

    Args:
        size: height and width of the image.
        objects: compressed RLE of the non-crowd objects.
        is_seen: whether the class of each is seen.
        crowds: compressed RLE of the crowds.
    """
    empty = mask_util.encode(np.zeros(size, dtype=np.uint8, order="F"))
    seen = mask_util.merge([empty, *(x for x, s in zip(objects, is_seen) if s)])
    every = mask_util.merge([empty, *objects])
    return ObjectRegions(seen=seen, objects=every, all=mask_util.merge([every, *crowds]))


def count_pixels(predicted: dict, own: dict, regions: ObjectRegions) -> PixelCounts:
    """
    Attribute the pixels of a predicted mask (Fig. 3 of the paper, per instance).

    Args:
        predicted: compressed RLE of the prediction.
        own: compressed RLE of the object that it belongs to.
        regions: of the image, ``own`` included.
    """
    # On runs rather than pixels: no image is ever decoded.
    true_positive = _intersect(predicted, own)
    num_predicted, num_tp = _area(predicted), _area(true_positive)

    def count_outside_own(region: dict) -> int:
        return _area(_intersect(predicted, region)) - _area(_intersect(true_positive, region))

    seen, objects, all_ = map(count_outside_own, (regions.seen, regions.objects, regions.all))
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
    distance = max(1, round(0.02 * float(np.hypot(height, width))))
    masks = mask_util.decode([mask, other])
    # Pixels outside both boxes say nothing.
    left, top, width, height = mask_util.toBbox(mask_util.merge([mask, other])).astype(int)
    # With a frame of background: what touches the image's border is boundary, too.
    masks = np.pad(masks[top : top + height, left : left + width], ((1, 1), (1, 1), (0, 0)))
    eroded = cv2.erode(masks, np.ones((3, 3), np.uint8), iterations=distance)
    first, second = np.moveaxis(masks > eroded, -1, 0)
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else float("nan")


def _intersect(first: dict, second: dict) -> dict:
    return mask_util.merge([first, second], intersect=True)


def _area(rle: dict) -> int:
    return int(mask_util.area(rle))
