"""The data files beside the report: analysis.json and tables as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .report_tables import result_sets

if TYPE_CHECKING:
    from .analysis import Analysis

__all__ = ["DATA_FILES", "to_strict_json", "write_data_files", "write_text"]

_TASKS = ("segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
_BIN_METRICS = ("AP", "AP50")
_COUNTS = ("background", "seen", "unseen", "total", "crowd", "score_threshold", "num_objects")
_COUNTS += ("num_unmatched_objects", "num_unmatched_detections")

# What the report says of each file.
DATA_FILES = {
    "analysis.json": "everything but the single objects",
    "models.csv": "one row per model, task and metric, with its interval",
    "differences.csv": "one row per pair of models, task (or class) and metric",
    "overlap_bins.csv": "one row per model and overlap bin",
    "per_class.csv": "one row per model and class",
    "false_positives.csv": "one row per model: pixels by what lies under them",
    "objects.csv": "one row per object and model",
}


def write_data_files(analysis: Analysis, folder: Path) -> None:
    """Write all files of DATA_FILES; those without a row have their header only."""
    summary = analysis.summary
    write_text(folder / "analysis.json", to_strict_json(summary, indent=2) + "\n")
    for name, rows in {
        "models.csv": _models(summary),
        "differences.csv": _differences(summary),
        "overlap_bins.csv": _overlap_bins(summary),
        "per_class.csv": _per_class(summary),
        "false_positives.csv": _false_positives(summary),
        "objects.csv": _objects(analysis),
    }.items():
        _write_csv(folder / name, rows)


def to_strict_json(value, indent: int | None = None) -> str:
    """
    JSON that every parser reads: nan and infinite numbers become null.

    Args:
        value: mappings, sequences, strings, numbers of Python or numpy, booleans, None.
        indent: as of `json.dumps`.
    """
    return json.dumps(_to_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with line ends of one character on every system."""
    # A json may have names with half of a surrogate pair, which UTF-8 cannot encode.
    path.write_bytes(text.encode("utf-8", errors="backslashreplace"))


def _to_plain(value):
    if isinstance(value, Mapping):
        return {str(key): _to_plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_to_plain(x) for x in value]
    if isinstance(value, np.generic):
        return _to_plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_csv(path: Path, rows: Iterable[tuple]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in rows:
            writer.writerow([_to_field(x) for x in row])


def _to_field(value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _ends(interval) -> tuple:
    return (None, None) if interval is None else tuple(interval)


def _models(summary: Mapping) -> Iterator[tuple]:
    yield "model", "protocol", "task", "metric", "value", "low", "high"
    for results in result_sets(summary):
        for task in _TASKS:
            for metric, value in results.data.get(task, {}).items():
                ends = _ends(results.interval(task, metric))
                yield results.model, results.protocol, task, metric, value, *ends


def _differences(summary: Mapping) -> Iterator[tuple]:
    yield "baseline", "model", "protocol", "task", "class", "metric", *_DIFFERENCE
    for pair in summary["differences"]:
        names = pair["baseline"], pair["model"], pair["protocol"]
        for task, metrics in pair["tasks"].items():
            for metric, entry in metrics.items():
                yield *names, task, None, metric, *_difference(entry)
        for entry in pair.get("per_class", []):
            yield *names, None, entry["name"], "AP", *_difference(entry)


_DIFFERENCE = ("difference", "low", "high", "includes_zero")


def _difference(entry: Mapping) -> tuple:
    return entry["difference"], *_ends(entry["interval"]), entry["includes_zero"]


def _overlap_bins(summary: Mapping) -> Iterator[tuple]:
    ends = [f"{metric}{end}" for metric in _BIN_METRICS for end in ("", "_low", "_high")]
    yield "model", "protocol", "method", "low", "high", "num_gt", "few", *ends, *_BIN_IOUS
    for results in result_sets(summary):
        for one in results.data.get("overlap_bins", []):
            yield results.model, results.protocol, None, *_bin(one)
    for model, data in summary["models"].items():
        for method, quality in data.get("pseudo_masks", {}).get("methods", {}).items():
            for one in quality["overlap_bins"]:
                yield model, "pseudo_masks", method, *_bin(one)


_BIN_IOUS = ("num_masks", "mask_iou", "boundary_iou")


def _bin(one: Mapping) -> Iterator:
    yield from (one["low"], one["high"], one["num_gt"], one.get("few"))
    for metric in _BIN_METRICS:
        yield from (one.get(metric), *_ends(one.get(f"{metric}_interval")))
    yield from (one.get(key) for key in _BIN_IOUS)


def _per_class(summary: Mapping) -> Iterator[tuple]:
    header = ("model", "protocol", "class", "category_id", "seen", "num_gt")
    yield *header, "AP", "low", "high", "AP50", "AP75"
    for results in result_sets(summary):
        for one in results.data.get("per_class", []):
            values = one["name"], one["category_id"], one["seen"], one["num_gt"], one["AP"]
            ends = _ends(one["interval"])
            yield results.model, results.protocol, *values, *ends, one["AP50"], one["AP75"]


def _false_positives(summary: Mapping) -> Iterator[tuple]:
    yield "model", "protocol", *_COUNTS
    for results in result_sets(summary):
        counts = results.data.get("false_positives")
        if counts is not None:
            yield results.model, results.protocol, *(counts.get(x) for x in _COUNTS)


def _objects(analysis: Analysis) -> Iterator[tuple]:
    header = ("model", "protocol", "annotation_id", "image_id", "class", "seen", "overlap")
    pixels = ("false_positives_background", "false_positives_seen", "false_positives_unseen")
    yield *header, "score", "iou", "boundary_iou", *pixels
    coco = analysis.coco
    for model, table in analysis.objects.items():
        for row, annotation_id in enumerate(table.annotation_ids.tolist()):
            annotation = coco.anns[annotation_id]
            yield (
                model,
                table.protocol,
                annotation_id,
                annotation["image_id"],
                coco.cats[annotation["category_id"]]["name"],
                not bool(table.is_unseen[row]),
                *(
                    round(float(x[row]), 6)
                    for x in (table.overlaps, table.scores, table.ious, table.boundary_ious)
                ),
                *table.false_positives[row].tolist(),
            )
