"""The measurements of a report on result files: where models fail, with intervals."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from ..class_splits import resolve_seen_classes
from ..coco_json import Finding, load_ground_truth, load_results
from ..errors import InputError
from ..evaluation import METRICS, compute_overlaps, find_candidate_pairs, overlap_bins
from .intervals import Statistics, compute_statistics
from .objects import ObjectTable, measure_objects

__all__ = ["Analysis", "SCHEMA_VERSION", "Settings", "TASKS", "analyze"]

SCHEMA_VERSION = 1
TASKS = ("segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
# Per image and class, as in COCO.
_MAX_DETECTIONS = 100


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
        num_resamples: how often the bootstrap draws the images again; 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the draws; with one seed all models are measured on the same draws.

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
    ties: str = "seen"

    def __post_init__(self):
        for name in ("overlap_threshold", "score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be in [0, 1].")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}; it must lie between 0 and 1.")
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
    command: str | None = None,
    show_progress: bool = True,
) -> Analysis:
    """
    Measure one or several models on the same ground truth.

    Args:
        annotations: path of a COCO json with a mask on every object.
        results: {name: path of a COCO result file}, masks and boxes as detected.
        seen_classes: the classes whose masks training used: a specification for
            :func:`resolve_seen_classes`, or a list of names.
        gt_box_results: {name: path of a COCO result file} with one mask per ground-truth box,
            which tells the mask head from the detector. A name may stand in both.
        settings: thresholds, bins, intervals.
        pseudo_masks: {name: quality}, as :func:`measure_pseudo_masks` returns it.
        baseline: the model that all others are compared with; None: every pair is compared.
        command: for the record; None: that of this process.
        show_progress: write progress bars to stderr.

    Returns:
        The measurements; :func:`write_report` makes files of them.

    Raises:
        InputError: a file is not what it should be (the message names file, entry and field), or
            there are no results, or a name of a class or of the baseline is not known.
    """
    results, gt_box_results = dict(results or {}), dict(gt_box_results or {})
    names = list(dict.fromkeys([*results, *gt_box_results]))
    if not names:
        raise InputError("There is nothing to analyse: give results, gt_box_results, or both.")
    if baseline is not None and baseline not in names:
        raise InputError(
            f"The baseline is {baseline!r}; it must be one of the models: {', '.join(names)}."
        )
    warnings: list[Finding] = []
    coco = load_ground_truth(annotations, warnings=warnings)
    for annotation in coco.dataset["annotations"]:
        annotation["segmentation"] = coco.annToRLE(annotation)
    dataset = _Dataset(coco, seen_classes, settings)
    models: dict[str, dict] = {
        name: {"results": results.get(name), "gt_box_results": gt_box_results.get(name)}
        for name in names
    }
    objects: dict[str, dict[str, ObjectTable]] = {"detections": {}, "gt_boxes": {}}
    statistics: dict[str, dict[str, Statistics]] = {"detections": {}, "gt_boxes": {}}
    for name, (protocol, files) in itertools.product(
        names, (("detections", results), ("gt_boxes", gt_box_results))
    ):
        if name not in files:
            continue
        detections = load_results(files[name], coco, warnings)
        found = dataset.compute_statistics(detections, f"{name} ({protocol})", show_progress)
        table = dataset.measure_objects(detections, protocol)
        statistics[protocol][name], objects[protocol][name] = found, table
        if protocol == "gt_boxes":
            models[name]["gt_boxes"] = dataset.summarize(found, table)
        else:
            models[name]["num_detections"] = len(detections)
            models[name].update(dataset.summarize(found, table))
    for name in names:
        if name in (pseudo_masks or {}):
            models[name]["pseudo_masks"] = pseudo_masks[name]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": command or " ".join(sys.argv),
        "versions": _versions(),
        "dataset": dataset.describe(annotations),
        "settings": {
            **asdict(settings),
            "overlap_bins": [float(x) for x in settings.overlap_bins],
            "max_detections": _MAX_DETECTIONS,
        },
        "models": models,
        "differences": [
            dataset.compare(of_protocol, first, second, protocol)
            for protocol, of_protocol in statistics.items()
            for first, second in _pairs(list(of_protocol), baseline)
        ],
        "warnings": [
            {"file": x.file, "message": str(x).removeprefix(f"{x.file}: "), "count": x.count}
            for x in warnings
        ],
    }
    preferred = "gt_boxes" if set(names) == set(gt_box_results) else "detections"
    shown = {name: objects[preferred].get(name) or objects["gt_boxes"][name] for name in names}
    return Analysis(_without_nan(summary), coco, shown)


class _Dataset:
    """What all models of one analysis share: ground truth, split, overlaps and settings."""

    def __init__(self, coco: COCO, seen_classes: str | Sequence[str], settings: Settings):
        self.coco, self.settings = coco, settings
        self.category_ids = sorted(coco.cats)
        self.class_names = [coco.cats[i]["name"] for i in self.category_ids]
        if not isinstance(seen_classes, str):
            unknown = sorted(set(seen_classes) - set(self.class_names))
            if unknown:
                raise InputError(
                    f"Unknown seen classes {unknown}; the dataset has {self.class_names}."
                )
            seen_classes = [self.class_names.index(x) for x in seen_classes]
        else:
            seen_classes = resolve_seen_classes(seen_classes, self.class_names)
        self.seen = set(seen_classes)
        self.unseen = [k for k in range(len(self.class_names)) if k not in self.seen]
        self.unseen_ids = {self.category_ids[k] for k in self.unseen}
        self.bins = overlap_bins(settings.overlap_bins)
        self.overlaps = compute_overlaps(coco)

    def compute_statistics(self, detections: list[dict], title: str, progress: bool) -> Statistics:
        pairs = find_candidate_pairs(self.coco, detections, max_detections=_MAX_DETECTIONS)
        # Crowds have no overlap, and count nowhere.
        overlaps = [self.overlaps.get(i, 0.0) for i in pairs.gt_ids.tolist()]
        settings = self.settings
        total = settings.num_resamples
        with tqdm(desc=f"{title}: intervals", total=total, disable=not progress) as bar:
            return compute_statistics(
                pairs,
                np.array(overlaps, dtype=np.float64),
                self.unseen,
                overlap_threshold=settings.overlap_threshold,
                bins=self.bins,
                num_resamples=settings.num_resamples,
                confidence=settings.confidence,
                seed=settings.seed,
                progress=bar.update,
            )

    def measure_objects(self, detections: list[dict], protocol: str) -> ObjectTable:
        return measure_objects(
            self.coco,
            detections,
            self.overlaps,
            self.unseen_ids,
            protocol=protocol,
            score_threshold=self.settings.score_threshold,
            ties=self.settings.ties,
        )

    def summarize(self, statistics: Statistics, table: ObjectTable) -> dict:
        """All numbers of one model under one protocol."""
        is_on_gt_boxes = table.protocol == "gt_boxes"
        tasks = {
            task: {
                **{metric: statistics.values[task, metric] for metric in METRICS},
                "num_gt": statistics.num_gt[task],
            }
            for task in TASKS
        }
        tasks["intervals"] = {
            task: {metric: statistics.interval((task, metric)) for metric in METRICS}
            for task in TASKS
        }
        bins = self._bins(statistics)
        if is_on_gt_boxes:
            tasks.update(_mask_quality(table, table.is_unseen))
            for row, one in zip(bins, self.bins):
                row.update(_mask_quality(table, table.is_unseen & one.contains(table.overlaps)))
        return {
            **tasks,
            "per_class": self._classes(statistics),
            "overlap_bins": bins,
            "false_positives": self._false_positives(table),
        }

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
        """Model minus baseline, both measured on the same draws of the images."""

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

    def describe(self, path: str) -> dict:
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


def _mask_quality(table: ObjectTable, chosen: np.ndarray) -> dict:
    """Mean IoU of the chosen objects; one without a mask counts as 0, so none can be left out."""
    if not chosen.any():
        return {"num_masks": 0, "mask_iou": float("nan"), "boundary_iou": float("nan")}
    return {
        "num_masks": int((chosen & table.is_matched).sum()),
        "mask_iou": float(np.nan_to_num(table.ious[chosen]).mean()),
        "boundary_iou": float(np.nan_to_num(table.boundary_ious[chosen]).mean()),
    }


def _pairs(names: list[str], baseline: str | None) -> list[tuple[str, str]]:
    if baseline is None:
        return list(itertools.combinations(names, 2))
    return [(baseline, name) for name in names if name != baseline and baseline in names]


def _without_nan(value):
    # JSON has no nan.
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(x) for x in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("teacher-student-mask", "numpy", "pycocotools", "plotly"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Run from a checkout that is not installed.
            continue
    return versions
