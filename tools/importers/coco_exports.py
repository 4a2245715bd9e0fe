"""COCO jsons of other tools that need a change before training here: those of CVAT and LVIS."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from importers.imported_dataset import TURNED
from importers.input_files import InputError, check_declared_size, read_header, read_json

__all__ = ["check_images", "read_cvat", "read_lvis"]


def read_cvat(path: Path, keep_crowds: bool) -> tuple[dict, Counter]:
    """
    Take the mark of a crowd from masks that were drawn with the brush.

    CVAT's "COCO 1.0" marks every object that has a bitmap for a mask with "iscrowd" 1, and training
    leaves crowds out. Polygons, and boxes with ``segmentation`` ``[]``, are fine as they are.

    Args:
        path: of the json.
        keep_crowds: change nothing.

    Returns:
        The content, and what was changed -> how often.

    Raises:
        InputError: it is no COCO json.
    """
    data, notes = _read_coco(path), Counter()
    for annotation in data["annotations"]:
        is_bitmap = isinstance(annotation.get("segmentation"), dict)
        if annotation.get("iscrowd") == 1 and is_bitmap and not keep_crowds:
            annotation["iscrowd"] = 0
            notes["masks drawn with the brush are no longer marked as crowds"] += 1
    return data, notes


def read_lvis(path: Path) -> tuple[dict, Counter]:
    """
    Give the images of a json of LVIS a ``file_name``, such as train2017/000000391895.jpg.

    Args:
        path: of the json.

    Returns:
        The content, and what was changed -> how often.

    Raises:
        InputError: it is no json of LVIS.
    """
    data, notes = _read_coco(path), Counter()
    for image in data["images"]:
        if image.get("file_name"):
            continue
        parts = _parts_of(str(image.get("coco_url")))
        if len(parts) < 2:
            raise InputError(
                f"{path}: image {image.get('id')}: 'coco_url' is {image.get('coco_url')!r}, and "
                "there is no 'file_name'; allowed: an address that ends in folder and file."
            )
        image["file_name"] = "/".join(parts[-2:])
        notes["images have got a 'file_name' from their 'coco_url'"] += 1
    return data, notes


def check_images(path: Path, data: dict, image_root: Path, progress) -> Counter:
    """
    Compare the sizes in a COCO json with those of its images; those that are missing are left out.

    Args:
        path: of the json.
        data: its content.
        image_root: folder of the images.
        progress: wraps the list of images.

    Returns:
        What is to know -> how often.

    Raises:
        InputError: a size differs, or an image is broken.
    """
    notes: Counter[str] = Counter()
    for image in progress(data["images"]):
        name, where = image.get("file_name"), f"{path}: image {image.get('id')}"
        # What is no name, or names no file, the checks of the whole json tell.
        if not isinstance(name, str) or not (image_root / name).is_file():
            continue
        header = read_header(image_root / name, where)
        declared = (image.get("width"), image.get("height"))
        check_declared_size(header, declared, where, "'width' and 'height'")
        if header.is_turned:
            notes[TURNED] += 1
    return notes


def _parts_of(url: str) -> tuple[str, ...]:
    try:
        return PurePosixPath(urlsplit(url).path).parts
    except ValueError:  # such as a bracket without its other half
        return ()


def _read_coco(path: Path) -> dict:
    data = read_json(path)
    for key in ("images", "annotations", "categories"):
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(x, dict) for x in rows):
            raise InputError(f"{path}: a COCO json must have a list of dicts {key!r}.")
    return data
