"""The tasks that are reported, mask AP on four sets of objects, and what it has to beat."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from .overlap import OverlapBin
from .subset_ap import (
    AREA_RANGES,
    CandidatePairs,
    Matches,
    PrecisionOfSubsets,
    Subset,
    at_iou,
    mean_percent,
)

__all__ = [
    "MASK_TASKS",
    "METRICS",
    "TaskMetrics",
    "YARDSTICKS",
    "compare_with_yardsticks",
    "draw_yardsticks",
    "tasks_with_objects",
    "yardstick_results",
]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# {task: the objects that count in it}
MASK_TASKS = {
    "segm": "all classes",
    "segm_seen": "seen classes",
    "segm_unseen": "unseen classes",
    "segm_unseen_overlap": "unseen and overlapped",
}
# Masks that need no model, which masks on ground-truth boxes have to beat: outlines in a box from
# (-1, -1) to (1, 1).
_ANGLES = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_OUTLINES = {
    "filled box": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "inscribed ellipse": np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1),
}
YARDSTICKS = tuple(_OUTLINES)


def tasks_with_objects(results: Mapping[str, Mapping]) -> list[str]:
    """
    The mask tasks to show of {task: {"num_gt": ...}}: those that have objects.

    "segm_seen" is left out where no class is unseen, because it is the same as "segm".
    """
    num_gt = {task: results[task]["num_gt"] for task in MASK_TASKS if task in results}
    return [x for x, n in num_gt.items() if n and (x != "segm_seen" or n < num_gt["segm"])]


class TaskMetrics:
    """
    AP of the tasks "segm", "segm_seen", "segm_unseen" and "segm_unseen_overlap" with six metrics
    each, of each overlap bin ("bin 3": AP, AP50) and of each class ("class 17": AP, AP50, AP75).

    Args:
        pairs: detections and objects.
        overlaps: {annotation id: overlap} of the non-crowd objects.
        seen: positions of the seen classes.
        threshold: smallest overlap of an object in "segm_unseen_overlap".
        bins: hold objects of unseen classes.
    """

    def __init__(
        self,
        pairs: CandidatePairs,
        overlaps: Mapping[int, float],
        seen: Collection[int],
        threshold: float,
        bins: Sequence[OverlapBin],
    ):
        # Crowds have no overlap, and count nowhere.
        values = np.array([overlaps.get(i, 0.0) for i in pairs.gt_ids.tolist()])
        is_unseen = ~np.isin(pairs.gt_classes, list(seen))
        self._seen = set(seen)
        self._unseen = set(range(len(pairs.category_ids))) - self._seen
        self._bins = {f"bin {k}": is_unseen & x.contains(values) for k, x in enumerate(bins)}
        counts = {
            "segm": np.ones_like(is_unseen),
            "segm_seen": ~is_unseen,
            "segm_unseen": is_unseen,
            "segm_unseen_overlap": is_unseen & (values >= threshold),
            **self._bins,
            **{f"class {k}": pairs.gt_classes == k for k in range(len(pairs.category_ids))},
        }
        #: {task, bin or class: number of its non-crowd objects}
        self.num_gt = {name: int((x & ~pairs.gt_is_crowd).sum()) for name, x in counts.items()}
        subsets = {name: Subset(mask) for name, mask in self._bins.items()}
        for name, area in itertools.product(("segm", "segm_unseen_overlap"), AREA_RANGES):
            subsets[f"{name}/{area}"] = Subset(counts[name], area)
        self._evaluate = PrecisionOfSubsets(Matches(pairs), subsets)

    def __call__(self, image_weights: np.ndarray | None = None) -> dict[tuple, np.ndarray]:
        """{(task, bin or class, metric): AP in 0-100}; see :meth:`PrecisionOfSubsets.__call__`."""
        precision, every_class = self._evaluate(image_weights), self._seen | self._unseen
        values = {}
        for task, subset, classes in (
            ("segm", "segm", every_class),
            ("segm_seen", "segm", self._seen),
            ("segm_unseen", "segm", self._unseen),
            ("segm_unseen_overlap", "segm_unseen_overlap", every_class),
        ):
            of_areas = [precision[f"{subset}/{x}"][..., sorted(classes)] for x in AREA_RANGES]
            of_any_area, *by_area = of_areas
            rows = of_any_area, at_iou(of_any_area, 0.5), at_iou(of_any_area, 0.75), *by_area
            values |= {(task, metric): mean_percent(x) for metric, x in zip(METRICS, rows)}
        for name in self._bins:
            values[name, "AP"] = mean_percent(precision[name])
            values[name, "AP50"] = mean_percent(at_iou(precision[name], 0.5))
        of_all = precision["segm/all"]
        rows = of_all, at_iou(of_all, 0.5), at_iou(of_all, 0.75)
        for metric, x in zip(METRICS, rows):
            # Of one class, all thresholds are defined or none.
            per_class = 100 * x.mean(axis=-2)
            values |= {(f"class {k}", metric): per_class[..., k] for k in range(x.shape[-1])}
        return values

    def by_task(self, values: Mapping[tuple, np.ndarray]) -> dict[str, dict[str, float]]:
        """{task: {metric: AP in 0-100, "num_gt": ...}} of the values of one call."""
        return {
            task: {**{m: float(values[task, m]) for m in METRICS}, "num_gt": self.num_gt[task]}
            for task in MASK_TASKS
        }


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
