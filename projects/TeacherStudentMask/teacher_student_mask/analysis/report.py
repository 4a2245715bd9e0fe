"""The report of an analysis: one HTML file that needs no network, and its numbers as files."""

from __future__ import annotations

import importlib.resources
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import tables
from .figures import GT_BOX_METRICS, make_figures, model_color
from .objects import PIXEL_COLORS, draw_objects

if TYPE_CHECKING:
    import pandas as pd

    from .measure import Analysis

__all__ = ["DATA_FILES", "headline_sentences", "write_report"]

logger = logging.getLogger(__name__)

# What the report says of each file.
DATA_FILES = {
    "analysis.json": "everything but the single objects",
    "models.csv": "one row per model, task and metric, with its interval",
    "per_class.csv": "one row per model and class",
    "objects.csv": "one row per object and model",
}
# More pairs than these are left to the table.
_MAX_COMPARISONS = 3


def write_report(
    analysis: Analysis,
    output_dir: str | os.PathLike,
    *,
    image_root: str | None = None,
    num_objects: int = 200,
) -> Path:
    """
    Write ``report.html``, ``analysis.json`` and the tables as CSV files.

    The page holds all that it shows, scripts and pictures too, and asks nothing of a network.

    Args:
        analysis: of one or more models; not changed.
        output_dir: made if it is not there. Files of an earlier report are replaced.
        image_root: folder of the images. None: the pictures show the masks on grey.
        num_objects: how many objects to picture at most. 200 take about 5 MB.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: pandas, jinja2 or plotly is not installed, or image_root is not a folder.
    """
    try:
        import jinja2
        import pandas as pd
        import plotly.offline
    except ImportError as e:
        raise InputError(
            f"The report needs pandas, jinja2 and plotly ({e.name} is missing): "
            "pip install 'teacher-student-mask[report]'"
        ) from e
    if image_root is not None and not os.path.isdir(image_root):
        raise InputError(f"image_root is {str(image_root)!r}; it must be the folder of the images.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(analysis.summary, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "analysis.json").write_text(text + "\n", encoding="utf-8")
    for name, frame in tables.csv_tables(analysis).items():
        frame.to_csv(folder / name, index=False)

    # IoU on detected and on ground-truth boxes do not compare.
    protocol = next(iter(analysis.objects.values())).protocol
    shown = [name for name, x in analysis.objects.items() if x.protocol == protocol][:2]
    pictures, num_grey = draw_objects(
        analysis.coco,
        analysis.summary,
        [analysis.objects[x] for x in shown],
        image_root,
        max(0, num_objects),
    )
    if num_grey and image_root is not None:
        logger.warning(f"{image_root}: {num_grey} images of shown objects cannot be used.")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read_template),
    )
    with pd.option_context("display.max_colwidth", None):
        page = environment.get_template("report.html.j2").render(
            _content(analysis.summary),
            css=_read_template("report.css"),
            plotly_js=plotly.offline.get_plotlyjs(),
            shown=shown,
            shown_protocol=tables.PROTOCOL_LABELS[protocol],
            pictures=pictures,
            num_grey=num_grey,
            pixel_colors=PIXEL_COLORS,
            data_files=DATA_FILES,
        )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    logger.info(f"Wrote {path} and its data files.")
    return path


def headline_sentences(summary: Mapping) -> list[str]:
    """
    AP on unseen and on overlapped unseen objects with the first differences, in plain sentences.

    They are on detected boxes, or on ground-truth boxes where nothing else was given; not HTML.
    """
    protocol, results = next(iter(tables.results_by_protocol(summary).items()))
    differences = [x for x in summary["differences"] if x["protocol"] == protocol]
    labels = tables.task_labels(summary)
    sentences = []
    for task in ("segm_unseen", "segm_unseen_overlap"):
        parts = []
        for model, x in results.items():
            interval = tables.format_interval(x["intervals"][task]["AP"])
            parts.append(
                f"{model} has {tables.format_number(x[task]['AP'])} AP {interval}".rstrip()
            )
        for pair in differences[:_MAX_COMPARISONS]:
            cell = tables.format_difference(pair["tasks"][task]["AP"])
            parts.append(f"{pair['model']} minus {pair['baseline']} is {cell}")
        objects = f"{labels[task].capitalize()}, {tables.PROTOCOL_LABELS[protocol]}"
        sentences.append(f"{objects}: {'; '.join(parts)}.")
    return sentences


def _content(summary: Mapping) -> dict:
    """The variables of templates/report.html.j2, without the pictures."""
    results, labels = tables.results_by_protocol(summary), tables.PROTOCOL_LABELS
    figures = {
        name: figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{name}",
            config={"responsive": True, "displaylogo": False},
        )
        for name, figure in make_figures(summary).items()
    }
    overlap = [("overlap-detections", "detections", "AP", "AP on detected boxes", 1)]
    overlap += [
        (f"overlap-{metric}", "gt_boxes", metric, title, digits)
        for metric, (title, digits) in GT_BOX_METRICS.items()
    ]
    quality = tables.pseudo_mask_results(summary)
    pairs = [
        f"{x['model']} minus {x['baseline']}, {labels[x['protocol']]}"
        for x in summary["differences"]
    ]
    return {
        "summary": summary,
        "models": [
            {"name": name, "color": model_color(i), **x}
            for i, (name, x) in enumerate(summary["models"].items())
        ],
        "sentences": headline_sentences(summary),
        "figures": figures,
        "results": [
            (labels[protocol], _html(tables.results_table(summary, protocol)))
            for protocol in results
        ],
        "differences": [
            (pair, _html(tables.differences_table(summary, x)))
            for pair, x in zip(pairs, summary["differences"])
        ],
        "overlap": [
            (name, title, _html(tables.bins_table(results[protocol], metric, digits)))
            for name, protocol, metric, title, digits in overlap
            if name in figures
        ],
        "false_positives": _html(tables.false_positives_table(summary)),
        "pseudo_masks": _html(tables.bins_table(quality, "mask_iou", 3)) if quality else "",
        "class_figures": [
            (f"classes-{i}", pair) for i, pair in enumerate(pairs) if f"classes-{i}" in figures
        ],
        "classes": [
            (labels[protocol], _html(tables.class_table(summary, protocol))) for protocol in results
        ],
    }


def _html(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, escape=True)


def _read_template(name: str) -> str:
    file = importlib.resources.files(__package__) / "templates" / name
    return file.read_text(encoding="utf-8")
