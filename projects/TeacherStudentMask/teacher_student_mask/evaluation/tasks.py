"""The tasks that are reported: mask AP on all, seen, unseen, and unseen overlapped objects."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .overlap import OverlapBin
from .subset_ap import (
    AREA_RANGES,
    METRICS,
    CandidatePairs,
    Matches,
    PrecisionOfSubsets,
    Subset,
    at_iou,
    mean_percent,
    subset_metrics,
)

__all__ = ["MASK_TASKS", "TaskMetrics", "tasks_with_objects"]

# {task: the objects that count in it}
MASK_TASKS = {
    "segm": "all classes",
    "segm_seen": "seen classes",
    "segm_unseen": "unseen classes",
    "segm_unseen_overlap": "unseen and overlapped",
}


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
        precision = self._evaluate(image_weights)
        values = {}
        for task, subset, classes in (
            ("segm", "segm", None),
            ("segm_seen", "segm", self._seen),
            ("segm_unseen", "segm", self._unseen),
            ("segm_unseen_overlap", "segm_unseen_overlap", None),
        ):
            metrics = subset_metrics(precision, subset, classes)
            values |= {(task, metric): x for metric, x in metrics.items()}
        for name in self._bins:
            values[name, "AP"] = mean_percent(precision[name])
            values[name, "AP50"] = mean_percent(at_iou(precision[name], 0.5))
        of_all = precision["segm/all"]
        rows = {"AP": of_all, "AP50": at_iou(of_all, 0.5), "AP75": at_iou(of_all, 0.75)}
        for metric, x in rows.items():
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
