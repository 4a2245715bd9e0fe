"""The report of an analysis: one HTML file that needs no network, and its numbers as files."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .chart_style import DARK_COLOURS
from .pictures import draw_objects, models_to_picture
from .report_content import make_content, make_figures
from .report_files import to_strict_json, write_data_files, write_text

if TYPE_CHECKING:
    from .analysis import Analysis

__all__ = ["write_report"]

logger = logging.getLogger(__name__)

_EXTRA = "pip install 'teacher-student-mask[report]'"


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
        num_objects: how many objects to picture at most, >= 0. 200 take about 5 MB.

    Returns:
        The path of ``report.html``.

    Raises:
        ImportError: jinja2 or plotly is not installed.
        ValueError: image_root is no folder, or num_objects is negative.
    """
    _check_packages()
    if image_root is not None and not os.path.isdir(image_root):
        raise ValueError(f"image_root is {str(image_root)!r}; it must be the folder of the images.")
    if num_objects < 0:
        raise ValueError(f"num_objects is {num_objects}; it must be 0 or more.")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_data_files(analysis, folder)
    shown = models_to_picture(analysis)
    pictures = draw_objects(analysis, shown, image_root, num_objects) if shown else []
    figures = make_figures(analysis)
    content = make_content(analysis, figures, shown, pictures, image_root)
    path = folder / "report.html"
    write_text(path, _render(content, figures))
    size = path.stat().st_size / 1e6
    logger.info(f"Wrote {path} ({size:.1f} MB, {len(pictures)} objects) and its data files.")
    return path


def _check_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as e:
        raise ImportError(f"The report needs jinja2 and plotly: {_EXTRA}") from e


def _render(content: Mapping, figures: Mapping) -> str:
    import jinja2
    import plotly.offline

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_read_template),
    )
    scripts = {
        "plotly_js": plotly.offline.get_plotlyjs(),
        "report_js": _read_template("report.js"),
    }
    # tojson escapes what could end the script block; nan must be gone before.
    data = {
        "figures": {
            name: json.loads(to_strict_json(figure.to_plotly_json()))
            for name, figure in figures.items()
        },
        "dark": DARK_COLOURS,
    }
    return environment.get_template("report.html.j2").render(
        content,
        **scripts,
        css=_read_template("report.css"),
        data=data,
        script_sources=" ".join(_csp_hash(x) for x in scripts.values()),
    )


def _read_template(name: str) -> str:
    file = importlib.resources.files(__package__) / "templates" / name
    return file.read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    """How a Content-Security-Policy names an inline script that may run."""
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
