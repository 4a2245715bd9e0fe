"""Checks of the images of a COCO json: their entries, and the files themselves."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .mask_measures import MAX_PIXELS, is_whole

if TYPE_CHECKING:
    from .annotation_report import AnnotationReport

__all__ = [
    "DEEP_MODES",
    "TRANSPOSED",
    "check_image_entries",
    "check_image_file",
    "check_image_files",
    "orientation_of",
]

_EXIF_ORIENTATION = 0x0112
# Orientations that swap width and height.
TRANSPOSED = (5, 6, 7, 8)

# What PIL, and with it the training, makes of a pixel above 255 in these.
DEEP_MODES = ("I", "F")

_FILES_PER_CALL = 32

# What the answers of check_image_file mean: severity, field, remedy.
_FILE_PROBLEMS = {
    "unreadable": ("error", "file_name", "allowed: an image that PIL reads to its end"),
    "size": (
        "error",
        "width, height",
        "allowed: the size of the file, after it was turned as its EXIF orientation says; correct "
        "the json, boxes and masks included",
    ),
    "depth": (
        "error",
        "file_name",
        "allowed: 8 bits a channel, as training would cut all values above 255; convert the image",
    ),
    "orientation": (
        "warning",
        "file_name",
        "training turns the image as its EXIF orientation says, so boxes and masks must fit the "
        "turned image",
    ),
    "colour": (
        "warning",
        "file_name",
        "training converts it to RGB without a colour profile; convert it yourself if the colours "
        "matter",
    ),
}


def check_image_entries(
    report: AnnotationReport, images: list[dict], image_root: str | os.PathLike | None
) -> tuple[dict, np.ndarray]:
    """
    Check ids, sizes and file names, and that the files are there; opens none.

    Args:
        report: where findings are added.
        images: the list "images" of the json.
        image_root: folder of the images; None: do not look for the files.

    Returns:
        {image id: row}, and the (height, width) of the rows, float64 of shape (n, 2), nan where
        the json has none.
    """
    row_of = {}
    is_bad, is_repeated = np.zeros((2, len(images)), dtype=bool)
    for i, image in enumerate(images):
        value = image.get("id")
        is_bad[i] = not is_whole(value)
        if not is_bad[i]:
            is_repeated[i] = row_of.setdefault(value, i) != i
    report.add("error", "image", images, is_bad, "id", "allowed: a whole number")
    report.add("error", "image", images, is_repeated, "id", "allowed: an id that no other has")

    sizes = np.full((len(images), 2), np.nan)
    for column, field in enumerate(("height", "width")):
        values = [image.get(field) for image in images]
        is_size = [is_whole(x) and 0 < x < MAX_PIXELS for x in values]
        sizes[:, column] = [x if good else np.nan for x, good in zip(values, is_size)]
        remedy = f"allowed: a whole number of pixels from 1 to {MAX_PIXELS - 1}"
        report.add("error", "image", images, ~np.array(is_size, dtype=bool), field, remedy)
    report.add(
        "error",
        "image",
        images,
        sizes.prod(axis=1) >= MAX_PIXELS,
        "height x width",
        f"allowed: fewer than {MAX_PIXELS} pixels",
        lambda i: " x ".join(str(int(x)) for x in sizes[i]),
    )
    _check_file_names(report, images, image_root)
    return row_of, sizes


def _check_file_names(
    report: AnnotationReport, images: list[dict], image_root: str | os.PathLike | None
) -> None:
    names = [image.get("file_name") for image in images]
    is_name = np.array([type(x) is str and bool(x) for x in names], dtype=bool)
    remedy = "allowed: the name of the file, relative to the folder of the images"
    report.add("error", "image", images, ~is_name, "file_name", remedy)
    seen = set()
    is_repeated = [
        good and (x in seen or seen.add(x) is not None) for x, good in zip(names, is_name)
    ]
    remedy = "other images name the same file, which counts more than once in training"
    report.add("warning", "image", images, is_repeated, "file_name", remedy)
    if image_root is None:
        return
    root = os.fspath(image_root)
    if not os.path.isdir(root):
        report.add_to_file("error", "image_root", repr(root), "allowed: a folder that exists")
        return
    # One listing a folder rather than one question a file: folders may be far away.
    files_in = {}
    is_missing = np.zeros(len(images), dtype=bool)
    for i in np.flatnonzero(is_name):
        folder, name = os.path.split(os.path.join(root, names[i]))
        if folder not in files_in:
            files_in[folder] = _files_in(folder)
        is_missing[i] = name not in files_in[folder]
    remedy = f"allowed: a file in the folder of the images, {root!r}; get it or take the image out"
    report.add("error", "image", images, is_missing, "file_name", remedy)


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # none such, or a name with characters that no folder has
        return set()


def check_image_files(
    report: AnnotationReport,
    images: list[dict],
    image_root: str | os.PathLike,
    progress: Callable[[Iterable, int], Iterable] | None = None,
    num_workers: int = 1,
) -> None:
    """
    Open every image that is there and read all of it.

    Args:
        report, images: as for :func:`check_image_entries`, which must have been called before.
        image_root: folder of the images.
        progress: ``progress(iterable, total)`` gives the items of the iterable and shows how many.
        num_workers: how many processes read; 1: this one alone.
    """
    root = os.fspath(image_root)
    rows, jobs = [], []
    for i, image in enumerate(images):
        name = image.get("file_name")
        # Missing files are known from their entries.
        if type(name) is str and os.path.isfile(os.path.join(root, name)):
            rows.append(i)
            jobs.append((os.path.join(root, name), image.get("height"), image.get("width")))
    with contextlib.ExitStack() as stack:
        run = map
        if num_workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(num_workers))
            run = partial(pool.map, chunksize=_FILES_PER_CALL)
        answers = run(check_image_file, *zip(*jobs)) if jobs else []
        if progress is not None:
            answers = progress(answers, len(jobs))
        # The answers first, so that they, and the progress, are taken to their end.
        problems = [(i, *problem) for of_file, i in zip(answers, rows) for problem in of_file]
    for kind, (severity, field, remedy) in _FILE_PROBLEMS.items():
        values = {i: value for i, its_kind, value in problems if its_kind == kind}
        is_bad = np.zeros(len(images), dtype=bool)
        is_bad[list(values)] = True
        report.add(severity, "image", images, is_bad, field, remedy, values.get)


def check_image_file(path: str, height: object, width: object) -> list[tuple[str, str]]:
    """
    Read one image as training does.

    Args:
        path: the file.
        height, width: what the json says, in pixels.

    Returns:
        One tuple for each problem: its kind, "unreadable", "size", "depth", "orientation" or
        "colour", and what was found, as text.
    """
    name = repr(path)
    try:
        with warnings.catch_warnings():
            # Of large images and odd metadata, which do no harm.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                mode, size = image.mode, (image.height, image.width)
                orientation = orientation_of(image)
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        return [("unreadable", f"{name}, which cannot be read ({error})")]
    problems = []
    turned = size[::-1] if orientation in TRANSPOSED else size
    # What is no size has been told already.
    is_size = all(is_whole(x) and x > 0 for x in (height, width))
    if is_size and turned != (height, width):
        by_exif = f", turned by EXIF orientation {orientation}" if turned != size else ""
        found = f"{width}, {height}, but {name} has {turned[1]}, {turned[0]}{by_exif}"
        problems.append(("size", found))
    elif orientation in range(2, 9):
        problems.append(("orientation", f"{name} with EXIF orientation {orientation}"))
    if mode.startswith(DEEP_MODES):
        problems.append(("depth", f"{name} in PIL's mode {mode!r}"))
    if mode in ("CMYK", "LAB"):
        problems.append(("colour", f"{name} in {mode}"))
    return problems


def orientation_of(image: Image.Image) -> object:
    """EXIF's orientation of an open image, 1 to 8 where it is sound; None: it has none."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata; Detectron2 reads such an image without them, too
        return None
