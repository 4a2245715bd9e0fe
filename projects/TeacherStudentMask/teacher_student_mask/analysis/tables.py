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
_DIFFERENCE_COLUMNS = ["baseline", "model", "protocol", "task", "class", "metric"]
_DIFFERENCE_COLUMNS += ["difference", "low", "high", "includes_zero"]
_FALSE_POSITIVE_COUNTS = ("background", "seen", "unseen", "total", "crowd", "score_threshold")
_FALSE_POSITIVE_COUNTS += ("num_objects", "num_unmatched_objects", "num_unmatched_detections")


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
    """The quality of the pseudo masks of each method, {label of model and method: its numbers}."""
    of_model = {
        name: x["pseudo_masks"]["methods"]
        for name, x in summary["models"].items()
        if "pseudo_masks" in x
    }
    return {
        f"{name}: {method}" if len(of_model) > 1 else method: quality
        for name, methods in of_model.items()
        for method, quality in methods.items()
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
    """
    A number with a fixed count of digits; "-" where it is None or nan.

    Args:
        value: what to write.
        digits: after the point.
        sign: whether to write the plus of a positive number.
    """
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
            **{m: _cell(x[task].get(m), x["intervals"][task].get(m)) for m in METRICS},
            "num_gt": f"{x[task]['num_gt']:,}",
        }
        for task, label in task_labels(summary).items()
        for model, x in results_by_protocol(summary)[protocol].items()
    )


def differences_table(summary: Mapping, difference: Mapping) -> pd.DataFrame:
    """Model minus baseline, one row per task, one column per metric."""
    return _frame(
        {
            "objects": label,
            **{m: format_difference(difference["tasks"][task][m]) for m in METRICS},
        }
        for task, label in task_labels(summary).items()
    )


def bins_table(results: Mapping[str, Mapping], metric: str, digits: int = 1) -> pd.DataFrame:
    """A metric of each model in each overlap bin, and how many objects the bin has."""
    bins = {model: x["overlap_bins"] for model, x in results.items()}
    first = next(iter(bins.values()))
    return _frame(
        {
            "overlap": bin_label(one),
            "objects": f"{one['num_gt']:,}" + (" (few)" if one.get("few") else ""),
            **{
                model: _cell(x[k].get(metric), x[k].get(f"{metric}_interval"), digits)
                for model, x in bins.items()
            },
        }
        for k, one in enumerate(first)
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
    pairs = [x for x in summary["differences"] if x["protocol"] == protocol]
    first = next(iter(results.values()))["per_class"]
    return _frame(
        {
            "class": one["name"],
            "masks": "seen" if one["seen"] else "unseen",
            "objects": f"{one['num_gt']:,}",
            **{
                model: _cell(x["per_class"][k]["AP"], x["per_class"][k]["interval"])
                for model, x in results.items()
            },
            **{
                f"{x['model']} − {x['baseline']}": format_difference(x["per_class"][k])
                for x in pairs
            },
        }
        for k, one in enumerate(first)
    )


def csv_tables(analysis: Analysis) -> dict[str, pd.DataFrame]:
    """The numbers of an analysis in long form, {file name: rows}."""
    summary = analysis.summary
    results = [
        ({"model": model, "protocol": protocol}, x)
        for protocol, of_model in results_by_protocol(summary).items()
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
        {**key, "class": one["name"], "category_id": one["category_id"], "seen": one["seen"]}
        | {"num_gt": one["num_gt"], "AP": one["AP"], **_ends(one["interval"])}
        | {"AP50": one["AP50"], "AP75": one["AP75"]}
        for key, x in results
        for one in x["per_class"]
    )
    false_positives = (
        {**key, **{name: x["false_positives"][name] for name in _FALSE_POSITIVE_COUNTS}}
        for key, x in results
    )
    bins = [({**key, "method": None}, x["overlap_bins"]) for key, x in results]
    for model, x in summary["models"].items():
        for method, quality in x.get("pseudo_masks", {}).get("methods", {}).items():
            key = {"model": model, "protocol": "pseudo_masks", "method": method}
            bins.append((key, quality["overlap_bins"]))
    return {
        "models.csv": _frame(models),
        "differences.csv": _frame(_difference_rows(summary), _DIFFERENCE_COLUMNS),
        "overlap_bins.csv": _frame({**key, **_bin_row(one)} for key, x in bins for one in x),
        "per_class.csv": _frame(classes),
        "false_positives.csv": _frame(false_positives),
        "objects.csv": _frame(_object_rows(analysis)),
    }


def _frame(rows: Iterable[Mapping], columns: Sequence[str] | None = None) -> pd.DataFrame:
    import pandas as pd

    rows = list(rows)
    columns = list(rows[0]) if rows else columns
    values = [[str(v).lower() if isinstance(v, bool) else v for v in x.values()] for x in rows]
    # object: whole numbers stay whole where others are undefined.
    return pd.DataFrame(values, columns=columns, dtype=object)


def _cell(value: float | None, interval: Sequence[float] | None, digits: int = 1) -> str:
    return f"{format_number(value, digits)} {format_interval(interval, digits)}".rstrip()


def _ends(interval: Sequence[float] | None, prefix: str = "") -> dict:
    return dict(zip((f"{prefix}low", f"{prefix}high"), interval or (None, None)))


def _difference_rows(summary: Mapping) -> Iterator[dict]:
    def numbers(entry: Mapping) -> dict:
        ends = {"difference": entry["difference"], **_ends(entry["interval"])}
        return {**ends, "includes_zero": entry["includes_zero"]}

    for pair in summary["differences"]:
        key = {name: pair[name] for name in ("baseline", "model", "protocol")}
        for task, metrics in pair["tasks"].items():
            for metric, entry in metrics.items():
                yield {**key, "task": task, "class": None, "metric": metric, **numbers(entry)}
        for entry in pair["per_class"]:
            class_key = {"task": None, "class": entry["name"], "metric": "AP"}
            yield {**key, **class_key, **numbers(entry)}


def _bin_row(one: Mapping) -> dict:
    row = {name: one.get(name) for name in ("low", "high", "num_gt", "few")}
    for metric in ("AP", "AP50"):
        row |= {metric: one.get(metric), **_ends(one.get(f"{metric}_interval"), f"{metric}_")}
    return row | {name: one.get(name) for name in ("num_masks", "mask_iou", "boundary_iou")}


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
