"""The measurements of a report on result files: where models fail, with bootstrap intervals."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from ..class_splits import resolve_seen_classes
from ..coco_json import Finding, load_ground_truth, load_results
from ..errors import InputError
from ..evaluation import (
    MASK_TASKS,
    METRICS,
    TaskMetrics,
    compute_overlaps,
    find_candidate_pairs,
    overlap_bins,
    warn_of_many_objects,
    yardstick_results,
)
from .objects import ObjectTable, measure_objects

__all__ = [
    "Analysis",
    "SCHEMA_VERSION",
    "Settings",
    "analyze",
    "percentile_interval",
    "resample_images",
]

SCHEMA_VERSION = 2
# Detections times resamples that are processed at once: enough that numpy's calls cost little, and
# small enough for the caches.
_MAX_ELEMENTS = 300_000
# A statistic: ("segm_unseen", "AP"), ("bin 3", "AP50"), ("class 17", "AP").
Key = tuple[str, str]


@dataclass(frozen=True)
class Settings:
    """
    Args:
        num_resamples: how often the bootstrap draws the images again; 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the draws; with one seed all models are measured on the same draws.
        overlap_threshold: smallest overlap of an object in "segm_unseen_overlap", in [0, 1].
        overlap_bins: edges, rising from 0 to 1.
        score_threshold: smallest score of a detection whose false positives are attributed.
        min_objects_per_bin: bins with fewer are flagged.
        max_detections: of a class in an image, that count; 100 as in COCO.

    Raises:
        InputError: a value is out of range.
    """

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    overlap_threshold: float = 0.3
    overlap_bins: Sequence[float] = tuple(k / 10 for k in range(11))
    score_threshold: float = 0.5
    min_objects_per_bin: int = 100
    max_detections: int = 100

    def __post_init__(self):
        for name in ("overlap_threshold", "score_threshold", "confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1].")
        overlap_bins(self.overlap_bins)


@dataclass
class Analysis:
    """
    Args:
        summary: all measurements, as analysis.json holds them (docs/ANALYSIS.md).
        coco: the ground truth; every mask is a compressed RLE.
        objects: what each model did on each object; on ground-truth boxes if all models have
            results for these, which leave out no object, else on detected boxes where it can be.
    """

    summary: dict
    coco: COCO
    objects: dict[str, ObjectTable]


def analyze(
    annotations: str,
    results: Mapping[str, str] | None = None,
    *,
    seen_classes: str | Sequence[str],
    gt_box_results: Mapping[str, str] | None = None,
    settings: Settings = Settings(),
    pseudo_masks: Mapping[str, dict] | None = None,
    baseline: str | None = None,
) -> Analysis:
    """
    Measure one or several models on the same ground truth.

    Args:
        annotations: path of a COCO json with a mask on every object.
        results: {name: path of a COCO result file}, masks and boxes as detected.
        seen_classes: the classes whose masks training used: a specification for
            :func:`resolve_seen_classes`, or a list of names.
        gt_box_results: {name: path of a COCO result file} with one mask per ground-truth box,
            which tells the mask head from the detector. A name may stand in both. The yardsticks
            of :func:`yardstick_results` are measured beside them.
        settings: thresholds, bins, intervals.
        pseudo_masks: {name: quality}, as :func:`measure_pseudo_masks` returns it.
        baseline: the model that all others are compared with; None: every pair is compared.

    Returns:
        The measurements; :func:`write_report` makes files of them.

    Raises:
        InputError: a file is not what it should be (the message names file, entry and field), or
            the name of a class or of the baseline is not known.
    """
    on_gt_boxes = gt_box_results or {}
    files = {"detections": results or {}, "gt_boxes": on_gt_boxes}
    names = list(dict.fromkeys([*files["detections"], *on_gt_boxes]))
    if baseline not in (None, *names):
        raise InputError(
            f"The baseline is {baseline!r}; it must be one of the models: {', '.join(names)}."
        )
    warnings: list[Finding] = []
    coco = load_ground_truth(annotations, warnings=warnings)
    remedy = "--max-detections (Settings.max_detections) raises the number."
    rows = coco.dataset["annotations"]
    warn_of_many_objects(rows, settings.max_detections, annotations, remedy)
    for annotation in rows:
        annotation["segmentation"] = coco.annToRLE(annotation)
    dataset = _Dataset(coco, seen_classes, settings)
    models: dict[str, dict] = {
        name: {"results": files["detections"].get(name), "gt_box_results": on_gt_boxes.get(name)}
        for name in names
    }
    measured: dict[str, dict[str, _Measured]] = {protocol: {} for protocol in files}
    for name, (protocol, paths) in itertools.product(names, files.items()):
        if name not in paths:
            continue
        detections = load_results(paths[name], coco, warnings)
        found = dataset.measure(detections, protocol, f"{name} ({protocol})")
        measured[protocol][name] = found
        if protocol == "gt_boxes":
            models[name]["gt_boxes"] = found.numbers
        else:
            models[name] |= {
                "num_detections": len(detections),
                "bbox": dataset.measure_boxes(detections),
                **found.numbers,
            }
    yardsticks = yardstick_results(coco) if on_gt_boxes else {}
    for name, quality in (pseudo_masks or {}).items():
        models[name]["pseudo_masks"] = quality
    summary = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            **{x: importlib.metadata.version(x) for x in ("numpy", "pycocotools")},
        },
        "dataset": dataset.describe(annotations),
        "settings": asdict(settings),
        "models": models,
        "yardsticks": {
            name: dataset.measure(found, "gt_boxes", name).numbers
            for name, found in yardsticks.items()
        },
        "differences": [
            {"baseline": first, "model": second, "protocol": protocol}
            | dataset.compare(of_protocol[first], of_protocol[second])
            for protocol, of_protocol in measured.items()
            for first, second in itertools.permutations(of_protocol, 2)
            if (first == baseline if baseline else names.index(first) < names.index(second))
        ],
        "warnings": [
            {"file": x.file, "message": str(x).removeprefix(f"{x.file}: "), "count": x.count}
            for x in warnings
        ],
    }
    # JSON has no nan.
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)
    preferred = "gt_boxes" if len(on_gt_boxes) == len(names) else "detections"
    shown = {name: measured[preferred].get(name) or measured["gt_boxes"][name] for name in names}
    return Analysis(summary, coco, {name: x.table for name, x in shown.items()})


@dataclass(frozen=True)
class _Measured:
    """One result file: all AP, in 0-100, nan where there is no object, and its objects."""

    values: dict[Key, float]
    samples: dict[Key, np.ndarray]  # (resamples,) each, on resampled images
    table: ObjectTable
    numbers: dict  # as analysis.json holds them


class _Dataset:
    """What all models of one analysis share: ground truth, split, overlaps and settings."""

    def __init__(self, coco: COCO, seen_classes: str | Sequence[str], settings: Settings):
        self.coco, self.settings = coco, settings
        self.category_ids = sorted(coco.cats)
        self.class_names = [coco.cats[i]["name"] for i in self.category_ids]
        # A test set may have no seen class at all.
        spec = seen_classes if isinstance(seen_classes, str) else f", {json.dumps(seen_classes)}"
        self.seen = set(resolve_seen_classes(spec, self.class_names)) if seen_classes else set()
        self.unseen = set(range(len(self.class_names))) - self.seen
        self.unseen_ids = {self.category_ids[k] for k in self.unseen}
        self.bins = overlap_bins(settings.overlap_bins)
        self.overlaps = compute_overlaps(coco)

    def measure_boxes(self, detections: Sequence[dict]) -> dict[str, float]:
        """AP of the detected boxes, without intervals."""
        limit = self.settings.max_detections
        pairs = find_candidate_pairs(self.coco, detections, max_detections=limit, iou_type="bbox")
        evaluate = TaskMetrics(pairs, self.overlaps, seen=(), threshold=1, bins=[])
        return evaluate.by_task(evaluate())["segm"]

    def measure(self, detections: Sequence[dict], protocol: str, title: str) -> _Measured:
        """AP of the masks, also on resampled images, and what is measured on single objects."""
        settings = self.settings
        pairs = find_candidate_pairs(self.coco, detections, max_detections=settings.max_detections)
        evaluate = TaskMetrics(
            pairs, self.overlaps, self.seen, settings.overlap_threshold, self.bins
        )
        values = {key: float(x) for key, x in evaluate().items()}
        size = max(1, _MAX_ELEMENTS // max(1, len(pairs.dt_images)))
        draws = resample_images(len(pairs.image_ids), settings.num_resamples, settings.seed, size)
        # numpy lets other threads run while it computes.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            batches = pool.map(evaluate, draws)
            total = -(-settings.num_resamples // size)
            sampled = list(tqdm(batches, desc=f"{title}: intervals", total=total, disable=None))
        samples = {key: np.concatenate([np.zeros(0), *(x[key] for x in sampled)]) for key in values}
        table = measure_objects(
            self.coco,
            detections,
            self.overlaps,
            self.unseen_ids,
            protocol=protocol,
            score_threshold=settings.score_threshold,
        )
        numbers = self._summarize(evaluate, values, samples, table)
        return _Measured(values, samples, table, numbers)

    def _summarize(
        self,
        evaluate: TaskMetrics,
        values: Mapping[Key, float],
        samples: Mapping[Key, np.ndarray],
        table: ObjectTable,
    ) -> dict:
        def interval(key: Key) -> list[float] | None:
            return percentile_interval(samples[key], self.settings.confidence)

        is_on_gt_boxes = table.protocol == "gt_boxes"
        numbers: dict = evaluate.by_task(values)
        numbers["intervals"] = {
            task: {m: interval((task, m)) for m in METRICS} for task in MASK_TASKS
        }
        if is_on_gt_boxes:
            numbers |= _mask_quality(table, table.is_unseen)
        numbers["per_class"] = [
            {
                "name": name,
                "category_id": self.category_ids[k],
                "seen": k in self.seen,
                "num_gt": evaluate.num_gt[f"class {k}"],
                **{m: values[f"class {k}", m] for m in ("AP", "AP50", "AP75")},
                "interval": interval((f"class {k}", "AP")),
            }
            for k, name in enumerate(self.class_names)
        ]
        numbers["overlap_bins"] = []
        for k, x in enumerate(self.bins):
            key, num = f"bin {k}", evaluate.num_gt[f"bin {k}"]
            row = {"low": x.low, "high": x.high, "num_gt": num}
            row["few"] = num < self.settings.min_objects_per_bin
            row |= {m: values[key, m] for m in ("AP", "AP50")}
            row |= {f"{m}_interval": interval((key, m)) for m in ("AP", "AP50")}
            if is_on_gt_boxes:
                row |= _mask_quality(table, table.is_unseen & x.contains(table.overlaps))
            numbers["overlap_bins"].append(row)
        attributed = table.is_unseen & table.is_matched
        background, seen, unseen = table.false_positives[attributed].sum(axis=0).tolist()
        numbers["false_positives"] = {
            "protocol": table.protocol,
            "score_threshold": None if is_on_gt_boxes else self.settings.score_threshold,
            "background": background,
            "seen": seen,
            "unseen": unseen,
            "total": background + seen + unseen,
            "crowd": int(table.crowd_pixels[attributed].sum()),
            "num_objects": int(attributed.sum()),
            "num_unmatched_objects": int((table.is_unseen & ~table.is_matched).sum()),
            "num_unmatched_detections": table.num_unmatched_detections,
        }
        return numbers

    def compare(self, baseline: _Measured, model: _Measured) -> dict:
        """Model minus baseline, both measured on the same draws of the images."""

        def difference(key: Key) -> dict:
            samples = model.samples[key] - baseline.samples[key]
            interval = percentile_interval(samples, self.settings.confidence)
            return {
                "difference": model.values[key] - baseline.values[key],
                "interval": interval,
                # Without an interval nothing is established.
                "includes_zero": interval is None or interval[0] <= 0 <= interval[1],
            }

        return {
            "tasks": {task: {m: difference((task, m)) for m in METRICS} for task in MASK_TASKS},
            "per_class": [
                {key: x[key] for key in ("name", "seen", "num_gt")}
                | difference((f"class {k}", "AP"))
                for k, x in enumerate(model.numbers["per_class"])
            ],
        }

    def describe(self, path: str) -> dict:
        objects = [x for x in self.coco.dataset["annotations"] if not x["iscrowd"]]
        num_unseen = sum(x["category_id"] in self.unseen_ids for x in objects)
        return {
            "annotations": str(path),
            "num_images": len(self.coco.imgs),
            "num_objects": len(objects),
            "num_crowd": len(self.coco.anns) - len(objects),
            "num_seen": len(objects) - num_unseen,
            "num_unseen": num_unseen,
            "seen_classes": [self.class_names[k] for k in sorted(self.seen)],
            "unseen_classes": [self.class_names[k] for k in sorted(self.unseen)],
        }


def _mask_quality(table: ObjectTable, chosen: np.ndarray) -> dict:
    """Mean IoU of the chosen objects; one without a mask counts as 0, so none can be left out."""
    if not chosen.any():
        return {"num_masks": 0, "mask_iou": float("nan"), "boundary_iou": float("nan")}
    return {
        "num_masks": int((chosen & table.is_matched).sum()),
        "mask_iou": float(np.nan_to_num(table.ious[chosen]).mean()),
        "boundary_iou": float(np.nan_to_num(table.boundary_ious[chosen]).mean()),
    }


def resample_images(
    num_images: int, num_resamples: int, seed: int, batch_size: int = 1
) -> Iterator[np.ndarray]:
    """
    Draw images with replacement, as many as there are (Efron's bootstrap).

    The same seed draws the same images, whatever the batch size.

    Yields:
        int, shape (batch, num_images), how often each image was drawn; ``num_resamples`` rows in
        all, ``batch_size`` at a time.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, batch_size):
        size = min(batch_size, num_resamples - start)
        drawn = rng.integers(num_images, size=(size, num_images))
        yield np.stack([np.bincount(x, minlength=num_images) for x in drawn])


def percentile_interval(samples: np.ndarray, confidence: float) -> list[float] | None:
    """
    Interval between the percentiles that leave out the same share of the samples on either side.

    Args:
        samples: shape (resamples,); nan, where a resample left it undefined, is left out.
        confidence: share of the samples inside, in (0, 1).

    Returns:
        Low and high end, or None where no sample is defined.
    """
    samples = samples[~np.isnan(samples)]
    tail = 50 * (1 - confidence)
    return np.percentile(samples, [tail, 100 - tail]).tolist() if len(samples) else None
