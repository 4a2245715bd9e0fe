"""The figures of the report. Names are escaped: plotly reads a part of HTML in its texts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .objects import PIXEL_COLORS

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "OVERLAP_FIGURES",
    "PROTOCOL_LABELS",
    "make_figures",
    "model_color",
    "pseudo_mask_results",
    "results_by_protocol",
    "uncertainty_note",
]

PROTOCOL_LABELS = {"detections": "detected boxes", "gt_boxes": "ground-truth boxes"}
# Name, protocol, metric, title, digits in tables.
OVERLAP_FIGURES = (
    ("overlap-detections", "detections", "AP", "AP on detected boxes", 1),
    ("overlap-AP", "gt_boxes", "AP", "AP on ground-truth boxes", 1),
    ("overlap-mask_iou", "gt_boxes", "mask_iou", "mask IoU on ground-truth boxes", 3),
    ("overlap-boundary_iou", "gt_boxes", "boundary_iou", "boundary IoU on ground-truth boxes", 3),
)
# Okabe and Ito's colours, as far as they have contrast on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#8c6d00")


def model_color(index: int) -> str:
    """Colour of the model at a position of the command line, "#rrggbb"."""
    return _COLORS[index % len(_COLORS)]


def results_by_protocol(summary: Mapping) -> dict[str, dict[str, Mapping]]:
    """{protocol: {model or yardstick: its numbers}}, detections first; no empty protocols."""
    models = summary["models"].items()
    results = {
        "detections": {name: x for name, x in models if "segm" in x},
        "gt_boxes": {name: x["gt_boxes"] for name, x in models if "gt_boxes" in x},
    }
    if results["gt_boxes"]:
        results["gt_boxes"] |= summary["yardsticks"]
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


def make_figures(summary: Mapping) -> dict[str, go.Figure]:
    """
    All figures of a report by the name of their place in the page.

    "overlap-detections", "overlap-METRIC" (on ground-truth boxes) and "pseudo-masks" are curves
    over the overlap, Fig. 2 of the paper; "false-positives" is Fig. 3; "classes-N" is the N-th of
    the differences. Figures without data are left out.

    Args:
        summary: of an :class:`Analysis`.
    """
    names = [*summary["models"], *summary["yardsticks"]]
    colors = {_label(name): model_color(i) for i, name in enumerate(names)}
    results = results_by_protocol(summary)
    figures = {"false-positives": _false_positive_shares(results)}
    for name, protocol, metric, title, _ in OVERLAP_FIGURES:
        figures[name] = _curves(results.get(protocol, {}), metric, title, colors)
    figures["pseudo-masks"] = _curves(pseudo_mask_results(summary), "mask_iou", "mean IoU", {})
    for i, difference in enumerate(summary["differences"]):
        figures[f"classes-{i}"] = _class_differences(difference)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _curves(results: Mapping, metric: str, title: str, colors: Mapping) -> go.Figure | None:
    """A metric over the overlap of the objects."""
    import plotly.express as px

    rows = [
        {"model": _label(model), "overlap": x["high"], "objects": x["num_gt"], title: x[metric]}
        | _error_bar(x[metric], x.get(f"{metric}_interval"))
        for model, of_model in results.items()
        for x in of_model["overlap_bins"]
        if x[metric] is not None
    ]
    if not rows:
        return None
    figure = px.line(
        rows,
        x="overlap",
        y=title,
        color="model",
        symbol="model",  # colour is never the only sign of a model
        markers=True,
        error_y="above",
        error_y_minus="below",
        hover_data="objects",
        color_discrete_map=colors,
        color_discrete_sequence=_COLORS,
        labels={"overlap": "overlap O: upper edge of the bin"},
    )
    figure.update_traces(marker_size=9, error_y={"thickness": 1.2, "width": 3})
    figure.update_yaxes(rangemode="tozero")
    return _finish(figure, 420)


def _false_positive_shares(results: Mapping[str, Mapping]) -> go.Figure | None:
    """Where the false-positive pixels lie, as shares of their sum, one bar per result."""
    import plotly.express as px

    rows = [
        {
            "result": f"{_label(model)}<br>{PROTOCOL_LABELS[protocol]}",
            "pixels": "on the background" if kind == "background" else f"on {kind} objects",
            "share, %": 100 * x["false_positives"][kind] / x["false_positives"]["total"],
            "number": x["false_positives"][kind],
        }
        for protocol, of_model in results.items()
        for model, x in of_model.items()
        for kind in ("background", "seen", "unseen")
        if x["false_positives"]["total"]
    ]
    if not rows:
        return None
    figure = px.bar(
        rows,
        x="share, %",
        y="result",
        color="pixels",
        orientation="h",
        hover_data="number",
        color_discrete_sequence=[PIXEL_COLORS[x] for x in ("background", "seen", "unseen")],
        labels={"result": ""},
    )
    figure.update_yaxes(autorange="reversed")
    return _finish(figure, 130 + 18 * len(rows))


def _class_differences(difference: Mapping) -> go.Figure | None:
    """AP of a model minus AP of its baseline for each class, sorted, with intervals."""
    import plotly.express as px

    classes = [x for x in difference["per_class"] if x["difference"] is not None]
    if not classes:
        return None
    rows = [
        {
            "class": _label(x["name"]) + ("" if x["seen"] else " (unseen)"),
            "difference in AP": x["difference"],
            "objects": x["num_gt"],
            "interval": "contains 0, or too few images" if uncertainty_note(x) else "without 0",
            **_error_bar(x["difference"], x["interval"]),
        }
        for x in sorted(classes, key=lambda x: x["difference"])
    ]
    figure = px.bar(
        rows,
        x="difference in AP",
        y="class",
        color="interval",
        orientation="h",
        error_x="above",
        error_x_minus="below",
        hover_data="objects",
        color_discrete_map={"without 0": _COLORS[0], "contains 0, or too few images": "#5f6b7a"},
        category_orders={"class": [x["class"] for x in reversed(rows)]},
        labels={"class": ""},
    )
    figure.update_traces(error_x={"thickness": 1.2, "width": 3})
    figure.update_yaxes(dtick=1, tickfont_size=11)
    return _finish(figure, 110 + 19 * len(rows))


def _error_bar(value: float, interval: Sequence[float] | None) -> dict:
    low, high = interval or (value, value)
    # Distances; a percentile interval can lie beside its value.
    return {"above": max(0, high - value), "below": max(0, value - low)}


def _finish(figure: go.Figure, height: int) -> go.Figure:
    """Set the layout that all figures share."""
    return figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        legend={"orientation": "h", "x": 0, "y": 1 + 8 / height, "yanchor": "bottom", "title": ""},
        modebar={"orientation": "v"},  # not over the legend, on a phone
        # A drag must scroll the page on a phone; the buttons of the figure still zoom.
        dragmode=False,
    )


def _label(text: str, limit: int = 30) -> str:
    """A name from the input as a short text of a figure."""
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…", quote=False)
