"""
The report of an analysis: one HTML file that needs no network, and its numbers as a json.

Names from the input are escaped in its figures, too: plotly reads a part of HTML in its texts.
"""

from __future__ import annotations

import html
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import require
from ..evaluation import MASK_TASKS, METRICS, compare_with_yardsticks, tasks_with_objects
from .objects import PIXEL_COLORS, draw_objects, extreme_objects, select_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .measure import Analysis

__all__ = ["headline", "make_figures", "write_report"]

_PROTOCOL_LABELS = {"detections": "detected boxes", "gt_boxes": "ground-truth boxes"}
# Name, protocol, metric, title, digits in tables.
_OVERLAP_FIGURES = (
    ("overlap-detections", "detections", "AP", "AP on detected boxes", 1),
    ("overlap-AP", "gt_boxes", "AP", "AP on ground-truth boxes", 1),
    ("overlap-mask_iou", "gt_boxes", "mask_iou", "mask IoU on ground-truth boxes", 3),
    ("overlap-boundary_iou", "gt_boxes", "boundary_iou", "boundary IoU on ground-truth boxes", 3),
)
# Okabe and Ito's colours, as far as they have contrast on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#8c6d00")
_TASK_ORDER = ("segm_unseen", "segm_unseen_overlap", "segm_seen", "segm")
# Box AP below which a sentence says that detection fails.
_FAILED_BOX_AP = 5.0


def write_report(
    analysis: Analysis,
    output_dir: str | os.PathLike,
    *,
    image_root: str | None = None,
    num_objects: int = 200,
) -> Path:
    """
    Write ``report.html`` and ``analysis.json``.

    The page holds all that it shows, scripts and pictures too, and asks nothing of a network.

    Args:
        analysis: of one or more models; not changed.
        output_dir: made if new; an earlier report is replaced.
        image_root: folder of the images; None: the report has no pictures of objects.
        num_objects: how many objects to picture at most, beside the four worst and the four best.
            200 take about 5 MB.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: pandas, jinja2 or plotly is not installed.
    """
    require("report", "jinja2", "pandas", "plotly")
    import jinja2
    import plotly.offline

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(analysis.summary, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")

    # IoU on detected and on ground-truth boxes do not compare.
    protocol = next(iter(analysis.objects.values())).protocol
    shown = [name for name, x in analysis.objects.items() if x.protocol == protocol][:2]
    tables = [analysis.objects[x] for x in shown]
    chosen = {"pictures": select_objects(tables, num_objects)}
    chosen["worst"], chosen["best"] = extreme_objects(tables, min(num_objects, 4))
    pictures: dict[str, list[dict]] = {name: [] for name in chosen}
    if image_root is not None:
        for name, rows in chosen.items():
            pictures[name] = draw_objects(analysis.coco, analysis.summary, tables, rows, image_root)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.PackageLoader(__package__),
    )
    environment.filters |= {"cell": _format_cell, "difference": _format_difference}
    page = environment.get_template("report.html.j2").render(
        _content(analysis.summary),
        plotly_js=plotly.offline.get_plotlyjs(),
        shown=shown,
        protocol_shown=protocol,
        **pictures,
        pixel_colors=PIXEL_COLORS,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def headline(summary: Mapping) -> list[str]:
    """
    Say in a sentence or two per model what its boxes and masks are worth.

    The masks are those of unseen classes or, where there are none, of all.

    Args:
        summary: of an :class:`Analysis`.
    """
    task = "segm_unseen" if summary["dataset"]["num_unseen"] else "segm"
    objects, sentences = MASK_TASKS[task], []
    for name, x in summary["models"].items():
        parts, more = [], ""
        if "bbox" in x:
            box_ap, mask_ap = x["bbox"]["AP"], x[task]["AP"]
            is_failed = box_ap is not None and box_ap < _FAILED_BOX_AP
            parts.append(f"{'detection fails: ' if is_failed else ''}box AP {_format_cell(box_ap)}")
            parts.append(f"mask AP of {objects} {_format_cell(mask_ap)}")
        if "gt_boxes" in x:
            on_boxes = x["gt_boxes"]
            parts.append(
                f"the masks on your boxes have {_format_cell(on_boxes[task]['AP'])} ({objects})"
            )
            more = " " + compare_with_yardsticks(on_boxes, summary["yardsticks"])
        sentences.append(f"{name}: {'; '.join(parts)}.{more}".rstrip())
    return sentences


def _results_by_protocol(summary: Mapping) -> dict[str, dict[str, Mapping]]:
    """{protocol: {model or yardstick: its numbers}}, detections first; no empty protocols."""
    models = summary["models"].items()
    results = {
        "detections": {name: x for name, x in models if "segm" in x},
        "gt_boxes": {name: x["gt_boxes"] for name, x in models if "gt_boxes" in x},
    }
    if results["gt_boxes"]:
        results["gt_boxes"] |= summary["yardsticks"]
    return {protocol: x for protocol, x in results.items() if x}


def _pseudo_mask_results(summary: Mapping) -> dict[str, Mapping]:
    """The quality of the pseudo masks of each method, {"MODEL: METHOD": its numbers}."""
    return {
        f"{name}: {method}": quality
        for name, x in summary["models"].items()
        for method, quality in x.get("pseudo_masks", {}).get("methods", {}).items()
    }


def _content(summary: Mapping) -> dict:
    """The variables of templates/report.html.j2, without the pictures."""
    figures = {
        name: figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{name}",
            config={"responsive": True, "displaylogo": False},
        )
        for name, figure in make_figures(summary).items()
    }
    threshold = summary["settings"]["overlap_threshold"]
    results = _results_by_protocol(summary)
    with_objects = tasks_with_objects(next(iter(next(iter(results.values())).values())))
    tasks = {**MASK_TASKS, "segm_unseen_overlap": f"unseen, overlap ≥ {threshold:g}"}
    return {
        "summary": summary,
        "colors": dict(zip(summary["models"], itertools.cycle(_COLORS))),
        "figures": figures,
        "labels": _PROTOCOL_LABELS,
        "metrics": METRICS,
        "tasks": {x: tasks[x] for x in _TASK_ORDER if x in with_objects},
        "results": results,
        "headline": headline(summary),
        "overlap": [x for x in _OVERLAP_FIGURES if x[0] in figures],
        "pseudo_masks": _pseudo_mask_results(summary),
    }


