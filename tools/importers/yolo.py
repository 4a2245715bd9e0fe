"""
The labels of Ultralytics: a txt beside each image, with boxes and polygons mixed.

Libraries that read these files make a rectangular mask of each box as soon as one object of the
image has a polygon; here an object without an outline stays one without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import yaml

from importers.imported_dataset import ImportedDataset, InputError, image_size, read_text

__all__ = ["read_yolo"]

# What Ultralytics takes for images, where Pillow reads them.
_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
# Rounding may carry a coordinate this far out of [0, 1].
_TOLERANCE = 0.01


def read_yolo(path: Path, split: str, progress) -> ImportedDataset:
    """
    Args:
        path: of the data.yaml.
        split: its key: "train", "val" or "test".
        progress: wraps the list of images.

    Raises:
        InputError: see its message.
    """
    settings = _read_settings(path, split)
    images = sorted(_images_of(path, _root_of(path, settings), settings[split], split))
    if not any(_labels_of(image).is_file() for image in images):
        raise InputError(
            f"{path}: none of the {len(images)} images of {split!r} has a txt with its labels"
            + (f"; the first would be {_labels_of(images[0])}." if images else ".")
        )
    dataset = ImportedDataset(_common_folder(images), _class_names(path, settings))
    for image in progress(images):
        size, labels = image_size(image, str(path)), _labels_of(image)
        dataset.add_image(image, size)
        if labels.is_file():
            _read_labels(dataset, labels, size)
        else:
            dataset.notes["images have no txt, and so no objects"] += 1
    return dataset


def _read_settings(path: Path, split: str) -> dict:
    try:
        settings = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: cannot be read as yaml: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must have keys and values, such as 'names' and {split!r}.")
    if not settings.get(split):
        raise InputError(f"{path}: there is no {split!r}; it has: {', '.join(map(str, settings))}.")
    if "kpt_shape" in settings:
        raise InputError(f"{path}: 'kpt_shape' says that the labels are keypoints, not outlines.")
    return settings


def _class_names(path: Path, settings: dict) -> dict[int, str]:
    names = settings.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or any(type(i) is not int for i in names):
        raise InputError(
            f"{path}: 'names' is {str(names)[:80]}; allowed: a list of class names, or a dict of "
            "whole numbers and names."
        )
    return {i: str(name) for i, name in names.items()}


def _root_of(path: Path, settings: dict) -> Path:
    """The folder that the splits are relative to: "path", from the yaml or from where we are."""
    name = str(settings.get("path") or "")
    for root in (path.parent / name, Path(name)):
        if root.is_dir():
            return root
    raise InputError(
        f"{path}: 'path' is {name!r}, but there is no such folder, neither from the yaml nor from "
        "the current folder."
    )


def _images_of(path: Path, root: Path, entries: object, split: str) -> Iterator[Path]:
    # Entries are folders, or lists of files.
    for entry in entries if isinstance(entries, list) else [entries]:
        place = root / str(entry)
        if not place.exists() and str(entry).startswith("../"):
            place = root / str(entry)[3:]  # as in exports of Roboflow; Ultralytics does the same
        if place.is_dir():
            found = [x for x in place.rglob("*") if x.suffix.lower() in _SUFFIXES]
            if not found:
                raise InputError(f"{path}: {split!r} names {place}, a folder without images.")
            yield from found
        elif place.suffix == ".txt":
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            # In such a list "./" is the folder of the list.
            yield from (place.parent / x if x.startswith("./") else root / x for x in lines)
        else:
            raise InputError(f"{path}: {split!r} names {place}, which is no folder and no txt.")


def _common_folder(images: list[Path]) -> Path:
    folders = [x.parent for x in images]
    common = folders[0]
    while any(common not in (folder, *folder.parents) for folder in folders):
        common = common.parent
    return common


def _labels_of(image: Path) -> Path:
    """The last folder named images becomes labels, as in Ultralytics."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(dataset: ImportedDataset, labels: Path, size: tuple[int, int]) -> None:
    for number, line in enumerate(read_text(labels).splitlines(), start=1):
        if line.strip():
            _read_line(dataset, line, f"{labels}, line {number}", size)


def _read_line(dataset: ImportedDataset, line: str, where: str, size: tuple[int, int]) -> None:
    try:
        class_index, *values = map(float, line.split())
    except ValueError as error:
        raise InputError(f"{where}: {line[:80]!r} are not all numbers.") from error
    category_id = int(class_index) if class_index.is_integer() else -1
    if category_id not in dataset.class_names:
        raise InputError(
            f"{where}: the class is {class_index:g}; allowed: {_ranges(dataset.class_names)}, the "
            "numbers of 'names'."
        )
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{where}: {len(values)} numbers behind the class; allowed: 4 of a box (center x, "
            "center y, width, height), or x and y of at least 3 points of an outline. A confidence "
            "at the end must be taken out."
        )
    if not all(-_TOLERANCE <= x <= 1 + _TOLERANCE and math.isfinite(x) for x in values):
        raise InputError(
            f"{where}: {line[:80]!r} has a coordinate outside [0, 1]; they are fractions of the "
            "width and height of the image."
        )
    width, height = size
    if is_box:
        x, y, w, h = (v * s for v, s in zip(values, (width, height) * 2))
        dataset.add_box(category_id, [x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    else:
        scale = (width, height) * (len(values) // 2)
        dataset.add_polygons(category_id, [[v * s for v, s in zip(values, scale)]])


def _ranges(numbers: dict[int, str]) -> str:
    is_range = sorted(numbers) == list(range(len(numbers)))
    return f"0 to {len(numbers) - 1}" if is_range else ", ".join(map(str, sorted(numbers)))
