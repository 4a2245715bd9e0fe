"""The tables of the report, as data: what the page and the CSV files show of an analysis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..evaluation.results_table import METRICS

__all__ = [
    "PROTOCOL_LABELS",
    "Cell",
    "Column",
    "ResultSet",
    "Table",
    "bin_label",
    "bins_table",
    "class_differences_table",
    "differences_table",
    "doubt_about",
    "false_positives_table",
    "format_interval",
    "format_number",
    "headline_table",
    "per_class_table",
    "pseudo_masks_table",
    "result_sets",
    "task_labels",
]

PROTOCOL_LABELS = {"detections": "detected boxes", "gt_boxes": "ground-truth boxes"}
_NO_VALUE = "-"


@dataclass(frozen=True)
class ResultSet:
    """What one model reached under one protocol."""

    model: str
    index: int  # of the model, in the order of the command line
    protocol: str  # "detections" or "gt_boxes"
    data: Mapping  # the model's entry of the summary, or "gt_boxes" in it

    @property
    def protocol_label(self) -> str:
        return PROTOCOL_LABELS.get(self.protocol, self.protocol)

    def interval(self, task: str, metric: str) -> list[float] | None:
        """The bootstrap interval of a metric, None where there is none."""
        interval = self.data.get("intervals", {}).get(task, {}).get(metric)
        return None if interval is None or None in interval else list(interval)


@dataclass(frozen=True)
class Column:
    """A column of a table of the page."""

    label: str
    is_number: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller second line, a remark in words, and the number to sort by."""

    text: str
    detail: str = ""
    note: str = ""
    value: float | None = None
    style: str = ""  # a class of report.css


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of a row is its heading."""

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]] = field(default_factory=list)


def result_sets(summary: Mapping) -> list[ResultSet]:
    """
    All results of a summary, detections first, in the order of the models.

    A model has results on detections where the summary has a task of it, and results on
    ground-truth boxes where it has "gt_boxes".
    """
    models = list(summary["models"].items())
    on_detections = [
        ResultSet(name, i, "detections", x) for i, (name, x) in enumerate(models) if "segm" in x
    ]
    on_gt_boxes = [
        ResultSet(name, i, "gt_boxes", x["gt_boxes"])
        for i, (name, x) in enumerate(models)
        if "gt_boxes" in x
    ]
    return on_detections + on_gt_boxes


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
    A number with a fixed count of digits; "-" where it is undefined.

    Args:
        value: None or nan is undefined.
        digits: after the point.
        sign: whether to write the plus of a positive number.
    """
    if value is None or math.isnan(value):
        return _NO_VALUE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    # "-0.0" would claim a direction.
    return text if any(c in "123456789" for c in text) else text.lstrip("+-")


def format_interval(interval: Sequence[float | None] | None, digits: int = 1) -> str:
    """ "[low, high]"; "" where there is none."""
    if interval is None or None in interval:
        return ""
    return f"[{format_number(interval[0], digits)}, {format_number(interval[1], digits)}]"


def doubt_about(difference: Mapping) -> str:
    """Why a difference is not established, in two or three words; "" where it is."""
    interval = difference["interval"]
    if interval is None or None in interval:
        return "no interval"
    if difference["includes_zero"]:
        return "contains 0"
    # All objects are in one image, which every resample repeats.
    return "too few images" if interval[0] == interval[1] else ""


def bin_label(one_bin: Mapping) -> str:
    """The overlaps of a bin in words: "O = 0", "0.1 < O ≤ 0.2"."""
    low, high = one_bin["low"], one_bin["high"]
    return f"O = {high:g}" if low == high else f"{low:g} < O ≤ {high:g}"


def headline_table(sets: Sequence[ResultSet], tasks: Mapping[str, str], table_id: str) -> Table:
    """One row per task and model, one column per metric, of the results of one protocol."""
    rows = []
    for task, label in tasks.items():
        for i, x in enumerate(x for x in sets if task in x.data):
            values = x.data[task]
            cells = [_number(values.get(m), interval=x.interval(task, m)) for m in METRICS]
            heading = Cell(label, style="" if i else "group")
            rows.append([heading, Cell(x.model), *cells, _count(values.get("num_gt"))])
    columns = [Column("objects", False), Column("model", False), *map(Column, METRICS)]
    protocol = sets[0].protocol_label if sets else ""
    caption = f"AP in percent, {protocol}"
    return Table(table_id, caption, [*columns, Column("num_gt")], rows)


def differences_table(difference: Mapping, tasks: Mapping[str, str], table_id: str) -> Table:
    """Model minus baseline, one row per task, one column per metric."""
    rows = []
    for task, label in tasks.items():
        by_metric = difference["tasks"].get(task)
        if by_metric is not None:
            rows.append([Cell(label), *(_difference(by_metric.get(m)) for m in METRICS)])
    protocol = PROTOCOL_LABELS[difference["protocol"]]
    caption = f"{difference['model']} minus {difference['baseline']}, {protocol}"
    return Table(table_id, caption, [Column("objects", False), *map(Column, METRICS)], rows)


