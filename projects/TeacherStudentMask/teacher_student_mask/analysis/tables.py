"""The tables of the report, and the CSV files beside it, as pandas DataFrames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation import METRICS
from .measure import TASKS

if TYPE_CHECKING:
    import pandas as pd

    from .measure import Analysis

__all__ = [
    "PROTOCOL_LABELS",
    "bin_label",
    "bins_table",
    "class_table",
    "csv_tables",
    "differences_table",
    "false_positives_table",
    "format_difference",
    "format_interval",
    "format_number",
    "pseudo_mask_results",
    "results_by_protocol",
    "results_table",
    "task_labels",
    "uncertainty_note",
]

PROTOCOL_LABELS = {"detections": "detected boxes", "gt_boxes": "ground-truth boxes"}
_CLASS_COLUMNS = ("category_id", "seen", "num_gt", "AP", "AP50", "AP75")


def results_by_protocol(summary: Mapping) -> dict[str, dict[str, Mapping]]:
    """
    All results of an analysis, detections first: {protocol: {model: its numbers}}.

    A protocol that no model has results on is left out.
    """
    models = summary["models"].items()
    results = {
        "detections": {name: x for name, x in models if "segm" in x},
        "gt_boxes": {name: x["gt_boxes"] for name, x in models if "gt_boxes" in x},
    }
    return {protocol: x for protocol, x in results.items() if x}


def pseudo_mask_results(summary: Mapping) -> dict[str, Mapping]:
    """The quality of the pseudo masks of each method, {"MODEL: METHOD": its numbers}."""
    return {
        f"{name}: {method}": quality
        for name, x in summary["models"].items()
        for method, quality in x.get("pseudo_masks", {}).get("methods", {}).items()
    }


def task_labels(summary: Mapping) -> dict[str, str]:
    """Tasks in the order of the report, and what it calls their objects."""
    threshold = summary["settings"]["overlap_threshold"]
    return {
        "segm_unseen": "unseen classes",
        "segm_unseen_overlap": f"unseen, overlap ≥ {threshold:g}",
        "segm_seen": "seen classes",
        "segm": "all classes",
    }


def format_number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number with a fixed count of digits, "+" if asked for; "-" where it is None or nan."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    # "-0.0" would claim a direction.
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")


def format_interval(interval: Sequence[float] | None, digits: int = 1) -> str:
    """ "[low, high]"; "" where there is none."""
    if interval is None:
        return ""
    return f"[{format_number(interval[0], digits)}, {format_number(interval[1], digits)}]"


def uncertainty_note(difference: Mapping) -> str:
    """Why a difference is not established, in two or three words; "" where it is."""
    if difference["interval"] is None:
        return "no interval"
    if difference["includes_zero"]:
        return "contains 0"
    # All objects are in one image, which every resample repeats.
    return "too few images" if difference["interval"][0] == difference["interval"][1] else ""


def format_difference(entry: Mapping) -> str:
    """ "+1.2 [0.3, 2.1]", with a note where it is not established; "-" where it is undefined."""
    if entry["difference"] is None:
        return "-"
    note = uncertainty_note(entry)
    text = f"{format_number(entry['difference'], sign=True)} {format_interval(entry['interval'])}"
    return text.rstrip() + (f" ({note})" if note else "")


def bin_label(one_bin: Mapping) -> str:
    """The overlaps of a bin in words: "O = 0", "0.1 < O ≤ 0.2"."""
    low, high = one_bin["low"], one_bin["high"]
    return f"O = {high:g}" if low == high else f"{low:g} < O ≤ {high:g}"


def results_table(summary: Mapping, protocol: str) -> pd.DataFrame:
    """AP with intervals, one row per task and model, one column per metric."""
    return _frame(
        {
            "objects": label,
            "model": model,
            **{m: _cell(x[task][m], x["intervals"][task][m]) for m in METRICS},
            "num_gt": f"{x[task]['num_gt']:,}",
        }
        for task, label in task_labels(summary).items()
        for model, x in results_by_protocol(summary)[protocol].items()
    )


def differences_table(summary: Mapping, difference: Mapping) -> pd.DataFrame:
    """Model minus baseline, one row per task, one column per metric."""
    return _frame(
        {"objects": label} | {m: format_difference(difference["tasks"][task][m]) for m in METRICS}
        for task, label in task_labels(summary).items()
    )


def bins_table(results: Mapping[str, Mapping], metric: str, digits: int = 1) -> pd.DataFrame:
    """A metric of each model in each overlap bin, and how many objects the bin has."""
    rows = zip(*(x["overlap_bins"] for x in results.values()))
    return _frame(
        {
            "overlap": bin_label(row[0]),
            "objects": f"{row[0]['num_gt']:,}" + (" (few)" if row[0].get("few") else ""),
            **{
                model: _cell(x[metric], x.get(f"{metric}_interval"), digits)
                for model, x in zip(results, row)
            },
        }
        for row in rows
    )


def false_positives_table(summary: Mapping) -> pd.DataFrame:
    """Where the false-positive pixels lie, one row per model and protocol."""

    def share(counts: Mapping, kind: str) -> str:
        if not counts["total"]:
            return "-"
        return f"{100 * counts[kind] / counts['total']:.1f} % ({counts[kind]:,} px)"

    return _frame(
        {
            "model": model,
            "boxes": PROTOCOL_LABELS[protocol],
            "on the background": share(x["false_positives"], "background"),
            "on seen objects": share(x["false_positives"], "seen"),
            "on unseen objects": share(x["false_positives"], "unseen"),
            "masks": f"{x['false_positives']['num_objects']:,}",
        }
        for protocol, results in results_by_protocol(summary).items()
        for model, x in results.items()
    )


def class_table(summary: Mapping, protocol: str) -> pd.DataFrame:
    """AP of each model on each class, and the differences of the pairs that are compared."""
    results = results_by_protocol(summary)[protocol]
    columns = {name: x["per_class"] for name, x in results.items()}
    pairs = {
        f"{x['model']} − {x['baseline']}": x["per_class"]
        for x in summary["differences"]
        if x["protocol"] == protocol
    }
    return _frame(
        {
            "class": one["name"],
            "masks": "seen" if one["seen"] else "unseen",
            "objects": f"{one['num_gt']:,}",
            **{name: _cell(x[k]["AP"], x[k]["interval"]) for name, x in columns.items()},
            **{name: format_difference(x[k]) for name, x in pairs.items()},
        }
        for k, one in enumerate(next(iter(columns.values())))
    )


def csv_tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """AP of the tasks and of the classes in long form, and the objects: {file name: rows}."""
    results = [
        ({"model": model, "protocol": protocol}, x)
        for protocol, of_model in results_by_protocol(analysis.summary).items()
        for model, x in of_model.items()
    ]
    models = (
        {**key, "task": task, "metric": metric, "value": value}
        | _ends(x["intervals"][task].get(metric))
        for key, x in results
        for task in TASKS
        for metric, value in x[task].items()
    )
    classes = (
        {
            **key,
            "class": one["name"],
            **{k: one[k] for k in _CLASS_COLUMNS},
            **_ends(one["interval"]),
        }
        for key, x in results
        for one in x["per_class"]
    )
    tables = {"models": models, "per_class": classes, "objects": _object_rows(analysis)}
    return {f"{name}.csv": _frame(rows) for name, rows in tables.items()}


def _frame(rows: Iterable[Mapping]) -> pd.DataFrame:
    import pandas as pd

    # object: whole numbers stay whole where others are undefined.
    return pd.DataFrame(list(rows), dtype=object)


def _cell(value: float | None, interval: Sequence[float] | None, digits: int = 1) -> str:
    return f"{format_number(value, digits)} {format_interval(interval, digits)}".rstrip()


def _ends(interval: Sequence[float] | None) -> dict:
    return dict(zip(("low", "high"), interval or (None, None)))


def _object_rows(analysis: Analysis) -> Iterator[dict]:
    coco = analysis.coco
    for model, table in analysis.objects.items():
        for row, annotation_id in enumerate(table.annotation_ids.tolist()):
            annotation = coco.anns[annotation_id]
            background, seen, unseen = table.false_positives[row].tolist()
            yield {
                "model": model,
                "protocol": table.protocol,
                "annotation_id": annotation_id,
                "image_id": annotation["image_id"],
                "class": coco.cats[annotation["category_id"]]["name"],
                "seen": not bool(table.is_unseen[row]),
                "overlap": round(float(table.overlaps[row]), 6),
                "score": round(float(table.scores[row]), 6),
                "iou": round(float(table.ious[row]), 6),
                "boundary_iou": round(float(table.boundary_ious[row]), 6),
                "false_positives_background": background,
                "false_positives_seen": seen,
                "false_positives_unseen": unseen,
            }
