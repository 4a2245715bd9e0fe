"""Checks of a COCO json before training: what would break it, what is left out, what is odd."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from ..class_splits import resolve_seen_classes
from .annotation_report import EMPTY, AnnotationReport, short_repr
from .image_checks import check_image_entries, check_image_files
from .mask_measures import is_whole
from .object_checks import ObjectChecks
from .reading import paused_gc, read_json

__all__ = ["check_annotations"]

_LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
_LAYOUT = "allowed: a COCO json in UTF-8, a dict with the lists " + ", ".join(map(repr, _LISTS))


def check_annotations(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    seen_classes: str | None = None,
    num_classes: int | None = None,
    check_images: bool = False,
    progress: Callable[[Iterable, int], Iterable] | None = None,
    num_workers: int = 1,
    data: object = None,
) -> AnnotationReport:
    """
    Check a COCO json that may have masks on any part of its objects, for training with it.

    Nothing that a file holds raises an exception. Masks that training does not read (of crowds and
    unseen classes) make warnings where others make errors.

    Args:
        json_file: the annotations.
        image_root: folder of the images; None: do not look whether they are there.
        seen_classes: in the form of ``DATASETS.SEEN_CLASSES``; None: what holds for all splits.
        num_classes: of the model, ``MODEL.ROI_HEADS.NUM_CLASSES``; None: any number will do.
        check_images: open every image and read all of it; needs ``image_root``.
        progress, num_workers: of :func:`check_image_files`.
        data: what ``json_file`` holds, if it has been read already; not changed.

    Raises:
        ValueError: ``check_images`` without ``image_root``.
    """
    if check_images and image_root is None:
        raise ValueError("check_images needs image_root, the folder of the images.")
    report = AnnotationReport(os.fspath(json_file))
    with paused_gc():
        data = _read(report) if data is None else data
        is_coco = not report.findings and _has_layout(report, data)
        if is_coco:
            _check_content(report, data, image_root, seen_classes, num_classes)
    if is_coco and check_images:
        check_image_files(report, data["images"], image_root, progress, num_workers)
    report.findings.sort(key=lambda finding: finding.severity)  # errors first, else as found
    return report


def _read(report: AnnotationReport) -> object:
    try:
        return read_json(report.file)
    except (OSError, ValueError) as error:
        report.add_to_file("error", "content", f"unreadable ({error})", _LAYOUT)
        return None


def _has_layout(report: AnnotationReport, data: object) -> bool:
    if not isinstance(data, dict):
        report.add_to_file("error", "content", f"a {type(data).__name__}", _LAYOUT)
        return False
    is_readable = True
    for key, unit in _LISTS.items():
        rows = data.get(key)
        value = short_repr.repr(rows) if key in data else "missing"
        if type(rows) is not list or not set(map(type, rows)) <= {dict}:
            report.add_to_file("error", key, value, "allowed: a list of dicts")
            is_readable = False
        elif not rows:
            report.add_to_file("error", key, EMPTY, f"allowed: at least one {unit}")
    return is_readable


def _check_content(
    report: AnnotationReport,
    data: dict,
    image_root: str | os.PathLike | None,
    seen_classes: str | None,
    num_classes: int | None,
) -> None:
    images, annotations, categories = (data[key] for key in _LISTS)
    report.num_images, report.num_annotations = len(images), len(annotations)
    row_of_image, sizes = check_image_entries(report, images, image_root)
    names = _check_categories(report, categories, num_classes)
    is_seen = _resolve_seen(report, list(names.values()), seen_classes)
    ObjectChecks(report, annotations, row_of_image, sizes, names, is_seen).check(images)


def _check_categories(
    report: AnnotationReport, categories: list[dict], num_classes: int | None
) -> dict[int, str]:
    """Returns {category id: name} in the order of the ids, which is that of the model's classes."""
    ids = [x["id"] if is_whole(x.get("id")) else None for x in categories]
    names = [x["name"] if type(x.get("name")) is str else "" for x in categories]
    id_counts, name_counts = Counter(ids), Counter(names)
    for field_, is_bad, remedy in (
        ("id", [x is None for x in ids], "allowed: a whole number"),
        ("id", [x is not None and id_counts[x] > 1 for x in ids], "allowed: an id no other has"),
        ("name", [not x.strip() for x in names], "allowed: the name of the class"),
        (
            "name",
            [bool(x.strip()) and name_counts[x] > 1 for x in names],
            "allowed: names that differ, as seen classes are given by name; rename or merge them",
        ),
    ):
        report.add("error", "category", categories, is_bad, field_, remedy)
    if num_classes is not None and len(categories) != num_classes:
        remedy = f"the model has {num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES {len(categories)}"
        report.add_to_file("error", "categories", f"{len(categories)} classes", remedy)
    return dict(sorted((i, name) for i, name in zip(ids, names) if i is not None))


def _resolve_seen(
    report: AnnotationReport, names: list[str], seen_classes: str | None
) -> np.ndarray | None:
    """Bool of shape (number of classes,); None where all masks are to be taken for read."""
    if seen_classes is None or any(x.unit == "category" for x in report.errors):
        return None
    try:
        seen = resolve_seen_classes(seen_classes, names)
    except (ValueError, OSError) as error:
        report.add_to_file("error", "seen_classes", repr(seen_classes), str(error).rstrip("."))
        return None
    return np.isin(np.arange(len(names)), seen)
