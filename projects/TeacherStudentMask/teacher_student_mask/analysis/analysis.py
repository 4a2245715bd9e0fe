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

from .ground_truth import load_ground_truth
from .input_checks import InputWarning
from .measurement import MAX_DETECTIONS, Measurement, Settings
from .objects import ObjectTable
from .result_files import load_results
from .statistics import Statistics

__all__ = ["Analysis", "SCHEMA_VERSION", "analyze", "without_nan"]

SCHEMA_VERSION = 1


@dataclass
class Analysis:
    """
    Args:
        summary: all measurements, as analysis.json holds them (docs/ANALYSIS.md).
        coco: the ground truth.
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
        InputError: a file is not what it should be; the message names file, entry and field.
        ValueError: no results, an unknown baseline, or a setting is out of range.
    """
    results, gt_box_results = dict(results or {}), dict(gt_box_results or {})
    names = list(dict.fromkeys([*results, *gt_box_results]))
    if not names:
        raise ValueError("There is nothing to analyse: give results, gt_box_results, or both.")
    if baseline is not None and baseline not in names:
        raise ValueError(
            f"The baseline is {baseline!r}; it must be one of the models: {', '.join(names)}."
        )
    warnings: list[InputWarning] = []
    coco = load_ground_truth(annotations, warnings)
    run = Measurement(coco, seen_classes, settings, show_progress)
    models: dict[str, dict] = {}
    objects: dict[str, ObjectTable] = {}
    statistics: dict[str, dict[str, Statistics]] = {"detections": {}, "gt_boxes": {}}
    protocols = ["gt_boxes", "detections"]
    if set(names) == set(gt_box_results):
        protocols.reverse()
    for name in names:
        models[name] = {"results": results.get(name), "gt_box_results": gt_box_results.get(name)}
        for protocol in protocols:
            files = gt_box_results if protocol == "gt_boxes" else results
            if name not in files:
                continue
            detections = load_results(files[name], coco, warnings)
            found, table = run.measure(detections, protocol, name)
            # The last protocol wins.
            statistics[protocol][name], objects[name] = found, table
            if protocol == "detections":
                models[name]["num_detections"] = len(detections)
                models[name].update(run.summarize_detections(found, table))
            else:
                models[name]["gt_boxes"] = run.summarize_gt_boxes(found, table)
        if name in (pseudo_masks or {}):
            models[name]["pseudo_masks"] = pseudo_masks[name]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": command or " ".join(sys.argv),
        "versions": _versions(),
        "dataset": run.describe_dataset(annotations),
        "settings": _describe(settings),
        "models": models,
        "differences": [
            run.compare(statistics[protocol], first, second, protocol)
            for protocol in statistics
            for first, second in _pairs(list(statistics[protocol]), baseline)
        ],
        "warnings": [asdict(x) for x in warnings],
    }
    return Analysis(without_nan(summary), coco, objects)


def _pairs(names: list[str], baseline: str | None) -> list[tuple[str, str]]:
    if baseline is None:
        return list(itertools.combinations(names, 2))
    return [(baseline, name) for name in names if name != baseline and baseline in names]


def without_nan(value):
    """Replace nan by None, in dicts and lists of any depth: JSON has no nan."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _describe(settings: Settings) -> dict:
    values = asdict(settings)
    return {
        **values.pop("bootstrap"),
        **values,
        "overlap_bins": [float(x) for x in settings.overlap_bins],
        "max_detections": MAX_DETECTIONS,
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("teacher-student-mask", "numpy", "pycocotools", "plotly"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Run from a checkout that is not installed.
            continue
    return versions
