"""
The figures of the report, by plotly.

Names from the input are escaped here: plotly reads a part of HTML in its texts.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .objects import PIXEL_COLORS
from .tables import (
    bin_label,
    pseudo_mask_results,
    results_by_protocol,
    task_labels,
    uncertainty_note,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["GT_BOX_METRICS", "make_figures", "model_color"]

# Okabe and Ito's colours, as far as they have contrast on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#8c6d00")
# Colour is never the only sign of a model.
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# Of an overlap bin: title of the axis, digits.
GT_BOX_METRICS = {
    "AP": ("AP on ground-truth boxes", 1),
    "mask_iou": ("mean mask IoU on ground-truth boxes", 3),
    "boundary_iou": ("mean boundary IoU on ground-truth boxes", 3),
}
_TEXT, _MUTED, _GRID = "#1b1f24", "#5f6b7a", "#e3e7ec"


def model_color(index: int) -> str:
    """Colour of the model at a position of the command line, "#rrggbb"."""
    return _COLORS[index % len(_COLORS)]


def make_figures(summary: Mapping) -> dict[str, go.Figure]:
    """
    All figures of a report by the name of their place in the page.

    "results-PROTOCOL" has AP with intervals; "overlap-detections", "overlap-METRIC" (on
    ground-truth boxes) and "pseudo-masks" are curves over the overlap, Fig. 2 of the paper;
    "false-positives" is Fig. 3; "classes-N" is the N-th of the differences. Figures without data
    are left out.

    Args:
        summary: of an :class:`Analysis`.
    """
    index_of = {name: i for i, name in enumerate(summary["models"])}
    results = results_by_protocol(summary)
    figures = {}
    for protocol, of_model in results.items():
        figures[f"results-{protocol}"] = _intervals(of_model, task_labels(summary), index_of)
    if "detections" in results:
        figures["overlap-detections"] = _curves(results["detections"], "AP", "AP", index_of)
    for metric, (title, _) in GT_BOX_METRICS.items():
        if "gt_boxes" in results:
            figures[f"overlap-{metric}"] = _curves(results["gt_boxes"], metric, title, index_of)
    if results:
        figures["false-positives"] = _false_positive_shares(results)
    quality = pseudo_mask_results(summary)
    if quality:
        numbers = {name: i for i, name in enumerate(quality)}
        figures["pseudo-masks"] = _curves(quality, "mask_iou", "mean IoU", numbers)
    for i, difference in enumerate(summary["differences"]):
        figures[f"classes-{i}"] = _class_differences(difference)
    return {name: figure for name, figure in figures.items() if _has_data(figure)}


def _intervals(results: Mapping, labels: Mapping[str, str], index_of: Mapping) -> go.Figure:
    """AP with its interval, one row per task and one marker per model."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for position, (model, x) in enumerate(results.items()):
        values = [x[task]["AP"] for task in labels]
        figure.add_scatter(
            x=values,
            y=[i + _dodge(position, len(results)) for i in range(len(labels))],
            error_x=_error_bars(values, [x["intervals"][task]["AP"] for task in labels]),
            **_style(index_of[model], model, mode="markers"),
        )
    _finish(figure, "AP", "", 110 + len(labels) * max(40, 20 * len(results)))
    figure.update_xaxes(rangemode="tozero")
    ticks = [html.escape(x).replace(", ", ",<br>") for x in labels.values()]
    _name_rows(figure, ticks, reverse=True)
    return figure


def _curves(results: Mapping, metric: str, title: str, index_of: Mapping) -> go.Figure:
    """A metric over the overlap of the objects; bins with few objects have hollow markers."""
    import plotly.graph_objects as go

    figure = go.Figure()
    bins: Sequence[Mapping] = []
    for position, (model, x) in enumerate(results.items()):
        bins = x["overlap_bins"]
        values = [one.get(metric) for one in bins]
        style = _style(index_of[model], model)
        symbol = style["marker"]["symbol"]
        style["marker"]["symbol"] = [f"{symbol}-open" if x.get("few") else symbol for x in bins]
        figure.add_scatter(
            x=[i + 0.5 * _dodge(position, len(results)) for i in range(len(bins))],
            y=values,
            error_y=_error_bars(values, [one.get(f"{metric}_interval") for one in bins]),
            customdata=[f"{html.escape(bin_label(x))}, {x['num_gt']:,} objects" for x in bins],
            hovertemplate="%{y:.3~f}<br>%{customdata}",
            **style,
        )
    _finish(figure, "overlap O: upper edge of the bin", title, 420)
    ticks = [f"{one['high']:.2g}" for one in bins]
    figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _false_positive_shares(results: Mapping[str, Mapping]) -> go.Figure:
    """Where the false-positive pixels lie, as shares of their sum, one bar per result."""
    import plotly.graph_objects as go

    rows = [
        (model, protocol, x["false_positives"])
        for protocol, of_model in results.items()
        for model, x in of_model.items()
    ]
    figure = go.Figure()
    for kind in ("background", "seen", "unseen"):
        figure.add_bar(
            x=[100 * x[kind] / x["total"] if x["total"] else None for _, _, x in rows],
            y=list(range(len(rows))),
            orientation="h",
            name="on the background" if kind == "background" else f"on {kind} objects",
            marker={"color": PIXEL_COLORS[kind]},
            customdata=[f"{x[kind]:,} pixels" for *_, x in rows],
            hovertemplate="%{x:.1f} %, %{customdata}",
        )
    _finish(figure, "share of the pixels, %", "", 130 + 54 * len(rows))
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    boxes = {"detections": "detected", "gt_boxes": "given boxes"}
    _name_rows(figure, [f"{_label(m)}<br>{boxes[protocol]}" for m, protocol, _ in rows], True)
    return figure


