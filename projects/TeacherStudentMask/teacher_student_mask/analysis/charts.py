"""
The figures of the report, as plotly figures in the light theme.

Everything that comes from the input is escaped here: plotly reads a part of HTML in its texts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .chart_style import (
    FALSE_POSITIVE_COLOURS,
    MUTED,
    SURFACE,
    TEXT,
    dodge,
    error_bars,
    escape,
    finish,
    label,
    model_colour,
    trace_style,
)
from .report_tables import (
    ResultSet,
    bin_label,
    doubt_about,
    format_interval,
    format_number,
    result_sets,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "attribution_bars",
    "headline_intervals",
    "overlap_curve",
    "per_class_differences",
    "pseudo_mask_curve",
]

_KIND_LABELS = {
    "background": "on the background",
    "seen": "on seen objects",
    "unseen": "on unseen objects",
}
_KIND_PATTERNS = {"background": "", "seen": "/", "unseen": "."}
_PATTERN_COLOUR = "#222222"


def headline_intervals(summary: Mapping, protocol: str, tasks: Mapping[str, str]) -> go.Figure:
    """
    AP with its interval, one row per task and one marker per model.

    Args:
        summary: of an analysis.
        protocol: "detections" or "gt_boxes".
        tasks: {task: label} of the rows, from top to bottom.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    sets = [x for x in result_sets(summary) if x.protocol == protocol]
    for position, results in enumerate(sets):
        known = [(i, x) for i, x in enumerate(tasks) if _metric(results, x, "AP") is not None]
        values = [_metric(results, task, "AP") for _, task in known]
        intervals = [results.interval(task, "AP") for _, task in known]
        figure.add_scatter(
            x=values,
            y=[i + dodge(position, len(sets)) for i, _ in known],
            error_x=error_bars(values, intervals),
            hovertext=[
                f"<b>{escape(results.model)}</b><br>{tasks[task]}<br>"
                f"AP {format_number(value)} {format_interval(interval)}"
                for (_, task), value, interval in zip(known, values, intervals)
            ],
            **trace_style(results.index, results.model, lines=False),
        )
    finish(figure, "AP", "", 110 + len(tasks) * max(40, 20 * len(sets)))
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(
        tickvals=list(range(len(tasks))),
        ticktext=[escape(x).replace(", ", ",<br>") for x in tasks.values()],
        range=[len(tasks) - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def overlap_curve(
    sets: Sequence[ResultSet], metric: str = "AP", title: str = "AP", digits: int = 1
) -> go.Figure:
    """
    A metric over the overlap of the objects: Fig. 2 of the paper.

    Bins with few objects have hollow markers.

    Args:
        sets: results of one protocol; those without overlap bins are left out.
        metric: a key of the bins; "<metric>_interval" is drawn where the bins have it.
        title: of the vertical axis.
        digits: after the point, in the hover texts.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    sets = [x for x in sets if x.data.get("overlap_bins")]
    labels: list[str] = []
    for position, results in enumerate(sets):
        bins = results.data["overlap_bins"]
        labels = [format_number(x["high"], 2).rstrip("0").rstrip(".") or "0" for x in bins]
        values = [x.get(metric) for x in bins]
        style = trace_style(results.index, results.model)
        symbol = style["marker"]["symbol"]
        style["marker"]["symbol"] = [f"{symbol}-open" if x.get("few") else symbol for x in bins]
        figure.add_scatter(
            x=[i + 0.5 * dodge(position, len(sets)) for i in range(len(bins))],
            y=values,
            error_y=error_bars(values, [x.get(f"{metric}_interval") for x in bins]),
            hovertext=[_bin_hover(results.model, x, metric, digits) for x in bins],
            **style,
        )
    finish(figure, "overlap O: upper edge of the bin", title, 440)
    figure.update_xaxes(
        tickvals=list(range(len(labels))), ticktext=labels, tickfont={"size": 11}, showgrid=False
    )
    figure.update_yaxes(rangemode="tozero")
    return figure


def pseudo_mask_curve(summary: Mapping) -> go.Figure | None:
    """
    IoU of the pseudo masks of unseen objects with the truth, over the overlap of the objects.

    Returns:
        One line per model and method; None if no model has pseudo masks.
    """
    sets = []
    several = sum("pseudo_masks" in x for x in summary["models"].values()) > 1
    for model, data in summary["models"].items():
        for method, quality in data.get("pseudo_masks", {}).get("methods", {}).items():
            name = f"{model}: {method}" if several else method
            sets.append(ResultSet(name, len(sets), "pseudo_masks", quality))
    if not sets:
        return None
    return overlap_curve(sets, "mask_iou", "mean IoU of the pseudo masks", digits=3)


def attribution_bars(sets: Sequence[ResultSet]) -> go.Figure:
    """
    Where the false-positive pixels lie, as shares of their sum: Fig. 3 of the paper.

    Args:
        sets: the results to show, one bar each; they have "false_positives".
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    several = len({x.protocol for x in sets}) > 1
    labels = [
        label(x.model) + (f"<br>{x.protocol_label}" if several else "") for x in sets
    ]  # _label escapes; the line break is ours
    for kind, colour in FALSE_POSITIVE_COLOURS.items():
        pixels = [x.data["false_positives"][kind] for x in sets]
        totals = [x.data["false_positives"]["total"] for x in sets]
        shares = [100 * p / total if total else 0.0 for p, total in zip(pixels, totals)]
        figure.add_bar(
            x=shares,
            y=list(range(len(sets))),
            orientation="h",
            name=_KIND_LABELS[kind],
            marker={
                "color": colour,
                "line": {"color": TEXT, "width": 1},
                "pattern": {
                    "shape": _KIND_PATTERNS[kind],
                    "bgcolor": colour,
                    "fgcolor": _PATTERN_COLOUR,
                    "fgopacity": 0.45,
                    "size": 7,
                    "solidity": 0.2,
                },
            },
            hovertext=[
                f"<b>{escape(x.model)}</b>, {x.protocol_label}<br>{_KIND_LABELS[kind]}: "
                f"{share:.1f} %<br>{p:,} of {total:,} pixels"
                for x, share, p, total in zip(sets, shares, pixels, totals)
            ],
            hoverinfo="text",
        )
    finish(figure, "share of the false-positive pixels, %", "", 130 + 54 * len(sets))
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_xaxes(range=[0, 100.5])
    figure.update_yaxes(
        tickvals=list(range(len(sets))),
        ticktext=labels,
        range=[len(sets) - 0.5, -0.5],
        showgrid=False,
    )
    return figure


def per_class_differences(difference: Mapping) -> go.Figure:
    """
    AP of a model minus AP of its baseline for each class, sorted, with intervals.

    Args:
        difference: one entry of the summary's "differences" that has "per_class". Classes without
            a difference are left out.
    """
    import plotly.graph_objects as go

    rows = [x for x in difference["per_class"] if x["difference"] is not None]
    rows.sort(key=lambda x: x["difference"])
    figure = go.Figure()
    for is_doubtful, name, colour in (
        (False, "interval without 0", model_colour(0)),
        (True, "interval contains 0, or too few images", MUTED),
    ):
        part = [(i, x) for i, x in enumerate(rows) if bool(doubt_about(x)) == is_doubtful]
        values = [x["difference"] for _, x in part]
        figure.add_bar(
            x=values,
            y=[i for i, _ in part],
            width=0.7,
            orientation="h",
            name=name,
            error_x=error_bars(values, [x["interval"] for _, x in part], TEXT),
            marker={
                "color": colour,
                "pattern": {
                    "shape": "/" if is_doubtful else "",
                    "bgcolor": SURFACE,
                    "fgcolor": colour,
                    "size": 6,
                    "solidity": 0.25,
                },
                "line": {"color": colour, "width": 1},
            },
            hovertext=[_class_hover(x) for _, x in part],
            hoverinfo="text",
        )
    finish(figure, "difference in AP", "", 110 + 19 * len(rows))
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(zeroline=True, zerolinecolor=TEXT, zerolinewidth=1)
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[label(x["name"]) + ("" if x["seen"] else " (unseen)") for x in rows],
        range=[-0.7, len(rows) - 0.3],
        showgrid=False,
        tickfont={"size": 11},
    )
    return figure


def _metric(results: ResultSet, task: str, metric: str):
    return results.data.get(task, {}).get(metric)


def _bin_hover(model: str, one_bin: Mapping, metric: str, digits: int) -> str:
    lines = [f"<b>{escape(model)}</b>", f"overlap {html.escape(bin_label(one_bin), quote=False)}"]
    for key, name in (("AP", "AP"), ("AP50", "AP50"), ("mask_iou", "mask IoU")):
        if key in one_bin and (key == metric or metric in ("AP", "AP50")):
            interval = format_interval(one_bin.get(f"{key}_interval"))
            number = format_number(one_bin[key], digits if key == metric else 1)
            lines.append(f"{name} {number} {interval}".rstrip())
    if metric == "boundary_iou":
        lines.append(f"boundary IoU {format_number(one_bin[metric], digits)}")
    few = " (few)" if one_bin.get("few") else ""
    return "<br>".join([*lines, f"{one_bin['num_gt']:,} objects{few}"])


def _class_hover(row: Mapping) -> str:
    kind = "seen" if row["seen"] else "unseen"
    return (
        f"<b>{escape(row['name'])}</b> ({kind})<br>{format_number(row['difference'], 1, True)} "
        f"{format_interval(row['interval'])} {doubt_about(row)}<br>{row['num_gt']:,} objects"
    )