def bins_table(
    sets: Sequence[ResultSet], metric: str, caption: str, table_id: str, digits: int = 1
) -> Table:
    """A metric of each model in each overlap bin, and how many objects the bin has."""
    sets = [x for x in sets if x.data.get("overlap_bins")]
    rows = []
    for i, first in enumerate(sets[0].data["overlap_bins"] if sets else []):
        note = "few objects" if first.get("few") else ""
        cells = [Cell(bin_label(first), value=first["high"]), _count(first["num_gt"], note)]
        for x in sets:
            one = x.data["overlap_bins"][i]
            cells.append(_number(one.get(metric), digits, one.get(f"{metric}_interval")))
        rows.append(cells)
    columns = [Column("overlap"), Column("num_gt"), *(Column(x.model) for x in sets)]
    return Table(table_id, caption, columns, rows)


def false_positives_table(sets: Sequence[ResultSet], table_id: str) -> Table:
    """Where the false-positive pixels lie, one row per model and protocol."""
    kinds = ("background", "seen", "unseen")
    rows = []
    for x in sets:
        counts = x.data["false_positives"]
        total = counts["total"]
        cells = [Cell(x.model), Cell(x.protocol_label)]
        for kind in kinds:
            share = 100 * counts[kind] / total if total else None
            text = _NO_VALUE if share is None else f"{share:.1f} %"
            cells.append(Cell(text, f"{counts[kind]:,} px", value=share))
        rows.append([*cells, _count(total), _count(counts.get("num_objects"))])
    columns = [Column("model", False), Column("boxes", False)]
    columns += [Column("background"), Column("seen objects"), Column("unseen objects")]
    columns += [Column("pixels"), Column("masks")]
    return Table(table_id, "False-positive pixels by what lies under them", columns, rows)


def pseudo_masks_table(summary: Mapping, table_id: str) -> Table:
    """Mean IoU of each method's pseudo masks in each overlap bin."""
    several = sum("pseudo_masks" in x for x in summary["models"].values()) > 1
    sets = []
    for model, data in summary["models"].items():
        for method, quality in data.get("pseudo_masks", {}).get("methods", {}).items():
            name = f"{model}: {method}" if several else method
            sets.append(ResultSet(name, len(sets), "pseudo_masks", quality))
    table = bins_table(sets, "mask_iou", "Mean IoU of pseudo masks, unseen objects", table_id, 3)
    if not sets:
        return table
    counts = [one["num_gt"] for one in sets[0].data["overlap_bins"]]
    all_bins = [Cell("all", value=-1.0), _count(sum(counts))]
    all_bins += [_number(x.data.get("mask_iou"), 3) for x in sets]
    return Table(table_id, table.caption, table.columns, [all_bins, *table.rows])


def per_class_table(sets: Sequence[ResultSet], table_id: str) -> Table:
    """AP of each model on each class, of the results of one protocol."""
    sets = [x for x in sets if x.data.get("per_class")]
    by_class = [{x["category_id"]: x for x in results.data["per_class"]} for results in sets]
    rows = []
    for category_id, first in (by_class[0] if by_class else {}).items():
        cells = [Cell(first["name"]), Cell("seen" if first["seen"] else "unseen")]
        cells.append(_count(first["num_gt"]))
        for rows_of_model in by_class:
            one = rows_of_model.get(category_id, {})
            cells.append(_number(one.get("AP"), interval=one.get("interval")))
        rows.append(cells)
    columns = [Column("class", False), Column("kind", False), Column("num_gt")]
    columns += [Column(x.model) for x in sets]
    protocol = f", {sets[0].protocol_label}" if sets else ""
    return Table(table_id, f"AP in percent of each class{protocol}", columns, rows)


def class_differences_table(difference: Mapping, table_id: str) -> Table:
    """Model minus baseline on each class, largest difference first."""
    rows = sorted(
        difference["per_class"],
        key=lambda x: -math.inf if x["difference"] is None else x["difference"],
        reverse=True,
    )
    cells = [
        [
            Cell(x["name"]),
            Cell("seen" if x["seen"] else "unseen"),
            _count(x["num_gt"]),
            _difference(x),
        ]
        for x in rows
    ]
    protocol = PROTOCOL_LABELS[difference["protocol"]]
    caption = f"AP of each class, {difference['model']} minus {difference['baseline']}, {protocol}"
    columns = [Column("class", False), Column("kind", False)]
    columns += [Column("num_gt"), Column("difference")]
    return Table(table_id, caption, columns, cells)


def _number(value, digits: int = 1, interval: Iterable | None = None) -> Cell:
    text = format_number(value, digits)
    is_defined = value is not None and not math.isnan(value)
    return Cell(text, format_interval(interval, digits), value=value if is_defined else None)


def _count(value: int | None, note: str = "") -> Cell:
    return Cell(_NO_VALUE if value is None else f"{value:,}", note=note, value=value)


def _difference(entry: Mapping | None) -> Cell:
    if entry is None or entry["difference"] is None:
        return Cell(_NO_VALUE)
    doubt = doubt_about(entry)
    text = format_number(entry["difference"], 1, sign=True)
    interval = format_interval(entry["interval"])
    return Cell(text, interval, doubt, entry["difference"], "" if doubt else "strong")
