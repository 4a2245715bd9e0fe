"""Overlap O, Eq. (1), of the objects of one image, with masks of people and of models."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from teacher_student_mask.checks.mask_measures import (
    measure_polygons,
    measure_rles,
    to_floats,
    valid_polygons,
)
from teacher_student_mask.checks.object_checks import MAX_PIXELS_OUTSIDE
from teacher_student_mask.evaluation import compute_overlaps

__all__ = ["overlaps_in_image"]


def overlaps_in_image(
    boxes: list[object], segmentations: list[object], image_size: tuple[int, int]
) -> tuple[list[float], int]:
    """
    Args:
        boxes: of the n objects of the image that are no crowds, [x, y, width, height] each. An
            object whose box is anything else, or has no area, has overlap 0 and may cover others.
        segmentations: of the objects, as json has them; None: no mask.
        image_size: (height, width).

    Returns:
        The overlaps, n numbers in [0, 1], and how many of the masks could not be read and therefore
        cover nothing. pycocotools trusts a mask; these are kept from it.
    """
    rles = [_to_rle(x, image_size) for x in segmentations]
    num_unreadable = sum(rle is None and bool(x) for rle, x in zip(rles, segmentations))
    # compute_overlaps would warn of every box without area, and of every missing mask.
    is_box = [_is_box(x) for x in boxes]
    rows = [
        {
            "id": i,
            "image_id": 0,
            "bbox": boxes[i] if is_box[i] else [0, 0, 1, 1],
            "segmentation": rles[i] or _empty(image_size),
        }
        for i in range(len(boxes))
    ]
    coco = COCO()
    coco.imgs = {0: {"id": 0, "height": image_size[0], "width": image_size[1]}}
    coco.imgToAnns = {0: rows}
    overlaps = compute_overlaps(coco)
    return [overlaps[i] if is_box[i] else 0.0 for i in range(len(boxes))], num_unreadable


def _is_box(box: object) -> bool:
    if type(box) is not list or len(box) != 4 or to_floats(box) is None:
        return False
    return min(box[2:]) > 0


def _empty(image_size: tuple[int, int]) -> dict:
    return mask_util.encode(np.zeros(image_size, np.uint8, order="F"))


def _to_rle(segmentation: object, image_size: tuple[int, int]) -> dict | None:
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, image_size)
    if not isinstance(segmentation, list) or not all(isinstance(x, list) for x in segmentation):
        return None
    polygons = valid_polygons(segmentation)
    if not polygons:
        return None
    extents, _ = measure_polygons(polygons)
    # NaN is not <=.
    if not (np.abs(extents) <= MAX_PIXELS_OUTSIDE + max(image_size)).all():
        return None
    return mask_util.merge(mask_util.frPyObjects(polygons, *image_size))


def _read_rle(rle: dict, image_size: tuple[int, int]) -> dict | None:
    counts = rle.get("counts")
    (num_pixels,), _, _ = measure_rles([counts])
    if rle.get("size") != list(image_size) or num_pixels != image_size[0] * image_size[1]:
        return None
    if isinstance(counts, list):
        return mask_util.frPyObjects({"size": list(image_size), "counts": counts}, *image_size)
    return {"size": list(image_size), "counts": counts}