def make_figures(summary: Mapping) -> dict[str, go.Figure]:
    """
    All figures of a report by the name of their place in the page.

    "overlap-detections" and "overlap-METRIC" (on ground-truth boxes) are curves over the overlap,
    Fig. 2 of the paper; so are "pseudo-masks". "false-positives" is Fig. 3. Figures without data
    are left out.

    Args:
        summary: of an :class:`Analysis`.
    """
    names = [*summary["models"], *summary["yardsticks"]]
    colors = dict(zip(map(_label, names), itertools.cycle(_COLORS)))
    results = _results_by_protocol(summary)
    figures = {"false-positives": _false_positive_shares(results)}
    for name, protocol, metric, title, _ in _OVERLAP_FIGURES:
        figures[name] = _curves(results.get(protocol, {}), metric, title, colors)
    figures["pseudo-masks"] = _curves(_pseudo_mask_results(summary), "mask_iou", "mean IoU", {})
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
            "result": f"{_label(model)}<br>{_PROTOCOL_LABELS[protocol]}",
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


def _format_cell(
    value: float | None, interval: Sequence[float] | None = None, digits: int = 1, sign: str = ""
) -> str:
    """ "1.2 [0.3, 2.1]"; "-" where the value is undefined."""
    if value is None:
        return "-"
    # + 0.0: "-0.0" would claim a direction.
    value, *ends = (round(x, digits) + 0.0 for x in (value, *(interval or ())))
    text = f"{value:{sign}.{digits}f}"
    return f"{text} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else text


def _format_difference(entry: Mapping) -> str:
    """ "+1.2 [0.3, 2.1]", with a note where it is not established."""
    interval = entry["interval"]
    text = _format_cell(entry["difference"], interval, sign="+")
    if text == "-":
        return text
    if interval is None:
        return f"{text} (no interval)"
    if entry["includes_zero"]:
        return f"{text} (contains 0)"
    # All objects are in one image, which every resample repeats.
    return f"{text} (too few images)" if interval[0] == interval[1] else text
