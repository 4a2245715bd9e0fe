"""HTML pages in the style of the report, which need no network and run nobody else's script."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np

from inference.setup import UsageError
from teacher_student_mask.engine import open_atomically

__all__ = ["check_jinja2", "make_thumbnail", "to_url", "write_page", "write_picture"]

_TEMPLATES = Path(__file__).with_name("templates")
_QUALITY = 80


def check_jinja2(option: str) -> None:
    """
    Args:
        option: what needs it.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{option} needs jinja2: pip install 'teacher-student-mask[report]'"
        ) from error


def write_page(path: Path, template: str, content: Mapping, tiles: list[dict]) -> None:
    """
    Write a page, all of it or nothing.

    Args:
        path: of the page.
        template: its name in tools/templates; a child of page.html.j2.
        content: what the template asks for.
        tiles: for each element of class "tile", in their order, what gallery.js sorts and chooses
            by: "name", and "items", a list of [class, kind, value]. In json.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(_TEMPLATES),
    )
    style = importlib.resources.files("teacher_student_mask.analysis") / "templates/report.css"
    script = (_TEMPLATES / "gallery.js").read_text(encoding="utf-8")
    # How a Content-Security-Policy names an inline script that may run.
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    html = environment.get_template(template).render(
        content,
        css=style.read_text(encoding="utf-8")
        + (_TEMPLATES / "gallery.css").read_text(encoding="utf-8"),
        script=script,
        script_source=f"'sha256-{digest}'",
        tiles=tiles,
    )
    with open_atomically(path, "wb") as f:
        # Names of files and classes may hold what UTF-8 has no bytes for.
        f.write(html.encode("utf-8", errors="backslashreplace"))


def to_url(path: str | os.PathLike) -> str:
    """A relative path as a page names it, whatever characters it has."""
    url = quote(os.fsencode(Path(path).as_posix()))
    # A name with a colon would be taken for a protocol, two slashes for a host.
    return f"./{url.lstrip('/')}"


def make_thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture, shape (H, W, 3), whose longer side is not above a number of pixels."""
    scale = side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(x * scale)) for x in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """
    Write a JPEG, with its folder if that is new.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1]
    with open_atomically(path, "wb") as f:
        f.write(data.tobytes())
