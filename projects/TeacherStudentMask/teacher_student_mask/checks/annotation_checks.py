"""Checks of a COCO json before training: what would break it, what is left out, what is odd."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..class_splits import AUTO, resolve_seen_classes
from .annotation_report import EMPTY, AnnotationReport, short_repr
from .image_checks import check_image_entries, check_image_files
from .mask_measures import have_pixels, is_whole
from .mask_sources import is_from_model
from .object_checks import ObjectChecks
from .reading import paused_gc, read_json

__all__ = ["MIN_MASKS_PER_CLASS", "check_annotations"]

# The default of DATASETS.MIN_MASKS_PER_CLASS.
MIN_MASKS_PER_CLASS = 10


@dataclass(frozen=True)
class _SeenChoice:
    # How the seen classes are given: DATASETS.SEEN_CLASSES and DATASETS.MIN_MASKS_PER_CLASS.
    spec: str | None
    min_masks: int


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
    min_masks_per_class: int = MIN_MASKS_PER_CLASS,
) -> AnnotationReport:
    """
    Check a COCO json that may have masks on any part of its objects, for training with it.

    Nothing that a file holds raises an exception. Masks that training does not read (of crowds and
    unseen classes) make warnings where others make errors.

    Args:
        json_file: the annotations.
        image_root: folder of the images; None: do not look whether they are there.
        seen_classes: in the form of ``DATASETS.SEEN_CLASSES``; None: what holds for all splits.
            "auto": the classes with enough human masks in this file.
        num_classes: of the model, ``MODEL.ROI_HEADS.NUM_CLASSES``; None: any number will do.
        check_images: open every image and read all of it; needs ``image_root``.
        progress, num_workers: of :func:`check_image_files`.
        data: what ``json_file`` holds, if it has been read already; not changed.
        min_masks_per_class: masks a class needs to be chosen by ``seen_classes`` "auto".

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
            choice = _SeenChoice(seen_classes, min_masks_per_class)
            _check_content(report, data, image_root, choice, num_classes)
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
    choice: _SeenChoice,
    num_classes: int | None,
) -> None:
    images, annotations, categories = (data[key] for key in _LISTS)
    report.num_images, report.num_annotations = len(images), len(annotations)
    row_of_image, sizes = check_image_entries(report, images, image_root)
    names = _check_categories(report, categories, num_classes)
    if choice.spec == AUTO:
        is_seen = _choose_seen(report, annotations, names, row_of_image, sizes, choice.min_masks)
    else:
        is_seen = _resolve_seen(report, list(names.values()), choice.spec)
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


def _choose_seen(
    report: AnnotationReport,
    annotations: list[dict],
    names: dict[int, str],
    row_of_image: dict[int, int],
    sizes: np.ndarray,
    min_masks: int,
) -> np.ndarray | None:
    """As :func:`_resolve_seen`, of "auto": whether a class has so many masks of humans."""
    # What is no object of a known class and image, ObjectChecks names as an error.
    rows = [
        x
        for x in annotations
        if not x.get("iscrowd")
        and not is_from_model(x)
        and all(type(x.get(key)) in (int, float) for key in ("category_id", "image_id"))
        and x["category_id"] in names
        and x["image_id"] in row_of_image
    ]
    image = np.array([row_of_image[x["image_id"]] for x in rows], dtype=int)
    is_mask = have_pixels([x.get("segmentation") for x in rows], sizes[image])
    counts = Counter(x["category_id"] for x, counted in zip(rows, is_mask) if counted)
    is_seen = np.array([counts[i] >= min_masks for i in names], dtype=bool)
    if not is_seen.any():
        most = ", ".join(f"{names[i]} {number}" for i, number in counts.most_common(5)) or "none"
        remedy = (
            f"no class has {min_masks} masks, DATASETS.MIN_MASKS_PER_CLASS (crowds and masks of a "
            f"model do not count; the most masks: {most}); lower the number, or name the classes"
        )
        report.add_to_file("error", "seen_classes", repr(AUTO), remedy)
        return None
    return is_seen


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
