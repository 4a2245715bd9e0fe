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
from .figures import make_figures, model_color
from .objects import PIXEL_COLORS, draw_objects

if TYPE_CHECKING:
    from .measure import Analysis

__all__ = ["write_report"]

logger = logging.getLogger(__name__)


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

    # IoU on detected and on ground-truth boxes do not compare.
    protocol = next(iter(analysis.objects.values())).protocol
    shown = [name for name, x in analysis.objects.items() if x.protocol == protocol][:2]
    pictures, num_grey = draw_objects(
        analysis.coco,
        analysis.summary,
        [analysis.objects[x] for x in shown],
        image_root,
        num_objects,
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
        )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


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
    curves = [("overlap-detections", "detections", "AP", 1)]
    curves += [("overlap-AP", "gt_boxes", "AP", 1)]
    curves += [(f"overlap-{x}", "gt_boxes", x, 3) for x in ("mask_iou", "boundary_iou")]
    quality = tables.pseudo_mask_results(summary)
    differences = {
        f"{x['model']} minus {x['baseline']}, {labels[x['protocol']]}": x
        for x in summary["differences"]
    }

    def html(table) -> str:
        return table.to_html(index=False, border=0, escape=True)

    return {
        "summary": summary,
        "colors": {name: model_color(i) for i, name in enumerate(summary["models"])},
        "figures": figures,
        "results": {labels[x]: html(tables.results_table(summary, x)) for x in results},
        "differences": {
            pair: html(tables.differences_table(summary, x)) for pair, x in differences.items()
        },
        "overlap": [
            (
                name,
                f"{metric.replace('_iou', ' IoU')} on {labels[protocol]}",
                html(tables.bins_table(results[protocol], metric, digits)),
            )
            for name, protocol, metric, digits in curves
            if name in figures
        ],
        "false_positives": html(tables.false_positives_table(summary)),
        "pseudo_masks": html(tables.bins_table(quality, "mask_iou", 3)) if quality else "",
        "classes": {labels[x]: html(tables.class_table(summary, x)) for x in results},
    }


def _read_template(name: str) -> str:
    file = importlib.resources.files(__package__) / "templates" / name
    return file.read_text(encoding="utf-8")
