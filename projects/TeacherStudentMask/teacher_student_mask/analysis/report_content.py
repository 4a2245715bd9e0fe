"""What stands in the report: the figures, and the content of the page as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from . import charts
from . import report_tables as tables
from .chart_style import FALSE_POSITIVE_COLOURS, model_colour
from .object_scatter import scatter_of_objects
from .pictures import ObjectPicture
from .report_files import DATA_FILES
from .report_tables import ResultSet, result_sets, task_labels
from .report_text import glance_sentences

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .analysis import Analysis

__all__ = ["make_content", "make_figures"]

# As plotly's symbols of the models, in the same order.
_SYMBOLS = "●■◆▲✚✖★"
_GT_BOX_METRICS = {
    "AP": ("AP", "AP on ground-truth boxes", 1),
    "mask_iou": ("mean mask IoU", "Mean mask IoU on ground-truth boxes", 3),
    "boundary_iou": ("mean boundary IoU", "Mean boundary IoU on ground-truth boxes", 3),
}


def make_figures(analysis: Analysis) -> dict[str, go.Figure]:
    """
    All figures of a report by the name of their place in the page.

    A figure that would have no data is left out.
    """
    summary = analysis.summary
    tasks = task_labels(summary)
    by_protocol = _by_protocol(summary)
    figures = {}
    for protocol, sets in by_protocol.items():
        figures[f"results-{protocol}"] = charts.headline_intervals(summary, protocol, tasks)
    if _have_bins(by_protocol.get("detections", []), "AP"):
        figures["overlap-detections"] = charts.overlap_curve(by_protocol["detections"])
    for metric, (title, _, digits) in _GT_BOX_METRICS.items():
        sets = by_protocol.get("gt_boxes", [])
        if _have_bins(sets, metric):
            figures[f"overlap-gt_boxes-{metric}"] = charts.overlap_curve(
                sets, metric, title, digits
            )
    attributed = _attributed(summary)
    if attributed:
        figures["attribution"] = charts.attribution_bars(attributed)
    pseudo_masks = charts.pseudo_mask_curve(summary)
    if pseudo_masks is not None:
        figures["pseudo-masks"] = pseudo_masks
    for i, difference in enumerate(_class_differences(summary)):
        figures[f"classes-{i}"] = charts.per_class_differences(difference)
    scatter = scatter_of_objects(analysis)
    if scatter.layout.meta["num_shown"]:
        figures["objects"] = scatter
    return figures


def make_content(
    analysis: Analysis,
    figures: Mapping[str, go.Figure],
    shown: Sequence[str],
    pictures: Sequence[ObjectPicture],
    image_root: str | None,
) -> dict:
    """
    The variables of templates/report.html.j2.

    Args:
        analysis: of one or more models.
        figures: of :func:`make_figures`.
        shown: the models in the pictures.
        pictures: of single objects.
        image_root: as given by the user; only whether it is None matters.
    """
    summary = analysis.summary
    dataset = summary["dataset"]
    models = list(summary["models"])
    return {
        "title": "Analysis: " + ", ".join(models),
        "summary": summary,
        "models": [_model(summary, i, name) for i, name in enumerate(models)],
        "facts": {
            "images": f"{dataset['num_images']:,}",
            "objects": f"{dataset['num_objects']:,}",
            "seen-class objects": f"{dataset['num_seen']:,}",
            "unseen-class objects": f"{dataset['num_unseen']:,}",
            "crowd regions, ignored": f"{dataset['num_crowd']:,}",
        },
        "sentences": [_keep_intervals_together(x) for x in glance_sentences(summary)],
        "results": _results(summary),
        "differences": _differences(summary),
        "overlap": _overlap(summary, figures),
        "attribution": tables.false_positives_table(_attributed(summary), "attribution-table"),
        "pseudo_masks": tables.pseudo_masks_table(summary, "pseudo-masks-table"),
        "class_differences": [
            {
                "label": _pair_label(x),
                "figure": f"classes-{i}",
                "table": tables.class_differences_table(x, f"classes-{i}-table"),
            }
            for i, x in enumerate(_class_differences(summary))
        ],
        "per_class": [
            tables.per_class_table(sets, f"per-class-{protocol}-table")
            for protocol, sets in _by_protocol(summary).items()
            if any(x.data.get("per_class") for x in sets)
        ],
        "scatter": figures["objects"].layout.meta if "objects" in figures else None,
        "shown": [{"name": x, **_sign(models.index(x))} for x in shown],
        "shown_protocol": _shown_protocol(analysis, shown),
        "pictures": [_picture(x) for x in pictures],
        "picture_classes": sorted({x.class_name for x in pictures}),
        "num_without_image": sum(not x.has_image for x in pictures) if image_root else 0,
        "has_image_root": image_root is not None,
        "kind_colours": FALSE_POSITIVE_COLOURS,
        "data_files": DATA_FILES,
        "figures": list(figures),
    }


def _keep_intervals_together(sentence: str) -> str:
    """Put no-break spaces into "[0.4, 4.1]"."""
    return re.sub(r"\[(\S+), (\S+)\]", "[\\1,\u00a0\\2]", sentence)


def _by_protocol(summary: Mapping) -> dict[str, list[ResultSet]]:
    grouped: dict[str, list[ResultSet]] = {}
    for x in result_sets(summary):
        grouped.setdefault(x.protocol, []).append(x)
    return grouped


def _have_bins(sets: Sequence[ResultSet], metric: str) -> bool:
    return any(b.get(metric) is not None for x in sets for b in x.data.get("overlap_bins", []))


def _attributed(summary: Mapping) -> list[ResultSet]:
    return [x for x in result_sets(summary) if x.data.get("false_positives")]


def _class_differences(summary: Mapping) -> list[Mapping]:
    return [x for x in summary["differences"] if x.get("per_class")]


def _pair_label(difference: Mapping) -> str:
    protocol = tables.PROTOCOL_LABELS[difference["protocol"]]
    return f"{difference['model']} minus {difference['baseline']}, {protocol}"


def _sign(index: int) -> dict:
    return {"symbol": _SYMBOLS[index % len(_SYMBOLS)], "colour": model_colour(index)}


def _model(summary: Mapping, index: int, name: str) -> dict:
    data = summary["models"][name]
    files = [data.get("results"), data.get("gt_box_results")]
    return {
        "name": name,
        "files": [x for x in files if x],
        "num_detections": data.get("num_detections"),
        **_sign(index),
    }


def _results(summary: Mapping) -> list[dict]:
    tasks = task_labels(summary)
    return [
        {
            "title": f"On {sets[0].protocol_label}",
            "figure": f"results-{protocol}",
            "label": f"AP with intervals, {sets[0].protocol_label}",
            "table": tables.headline_table(sets, tasks, f"results-{protocol}-table"),
        }
        for protocol, sets in _by_protocol(summary).items()
    ]


def _differences(summary: Mapping) -> list[tables.Table]:
    tasks = task_labels(summary)
    return [
        tables.differences_table(x, tasks, f"difference-{i}-table")
        for i, x in enumerate(summary["differences"])
    ]


def _overlap(summary: Mapping, figures: Mapping) -> list[dict]:
    by_protocol = _by_protocol(summary)
    blocks = []
    if "overlap-detections" in figures:
        blocks.append(("overlap-detections", "detections", "AP", "AP on detected boxes", 1))
    for metric, (_, caption, digits) in _GT_BOX_METRICS.items():
        figure = f"overlap-gt_boxes-{metric}"
        if figure in figures:
            blocks.append((figure, "gt_boxes", metric, caption, digits))
    return [
        {
            "figure": figure,
            "label": f"{caption}, over the overlap of the objects",
            "table": tables.bins_table(
                by_protocol[protocol],
                metric,
                f"{caption}, unseen objects by overlap",
                f"{figure}-table",
                digits,
            ),
        }
        for figure, protocol, metric, caption, digits in blocks
    ]


def _shown_protocol(analysis: Analysis, shown: Sequence[str]) -> str:
    return tables.PROTOCOL_LABELS[analysis.objects[shown[0]].protocol] if shown else ""


def _picture(picture: ObjectPicture) -> dict:
    """A picture with its numbers as texts."""
    a, *others = picture.ious
    gain = others[0] - a if others else None
    return {
        "object": picture,
        "overlap": f"{picture.overlap:.2f}",
        "ious": [tables.format_number(x, 2) for x in picture.ious],
        "boundary_ious": [
            tables.format_number(x, 2) for x in picture.boundary_ious if not math.isnan(x)
        ],
        "gain": None if gain is None else tables.format_number(gain, 2, sign=True),
        # What the page sorts by.
        "sort": {
            "gain": round(gain or 0.0, 6),
            "overlap": round(picture.overlap, 6),
            "iou": round(min(picture.ious), 6),
        },
    }
