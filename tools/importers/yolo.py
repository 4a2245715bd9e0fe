"""
The labels of Ultralytics: a txt beside each image, with boxes and polygons mixed.

Libraries that read these files make a rectangular mask of each box as soon as one object of the
image has a polygon; here an object without an outline stays one without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from importers.imported_dataset import ImportedDataset
from importers.input_files import InputError, check_different, read_header, read_text

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
    root = _root_of(path, settings)
    places = list(_places_of(path, root, settings[split], split))
    images = sorted(x for place in places for x in _images_of(place, root))
    if not any(_labels_of(image).is_file() for image in images):
        raise InputError(
            f"{path}: none of the {len(images)} images of {split!r} has a txt with its labels"
            + (f"; the first would be {_labels_of(images[0])}." if images else ".")
        )
    dataset = ImportedDataset(_common_folder(images), _class_names(path, settings))
    for image in progress(images):
        header, labels = read_header(image, str(path)), _labels_of(image)
        dataset.add_image(header)
        if labels.is_file():
            _read_labels(dataset, labels, header.size)
        else:
            dataset.notes["images have no txt, and so no objects"] += 1
    _note_orphans(dataset, places, images)
    return dataset


def _read_settings(path: Path, split: str) -> dict:
    try:
        settings = yaml.safe_load(read_text(path))
    # The reader of dates and numbers raises ValueError.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # It says so in several lines.
        raise InputError(
            f"{path}: cannot be read as yaml: {' '.join(str(error).split())}."
        ) from error
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
    for i, name in names.items():
        if not _is_name(name):
            raise InputError(
                f"{path}: 'names' has {str(name)[:80]!r} for class {i}; allowed: a name, in quotes "
                "if it is a word that yaml has a meaning for."
            )
    if settings.get("nc") not in (None, len(names)):
        raise InputError(
            f"{path}: 'nc' is {settings['nc']!r}, but 'names' has {len(names)} classes; allowed: "
            "the number of the names."
        )
    check_different([str(name) for name in names.values()], str(path))
    return {i: str(name) for i, name in names.items()}


def _is_name(value: object) -> bool:
    # Without quotes, yaml takes yes, no, on and off for truth values, and ~ for nothing.
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return is_text and bool(str(value).strip())


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


def _places_of(path: Path, root: Path, entries: object, split: str) -> Iterator[Path]:
    """What the split names: folders with images, and txts with lists of images."""
    for entry in entries if isinstance(entries, list) else [entries]:
        place = root / str(entry)
        if not place.exists() and str(entry).startswith("../"):
            place = root / str(entry)[3:]  # as in exports of Roboflow; Ultralytics does the same
        if place.is_dir():
            if not any(_images_in(place)):
                raise InputError(f"{path}: {split!r} names {place}, a folder without images.")
        elif place.suffix != ".txt":
            raise InputError(f"{path}: {split!r} names {place}, which is no folder and no txt.")
        yield place


def _images_of(place: Path, root: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from _images_in(place)
        return
    for line in read_text(place).splitlines():
        name = line.strip()
        if name:
            # In such a list "./" is the folder of the list.
            yield (place.parent if name.startswith("./") else root) / name


def _images_in(folder: Path) -> Iterator[Path]:
    return (x for x in folder.rglob("*") if x.suffix.lower() in _SUFFIXES)


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


def _note_orphans(dataset: ImportedDataset, places: Iterable[Path], images: list[Path]) -> None:
    """Count the txts whose image is not there; it need not be in the split to be there."""
    folders = {x for x in places if x.is_dir()} | {x.parent for x in images}
    found, known = set(), {_labels_of(x) for x in images}
    for folder in folders:
        if not folders.isdisjoint(folder.parents):
            continue  # seen with the folder that it is in
        found.update(_labels_of(folder / "any.txt").parent.rglob("*.txt"))
        known.update(map(_labels_of, _images_in(folder)))
    # Programs for labelling leave a list of the class names beside the labels.
    orphans = [x for x in found.difference(known, places) if x.name != "classes.txt"]
    if orphans:
        note = f"txts with labels have no image and were left out, such as {min(orphans)}"
        dataset.notes[note] = len(orphans)


def _read_labels(dataset: ImportedDataset, labels: Path, size: tuple[int, int]) -> None:
    for number, line in enumerate(read_text(labels).splitlines(), start=1):
        if line.strip():
            _read_line(dataset, line, f"{labels}, line {number}", size)


def _read_line(dataset: ImportedDataset, line: str, where: str, size: tuple[int, int]) -> None:
    try:
        class_index, *values = map(float, line.split())
    except ValueError as error:
        raise InputError(f"{where}: {line[:80]!r} are not all numbers.") from error
    category_id = int(class_index) if class_index.is_integer() else None
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
