"""Masks that need no model: what mask AP on ground-truth boxes has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .tasks import MASK_TASKS, tasks_with_objects

__all__ = ["YARDSTICKS", "compare_with_yardsticks", "draw_yardsticks", "yardstick_results"]

_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
# Outlines in a box from (-1, -1) to (1, 1).
_OUTLINES = {
    "filled box": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "inscribed ellipse": np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1),
}
YARDSTICKS = tuple(_OUTLINES)


def draw_yardsticks(boxes: np.ndarray, image_size: tuple[int, int]) -> dict[str, list[dict]]:
    """
    Fill boxes, and the ellipses in them, as pycocotools fills the polygons of the ground truth.

    Args:
        boxes: float, shape (N, 4), XYWH in pixels; what is outside of the image is cut off first.
        image_size: (height, width).

    Returns:
        {"filled box": N compressed RLEs, "inscribed ellipse": N compressed RLEs}.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    low, high = (x.clip(0, image_size[::-1])[:, None] for x in (low, high))
    return {
        name: mask_util.frPyObjects(
            ((low + high + (high - low) * outline) / 2).reshape(len(boxes), -1).tolist(),
            *image_size,
        )
        for name, outline in _OUTLINES.items()
    }


def yardstick_results(coco: COCO) -> dict[str, list[dict]]:
    """
    The yardsticks of the ground-truth boxes as COCO results.

    Args:
        coco: its images' "height" and "width", and its annotations' "iscrowd", are set.

    Returns:
        {"filled box": results, "inscribed ellipse": results}: one of score 1 per non-crowd object,
        with "segmentation" (compressed RLE), "area" and the object's own "bbox" and class.
    """
    results: dict[str, list[dict]] = {name: [] for name in _OUTLINES}
    for image_id, image in coco.imgs.items():
        objects = [x for x in coco.imgToAnns.get(image_id, []) if not x["iscrowd"]]
        if not objects:
            continue
        size = image["height"], image["width"]
        for name, rles in draw_yardsticks([x["bbox"] for x in objects], size).items():
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
