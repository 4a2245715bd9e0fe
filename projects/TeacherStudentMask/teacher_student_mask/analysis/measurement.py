"""What is measured of each model, on shared ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from ..class_splits import resolve_seen_classes
from ..evaluation import METRICS, OverlapBin, compute_overlaps, find_candidate_pairs, overlap_bins
from .objects import ObjectTable, measure_objects
from .statistics import Bootstrap, Statistics, compute_statistics

__all__ = ["MAX_DETECTIONS", "Measurement", "Settings"]

TASKS = ("segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
# Per image and class, as in COCO.
MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Settings:
    """
    Args:
        overlap_threshold: smallest overlap of an object in "segm_unseen_overlap", in [0, 1].
        overlap_bins: edges, rising from 0 to 1.
        score_threshold: smallest score of a detection whose false positives are attributed.
        min_objects_per_bin: bins with fewer are flagged.
        ties: whose a false-positive pixel is that seen and unseen objects cover: "seen" or
            "smaller".
        bootstrap: of the confidence intervals.

    Raises:
        ValueError: a value is out of range.
    """

    overlap_threshold: float = 0.3
    overlap_bins: Sequence[float] = tuple(k / 10 for k in range(11))
    score_threshold: float = 0.5
    min_objects_per_bin: int = 100
    ties: str = "seen"
    bootstrap: Bootstrap = Bootstrap()

    def __post_init__(self):
        for name in ("overlap_threshold", "score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1].")
        overlap_bins(self.overlap_bins)


class Measurement:
    """What all models of one analysis share: ground truth, split, overlaps and settings."""

    def __init__(
        self, coco: COCO, seen_classes: str | Sequence[str], settings: Settings, show_progress: bool
    ):
        self.coco, self.settings, self.show_progress = coco, settings, show_progress
        categories = [coco.cats[i] for i in sorted(coco.cats)]
        self.class_names = [x["name"] for x in categories]
        self.seen = set(_resolve(seen_classes, self.class_names))
        self.unseen = [k for k in range(len(categories)) if k not in self.seen]
        self.unseen_ids = {categories[k]["id"] for k in self.unseen}
        self.category_ids = [x["id"] for x in categories]
        self.bins: list[OverlapBin] = overlap_bins(settings.overlap_bins)
        self.overlaps = compute_overlaps(coco)

    def measure(
        self, detections: list[dict], protocol: str, name: str
    ) -> tuple[Statistics, ObjectTable]:
        pairs = find_candidate_pairs(self.coco, detections, max_detections=MAX_DETECTIONS)
        overlaps = [self.overlaps.get(i, 0.0) for i in pairs.gt_ids.tolist()]
        with tqdm(
            desc=f"{name} ({protocol}): intervals",
            total=self.settings.bootstrap.num_resamples,
            disable=not self.show_progress,
        ) as bar:
            statistics = compute_statistics(
                pairs,
                np.array(overlaps, dtype=np.float64),
                self.unseen,
                overlap_threshold=self.settings.overlap_threshold,
                bins=self.bins,
                bootstrap=self.settings.bootstrap,
                progress=bar.update,
            )
        table = measure_objects(
            self.coco,
            detections,
            self.overlaps,
            self.unseen_ids,
            protocol=protocol,
            score_threshold=self.settings.score_threshold,
            ties=self.settings.ties,
        )
        return statistics, table

    def summarize_detections(self, statistics: Statistics, table: ObjectTable) -> dict:
        return {
            **self._tasks(statistics),
            "per_class": self._classes(statistics),
            "overlap_bins": self._bins(statistics),
            "false_positives": self._false_positives(table),
        }

    def summarize_gt_boxes(self, statistics: Statistics, table: ObjectTable) -> dict:
        bins = self._bins(statistics)
        for row, overlap_bin in zip(bins, self.bins):
            chosen = table.is_unseen & overlap_bin.contains(table.overlaps)
            row.update(_mask_quality(table, chosen))
        return {
            **self._tasks(statistics),
            **_mask_quality(table, table.is_unseen),
            "per_class": self._classes(statistics),
            "overlap_bins": bins,
            "false_positives": self._false_positives(table),
        }

    def _tasks(self, statistics: Statistics) -> dict:
        tasks = {
            task: {
                **{metric: statistics.values[task, metric] for metric in METRICS},
                "num_gt": statistics.num_gt[task],
            }
            for task in TASKS
        }
        intervals = {
            task: {metric: statistics.interval((task, metric)) for metric in METRICS}
            for task in TASKS
        }
        return {**tasks, "intervals": intervals}

    def _classes(self, statistics: Statistics) -> list[dict]:
        return [
            {
                "name": name,
                "category_id": self.category_ids[k],
                "seen": k in self.seen,
                "num_gt": statistics.num_gt[f"class {k}"],
                **{m: statistics.values[f"class {k}", m] for m in ("AP", "AP50", "AP75")},
                "interval": statistics.interval((f"class {k}", "AP")),
            }
            for k, name in enumerate(self.class_names)
        ]

    def _bins(self, statistics: Statistics) -> list[dict]:
        return [
            {
                "low": x.low,
                "high": x.high,
                "num_gt": statistics.num_gt[f"bin {k}"],
                "few": statistics.num_gt[f"bin {k}"] < self.settings.min_objects_per_bin,
                "AP": statistics.values[f"bin {k}", "AP"],
                "AP50": statistics.values[f"bin {k}", "AP50"],
                "AP_interval": statistics.interval((f"bin {k}", "AP")),
                "AP50_interval": statistics.interval((f"bin {k}", "AP50")),
            }
            for k, x in enumerate(self.bins)
        ]

    def _false_positives(self, table: ObjectTable) -> dict:
        evaluated = table.is_unseen & table.is_matched
        background, seen, unseen = table.false_positives[evaluated].sum(axis=0).tolist()
        is_detected = table.protocol == "detections"
        return {
            "protocol": table.protocol,
            "score_threshold": self.settings.score_threshold if is_detected else None,
            "background": background,
            "seen": seen,
            "unseen": unseen,
            "total": background + seen + unseen,
            "crowd": int(table.crowd_pixels[evaluated].sum()),
            "num_objects": int(evaluated.sum()),
            "num_unmatched_objects": int((table.is_unseen & ~table.is_matched).sum()),
            "num_unmatched_detections": table.num_unmatched_detections,
        }

    def compare(
        self, statistics: Mapping[str, Statistics], baseline: str, model: str, protocol: str
    ) -> dict:
        def difference(key: tuple[str, str]) -> dict:
            value, interval = statistics[model].difference(statistics[baseline], key)
            # Without an interval nothing is established.
            includes_zero = interval is None or interval[0] <= 0 <= interval[1]
            return {"difference": value, "interval": interval, "includes_zero": includes_zero}

        return {
            "baseline": baseline,
            "model": model,
            "protocol": protocol,
            "tasks": {task: {m: difference((task, m)) for m in METRICS} for task in TASKS},
            "per_class": [
                {
                    "name": name,
                    "seen": k in self.seen,
                    "num_gt": statistics[model].num_gt[f"class {k}"],
                    **difference((f"class {k}", "AP")),
                }
                for k, name in enumerate(self.class_names)
            ],
        }

    def describe_dataset(self, path: str) -> dict:
        annotations = self.coco.dataset["annotations"]
        objects = [x for x in annotations if not x["iscrowd"]]
        num_unseen = sum(x["category_id"] in self.unseen_ids for x in objects)
        return {
            "annotations": str(path),
            "num_images": len(self.coco.imgs),
            "num_objects": len(objects),
            "num_crowd": len(annotations) - len(objects),
            "num_seen": len(objects) - num_unseen,
            "num_unseen": num_unseen,
            "seen_classes": [self.class_names[k] for k in sorted(self.seen)],
            "unseen_classes": [self.class_names[k] for k in self.unseen],
        }


def _resolve(seen_classes: str | Sequence[str], class_names: list[str]) -> list[int]:
    if isinstance(seen_classes, str):
        return resolve_seen_classes(seen_classes, class_names)
    unknown = sorted(set(seen_classes) - set(class_names))
    if unknown:
        raise ValueError(f"Unknown seen classes {unknown}; the dataset has {class_names}.")
    return [class_names.index(x) for x in seen_classes]


def _mask_quality(table: ObjectTable, chosen: np.ndarray) -> dict:
    """Mean IoU of the chosen objects; one without a mask counts as 0, so none can be left out."""
    if not chosen.any():
        return {"num_masks": 0, "mask_iou": float("nan"), "boundary_iou": float("nan")}
    return {
        "num_masks": int((chosen & table.is_matched).sum()),
        "mask_iou": float(np.nan_to_num(table.ious[chosen]).mean()),
        "boundary_iou": float(np.nan_to_num(table.boundary_ious[chosen]).mean()),
    }