def _class_differences(difference: Mapping) -> go.Figure:
    """AP of a model minus AP of its baseline for each class, sorted, with intervals."""
    import plotly.graph_objects as go

    rows = [x for x in difference["per_class"] if x["difference"] is not None]
    rows.sort(key=lambda x: x["difference"])
    figure = go.Figure()
    for is_uncertain, name, color in (
        (False, "interval without 0", model_color(0)),
        (True, "interval contains 0, or too few images", _MUTED),
    ):
        chosen = [i for i, x in enumerate(rows) if bool(uncertainty_note(x)) == is_uncertain]
        values = [rows[i]["difference"] for i in chosen]
        figure.add_bar(
            x=values,
            y=chosen,
            width=0.7,
            orientation="h",
            name=name,
            error_x=_error_bars(values, [rows[i]["interval"] for i in chosen]),
            marker={"color": color},
            customdata=[f"{rows[i]['num_gt']:,} objects" for i in chosen],
            hovertemplate="%{x:+.1f} AP, %{customdata}",
        )
    _finish(figure, "difference in AP", "", 110 + 19 * len(rows))
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(zeroline=True, zerolinecolor=_TEXT)
    _name_rows(figure, [_label(x["name"]) + ("" if x["seen"] else " (unseen)") for x in rows])
    figure.update_yaxes(tickfont={"size": 11})
    return figure


def _style(index: int, name: str, mode: str = "lines+markers") -> dict:
    """Name, marker and line of a trace of the model at a position of the command line."""
    color = model_color(index)
    return {
        "name": _label(name),
        "mode": mode,
        "marker": {"color": color, "symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 9},
        "line": {"color": color, "width": 2, "dash": _DASHES[index % len(_DASHES)]},
    }


def _dodge(position: int, count: int) -> float:
    """An offset in (-0.3, 0.3) that sets the markers of several models apart."""
    return 0.6 * ((position + 0.5) / count - 0.5)


def _error_bars(values: Sequence, intervals: Sequence) -> dict:
    """Intervals as plotly wants them: distances from the values."""
    ends = [x or (v, v) for v, x in zip(values, intervals)]
    # A percentile interval can lie beside its value.
    above = [0 if v is None else max(0, high - v) for v, (_, high) in zip(values, ends)]
    below = [0 if v is None else max(0, v - low) for v, (low, _) in zip(values, ends)]
    bars = {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1.2, "width": 3}
    return {**bars, "visible": any(intervals)}


def _finish(figure: go.Figure, x_title: str, y_title: str, height: int) -> None:
    """Set the layout that all figures share."""
    axis = {"gridcolor": _GRID, "linecolor": _MUTED, "zeroline": False, "automargin": True}
    figure.update_layout(
        template="none",
        height=height,
        font={"family": "system-ui, sans-serif", "size": 13, "color": _TEXT},
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        legend={"orientation": "h", "x": 0, "y": 1 + 8 / height, "yanchor": "bottom"},
        hoverlabel={"namelength": -1},
        showlegend=True,
        # A drag must scroll the page on a phone; the buttons of the figure still zoom.
        dragmode=False,
        xaxis=axis | {"title": {"text": x_title, "standoff": 10}},
        yaxis=axis | {"title": {"text": y_title, "standoff": 10}},
    )


def _name_rows(figure: go.Figure, labels: Sequence[str], reverse: bool = False) -> None:
    """Write labels beside the rows 0, 1, ...; in reverse, the first row is the upper one."""
    limits = [-0.5, len(labels) - 0.5]
    figure.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=list(labels),
        range=limits[::-1] if reverse else limits,
        showgrid=False,
    )


def _label(text: str, limit: int = 30) -> str:
    """A name from the input as a short text of a figure."""
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…", quote=False)


def _has_data(figure: go.Figure) -> bool:
    points = (point for trace in figure.data for point in zip(trace.x or (), trace.y or ()))
    return any(None not in point for point in points)
