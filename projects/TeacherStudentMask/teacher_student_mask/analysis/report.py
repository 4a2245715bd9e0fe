"""The report of an analysis: one HTML file that needs no network, and its numbers as files."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..evaluation import MASK_TASKS, METRICS, compare_with_yardsticks, tasks_with_objects
from .figures import (
    OVERLAP_FIGURES,
    PROTOCOL_LABELS,
    make_figures,
    model_color,
    results_by_protocol,
    uncertainty_note,
)
from .objects import PIXEL_COLORS, draw_objects, extreme_objects, select_objects

if TYPE_CHECKING:
    from .measure import Analysis

__all__ = ["headline", "write_report"]

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
    try:
        import jinja2
        import plotly.express  # noqa: F401 (needs pandas)
        import plotly.offline
    except ImportError as e:
        raise InputError(
            f"The report needs pandas, jinja2 and plotly ({e.name} is missing): "
            "pip install 'teacher-student-mask[report]'"
        ) from e
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
    pictures = {
        name: (
            draw_objects(analysis.coco, analysis.summary, tables, rows, image_root)
            if image_root is not None
            else []
        )
        for name, rows in chosen.items()
    }
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read_template),
    )
    environment.filters |= {"cell": _format_cell, "difference": _format_difference}
    page = environment.get_template("report.html.j2").render(
        _content(analysis.summary),
        css=_read_template("report.css"),
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
    results = results_by_protocol(summary)
    with_objects = tasks_with_objects(next(iter(next(iter(results.values())).values())))
    tasks = {**MASK_TASKS, "segm_unseen_overlap": f"unseen, overlap ≥ {threshold:g}"}
    return {
        "summary": summary,
        "colors": {name: model_color(i) for i, name in enumerate(summary["models"])},
        "figures": figures,
        "labels": PROTOCOL_LABELS,
        "metrics": METRICS,
        "tasks": {x: tasks[x] for x in _TASK_ORDER if x in with_objects},
        "results": results,
        "headline": headline(summary),
        "overlap": [x for x in OVERLAP_FIGURES if x[0] in figures],
    }


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
    text = _format_cell(entry["difference"], entry["interval"], sign="+")
    note = uncertainty_note(entry)
    return f"{text} ({note})" if note and text != "-" else text


def _read_template(name: str) -> str:
    file = importlib.resources.files(__package__) / "templates" / name
    return file.read_text(encoding="utf-8")
