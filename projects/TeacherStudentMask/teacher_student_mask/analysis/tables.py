"""The tables of the report, as pandas DataFrames of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..evaluation import METRICS

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "PROTOCOL_LABELS",
    "bins_table",
    "class_table",
    "differences_table",
    "false_positives_table",
    "pseudo_mask_results",
    "results_by_protocol",
    "results_table",
    "uncertainty_note",
]

PROTOCOL_LABELS = {"detections": "detected boxes", "gt_boxes": "ground-truth boxes"}


def results_by_protocol(summary: Mapping) -> dict[str, dict[str, Mapping]]:
    """{protocol: {model: its numbers}}, detections first; without empty protocols."""
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


def uncertainty_note(difference: Mapping) -> str:
    """Why a difference is not established, in two or three words; "" where it is."""
    if difference["interval"] is None:
        return "no interval"
    if difference["includes_zero"]:
        return "contains 0"
    # All objects are in one image, which every resample repeats.
    return "too few images" if difference["interval"][0] == difference["interval"][1] else ""


def results_table(summary: Mapping, protocol: str) -> pd.DataFrame:
    """AP with intervals, one row per task and model, one column per metric."""
    return _frame(
        {
            "objects": label,
            "model": model,
            **{m: _cell(x[task][m], x["intervals"][task][m]) for m in METRICS},
            "num_gt": f"{x[task]['num_gt']:,}",
        }
        for task, label in _task_labels(summary).items()
        for model, x in results_by_protocol(summary)[protocol].items()
    )


def differences_table(summary: Mapping, difference: Mapping) -> pd.DataFrame:
    """Model minus baseline, one row per task, one column per metric."""
    return _frame(
        {"objects": label} | {m: _difference(difference["tasks"][task][m]) for m in METRICS}
        for task, label in _task_labels(summary).items()
    )


def bins_table(results: Mapping[str, Mapping], metric: str, digits: int = 1) -> pd.DataFrame:
    """A metric of each model in each overlap bin, and how many objects the bin has."""
    rows = zip(*(x["overlap_bins"] for x in results.values()))
    return _frame(
        {
            "overlap": f"{row[0]['low']:g} < O ≤ {row[0]['high']:g}" if row[0]["high"] else "O = 0",
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
            **{name: _difference(x[k]) for name, x in pairs.items()},
        }
        for k, one in enumerate(next(iter(columns.values())))
    )


def _task_labels(summary: Mapping) -> dict[str, str]:
    threshold = summary["settings"]["overlap_threshold"]
    return {
        "segm_unseen": "unseen classes",
        "segm_unseen_overlap": f"unseen, overlap ≥ {threshold:g}",
        "segm_seen": "seen classes",
        "segm": "all classes",
    }


def _frame(rows: Iterable[Mapping]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(rows))


def _cell(
    value: float | None, interval: Sequence[float] | None, digits: int = 1, sign: str = ""
) -> str:
    """ "1.2 [0.3, 2.1]"; "-" where the value is undefined."""
    if value is None or math.isnan(value):
        return "-"
    # + 0.0: "-0.0" would claim a direction.
    value, *ends = (round(x, digits) + 0.0 for x in (value, *(interval or ())))
    text = f"{value:{sign}.{digits}f}"
    return f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else text


def _difference(entry: Mapping) -> str:
    note = uncertainty_note(entry)
    text = _cell(entry["difference"], entry["interval"], sign="+")
    return f"{text} ({note})" if note and text != "-" else text
