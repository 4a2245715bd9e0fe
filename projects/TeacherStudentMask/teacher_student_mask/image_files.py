"""Image files as training reads them: size after EXIF's orientation, and depth of the pixels."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from PIL import Image

__all__ = [
    "DEEP_MODES",
    "TRANSPOSED",
    "missing_files",
    "orientation_of",
    "problems_of_image",
    "read_image_files",
]

_EXIF_ORIENTATION = 0x0112
# Orientations that swap width and height.
TRANSPOSED = (5, 6, 7, 8)

# PIL's modes of more than 8 bits a channel; converting them to RGB cuts all values above 255.
DEEP_MODES = ("I", "F")


def problems_of_image(path: str | os.PathLike, height: int, width: int) -> dict[str, str]:
    """
    Read one image to its end.

    Args:
        path: the file.
        height, width: in pixels, as the json has them.

    Returns:
        What is wrong with it or odd, as text, by its kind: "unreadable", "size", "orientation",
        "depth" or "colour".
    """
    name = repr(os.fspath(path))
    try:
        with warnings.catch_warnings():
            # Of large images and odd metadata, which do no harm.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                mode, size, orientation = image.mode, image.size, orientation_of(image)
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        return {"unreadable": f"{name}, which cannot be read ({error})"}
    problems = {}
    turned = size[::-1] if orientation in TRANSPOSED else size
    if turned != (width, height):
        by_exif = f", turned by EXIF orientation {orientation}" if turned != size else ""
        found = f"{turned[0]}, {turned[1]}{by_exif}"
        problems["size"] = f"{width}, {height}, but {name} has {found}"
    elif orientation in range(2, 9):
        problems["orientation"] = f"{name} with EXIF orientation {orientation}"
    if mode.startswith(DEEP_MODES):
        problems["depth"] = f"{name} in PIL's mode {mode!r}"
    if mode in ("CMYK", "LAB"):
        problems["colour"] = f"{name} in {mode}"
    return problems


def read_image_files(
    jobs: Collection[tuple[str, int, int]],
    num_workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> list[dict[str, str]]:
    """
    Call :func:`problems_of_image` for many images.

    Args:
        jobs: path, height and width of each.
        num_workers: processes that read; 1: this one alone.
        progress: ``progress(iterable, total)`` gives the items of the iterable and shows how many.
    """
    with contextlib.ExitStack() as stack:
        run = map
        if num_workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(num_workers))
            run = partial(pool.map, chunksize=32)
        answers = run(problems_of_image, *zip(*jobs)) if jobs else []
        return list(answers if progress is None else progress(answers, len(jobs)))


def missing_files(paths: Iterable[str]) -> set[str]:
    """Those that are not files, found with one listing a folder: folders may be far away."""
    files_in: dict[str, set[str]] = {}
    missing = set()
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in files_in:
            files_in[folder] = set()
            # No such folder, or a name with characters that no folder has.
            with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
                files_in[folder] = {entry.name for entry in entries if entry.is_file()}
        if name not in files_in[folder]:
            missing.add(path)
    return missing


def orientation_of(image: Image.Image) -> object:
    """EXIF's orientation of an open image, 1 to 8 where it is sound; None: it has none."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata; Detectron2 reads such an image without them, too
        return None
