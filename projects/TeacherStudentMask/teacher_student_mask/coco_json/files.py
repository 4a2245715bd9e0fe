"""Json files as large as COCO's, and image files as training reads them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator

import msgspec
from PIL import Image

from ..errors import InputError

__all__ = [
    "DEEP_MODES",
    "TRANSPOSED",
    "orientation_of",
    "paused_gc",
    "problem_of_image",
    "read_json",
    "write_json",
]

# PIL's modes of more than 8 bits a channel; converting them to RGB cuts all values above 255.
DEEP_MODES = ("I", "F")
# EXIF orientations that swap width and height.
TRANSPOSED = (5, 6, 7, 8)


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """
    No garbage collection inside: a large file becomes millions of lists and dicts that all stay,
    and going through them for cycles would take a third of the time of reading it.
    """
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
    unfinished = f"{os.fspath(path)}.unfinished"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(json.dumps(data))  # json.dump takes minutes for COCO's
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error


def problem_of_image(path: str, height: int, width: int) -> tuple[str, str] | None:
    """
    Read an image to its end.

    Args:
        height, width: in pixels, as the json has them.

    Returns:
        The worst of what is wrong with it, or odd: the name of the rule, and the value as text.
    """
    name = repr(path)
    try:
        with warnings.catch_warnings():
            # Of large images and odd metadata, which do no harm.
            warnings.simplefilter("ignore")
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
