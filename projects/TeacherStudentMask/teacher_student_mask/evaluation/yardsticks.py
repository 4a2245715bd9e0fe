"""Masks that need no model: what mask AP on ground-truth boxes has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .tasks import MASK_TASKS, tasks_with_objects

__all__ = ["YARDSTICKS", "compare_with_yardsticks", "yardstick_results"]

_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
# Outlines in a box from (-1, -1) to (1, 1).
_OUTLINES = {
    "filled box": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "inscribed ellipse": np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1),
}
YARDSTICKS = tuple(_OUTLINES)


def yardstick_results(coco: COCO) -> dict[str, list[dict]]:
    """
    Fill the ground-truth boxes, and the ellipses in them, as COCO results.

    The shapes are polygons, rasterised as pycocotools does with those of the ground truth.

    Args:
        coco: its images' "height" and "width", and its annotations' "iscrowd", are set.

    Returns:
        {"filled box": results, "inscribed ellipse": results}: one of score 1 per non-crowd object,
        with "segmentation" (compressed RLE), "area" and the object's own "bbox" and class. What of
        a box is outside of the image is cut off first.
    """
    results: dict[str, list[dict]] = {name: [] for name in _OUTLINES}
    for image_id, image in coco.imgs.items():
        objects = [x for x in coco.imgToAnns.get(image_id, []) if not x["iscrowd"]]
        if not objects:
            continue
        x, y, w, h = np.array([x["bbox"] for x in objects], dtype=np.float64).T
        size = image["width"], image["height"]
        low, high = (np.stack(p, axis=1).clip(0, size) for p in ((x, y), (x + w, y + h)))
        for name, outline in _OUTLINES.items():
            points = (low + high)[:, None] / 2 + (high - low)[:, None] / 2 * outline
            polygons = points.reshape(len(objects), -1).tolist()
            rles = mask_util.frPyObjects(polygons, image["height"], image["width"])
            for annotation, rle in zip(objects, rles):
                keep = {key: annotation[key] for key in ("image_id", "category_id", "bbox")}
                shape = {"segmentation": rle, "area": float(mask_util.area(rle))}
                results[name].append({**keep, "score": 1.0, **shape})
    return results


def compare_with_yardsticks(results: Mapping, yardsticks: Mapping[str, Mapping]) -> str:
    """
    Say on which objects masks on ground-truth boxes do not beat the best yardstick in AP.

    Args:
        results: {task: {"AP": in 0-100, "num_gt": ...}} of a model.
        yardsticks: {name: the same} of :func:`yardstick_results`.

    Returns:
        One sentence, or "" where the masks are better on all objects.
    """
    lost = []
    for task in tasks_with_objects(results):
        ap = results[task]["AP"]
        best, name = max((of_tasks[task]["AP"], x) for x, of_tasks in yardsticks.items())
        if not ap > best:
            lost.append(f"{MASK_TASKS[task]} ({ap:.1f}, {name} {best:.1f})")
    return f"Mask AP no better than a yardstick: {', '.join(lost)}." if lost else ""
