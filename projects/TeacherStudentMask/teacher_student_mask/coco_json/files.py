"""Json files as large as COCO's, and the files of their images."""

import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import InputError
from .report import Report, shorten

__all__ = [
    "DEEP_MODES",
    "TRANSPOSED",
    "check_files",
    "open_atomically",
    "orientation_of",
    "paused_gc",
    "read_json",
    "write_json",
]

# PIL's modes of more than 8 bits a channel; converting them to RGB cuts all values above 255.
DEEP_MODES = ("I", "F")
# EXIF orientations that swap width and height.
TRANSPOSED = (5, 6, 7, 8)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection inside, a third of the time of reading a large file."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: str | os.PathLike) -> object:
    """
    Read a json file of any size.

    Raises:
        InputError: it cannot be read, or is not json in UTF-8.
    """
    try:
        with open(path, "rb") as file, paused_gc():
            content = file.read()
            try:
                return msgspec.json.decode(content)
            except msgspec.MsgspecError:  # NaN, for instance, which Python's json writes and reads
                return json.loads(content.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error}") from error


def write_json(path: str | os.PathLike, data: object) -> None:
    """
    Write a json file as a whole or not at all; a file that exists is replaced.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with open_atomically(path) as file:
            file.write(json.dumps(data))  # json.dump takes minutes for COCO's
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """
    Write a local file that takes its name, and the place of an older one, once it is complete.

    Until then it is ``path`` + ".partial". ``mode`` is "w" for text in UTF-8, or "wb".
    """
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def check_files(
    report: Report,
    images: list[dict],
    image_root: str | os.PathLike,
    sizes: np.ndarray,
    reads_files: bool,
) -> None:
    """
    Look whether the files of images are there, and read them to their ends.

    Args:
        images: n entries of a json.
        sizes: their (height, width), shape (>= n, 2).
        reads_files: whether they are opened.
    """
    image_root = os.fspath(image_root) or "."  # names alone are of the current folder
    if not os.path.isdir(image_root):
        report.add_to_file("image root", repr(os.fspath(image_root)))
        return
    paths = [os.path.join(image_root, x.get("file_name") or "") for x in images]
    # One listing a folder, as folders may be far away.
    folders = {os.path.dirname(x) for x in paths}
    names_in = {x: set(os.listdir(x)) if os.path.isdir(x) else set() for x in folders}
    where = f" (looked for in {os.fspath(image_root)!r})"
    problems: list[tuple[str, str] | None] = [
        (
            None
            if os.path.basename(path) in names_in[os.path.dirname(path)]
            else ("missing file", shorten(image.get("file_name")) + where)
        )
        for path, image in zip(paths, images)
    ]
    if reads_files:
        rows = [i for i, problem in enumerate(problems) if problem is None]
        with ThreadPoolExecutor() as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata, which do no harm
            found = pool.map(lambda i: _problem_of_image(paths[i], *sizes[i].astype(int)), rows)
            for problem, i in zip(tqdm(found, "Images", total=len(rows), unit="image"), rows):
                problems[i] = problem
    for kind in ("missing file", "unreadable", "depth", "size", "colour", "orientation"):
        is_bad = [x is not None and x[0] == kind for x in problems]
        report.add(kind, images, is_bad, lambda i: problems[i][1])


def _problem_of_image(path: str, height: int, width: int) -> tuple[str, str] | None:
    # The worst of what is wrong with it, or odd: the name of the rule, and the value as text.
    name = repr(path)
    try:
        with Image.open(path) as image:
            image.load()
            mode, size, orientation = image.mode, image.size, orientation_of(image)
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        return "unreadable", f"{name}, which cannot be read ({error})"
    turned = size[::-1] if orientation in TRANSPOSED else size
    if mode.startswith(DEEP_MODES):
        return "depth", f"{name} in PIL's mode {mode!r}"
    if turned != (width, height):
        by_exif = f", turned by EXIF orientation {orientation}" if turned != size else ""
        return "size", f"{width}, {height}, but {name} has {turned[0]}, {turned[1]}{by_exif}"
    if mode in ("CMYK", "LAB"):
        return "colour", f"{name} in {mode}"
    if orientation in range(2, 9):
        return "orientation", f"{name} with EXIF orientation {orientation}"
    return None


def orientation_of(image: Image.Image) -> object:
    """EXIF's orientation of an open image, 1 to 8 where it is sound; None: it has none."""
    try:
        return image.getexif().get(0x0112)
    except Exception:  # broken metadata; Detectron2 reads such an image without them, too
        return None
