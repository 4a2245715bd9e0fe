"""The jsons of LabelMe, one an image: polygons and masks are masks, rectangles are boxes alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from importers.imported_dataset import ImportedDataset
from importers.input_files import InputError, check_declared_size, read_header, read_json

__all__ = ["read_labelme"]

_NUM_POINTS = {"rectangle": (2, 4), "mask": (2,)}


def read_labelme(folder: Path, class_names: Sequence[str] | None, progress) -> ImportedDataset:
    """
    Args:
        folder: of the jsons; images are where ``imagePath`` says, relative to their json.
        class_names: in the order of their ids; None: the labels that occur, by the alphabet.
        progress: wraps the list of jsons.

    Raises:
        InputError: see its message.
    """
    contents = {}
    for path in progress(sorted(folder.rglob("*.json"))):
        contents[path] = _read_labels(path)
    if not contents:
        raise InputError(f"{folder}: there is no json in it.")
    if class_names is None:
        class_names = sorted(
            {x["label"] for content in contents.values() for x in content["shapes"]}
        )
    dataset = ImportedDataset(folder, dict(enumerate(class_names, start=1)))
    for path, content in contents.items():
        # LabelMe on Windows writes backslashes.
        image = path.parent / PurePosixPath(content["imagePath"].replace("\\", "/"))
        header = read_header(image, str(path))
        # LabelMe turns images by their EXIF, so this is the size of the turned one.
        declared = (content.get("imageWidth"), content.get("imageHeight"))
        check_declared_size(header, declared, str(path), "'imageWidth' and 'imageHeight'")
        dataset.add_image(header)
        for shapes in _objects(content["shapes"], dataset):
            _add_object(dataset, shapes, header.size)
    return dataset


def _read_labels(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise InputError(f"{path}: a json of LabelMe has a list 'shapes'.")
    if not isinstance(content.get("imagePath"), str):
        raise InputError(f"{path}: 'imagePath' is {content.get('imagePath')!r}; allowed: a path.")
    for number, shape in enumerate(content["shapes"]):
        _prepare(shape, f"{path}, shape {number}")
    return content


def _prepare(shape: object, where: str) -> None:
    """Check a shape, and add "where", and "shape_type" where it is missing."""
    if not isinstance(shape, dict):
        raise InputError(f"{where}: it is {str(shape)[:80]}; allowed: a dict with a 'label'.")
    label, group = shape.get("label"), shape.get("group_id")
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where}: 'label' is {str(label)[:80]!r}; allowed: the name of a class.")
    shape["where"] = f"{where} ({label})"
    if group is not None and not isinstance(group, (int, float, str)):
        raise InputError(
            f"{shape['where']}: 'group_id' is {str(group)[:80]}; allowed: a number, a text or null."
        )
    if shape.get("shape_type") is None:
        shape["shape_type"] = "polygon"  # as LabelMe itself takes it


def _objects(shapes: list[dict], dataset: ImportedDataset) -> list[list[dict]]:
    """The shapes of each object: those with one label and ``group_id`` are one."""
    objects: dict[tuple, list[dict]] = {}
    for number, shape in enumerate(shapes):
        kind = shape["shape_type"]
        if kind not in ("polygon", *_NUM_POINTS):
            dataset.notes[f"shapes of the kind {kind!r} were left out"] += 1
            continue
        group = shape.get("group_id")
        key = (shape["label"], group) if group is not None else number
        objects.setdefault(key, []).append(shape)
    return list(objects.values())


def _add_object(dataset: ImportedDataset, shapes: list[dict], size: tuple[int, int]) -> None:
    category_id = dataset.category_id(shapes[0]["label"], shapes[0]["where"])
    points = [_points_of(x) for x in shapes]
    kinds = [x["shape_type"] for x in shapes]
    polygons = [x.ravel().tolist() for x, kind in zip(points, kinds) if kind == "polygon"]
    masks = [_mask_of(x, size) for x, kind in zip(shapes, kinds) if kind == "mask"]
    if len(set(kinds)) > 1 or len(masks) > 1 or kinds.count("rectangle") > 1:
        raise InputError(
            f"{shapes[0]['where']}: the shapes of 'group_id' {shapes[0]['group_id']} are "
            f"{', '.join(kinds)}; allowed in a group, which is one object: polygons."
        )
    if masks:
        dataset.add_mask(category_id, masks[0])
    elif polygons:
        dataset.add_polygons(category_id, polygons)
    else:
        corners = np.concatenate([points[0].min(axis=0), points[0].max(axis=0)])
        dataset.add_box(category_id, corners.tolist())


def _points_of(shape: dict) -> np.ndarray:
    # float64, shape (n, 2)
    kind = shape["shape_type"]
    try:
        points = np.array(shape.get("points"), dtype=float)
    except (OverflowError, TypeError, ValueError):
        points = np.zeros(0)
    is_pairs = points.ndim == 2 and points.shape[1] == 2 and bool(np.isfinite(points).all())
    allowed = _NUM_POINTS.get(kind)
    if not is_pairs or (len(points) < 3 if allowed is None else len(points) not in allowed):
        needed = "at least 3" if allowed is None else " or ".join(map(str, allowed))
        raise InputError(
            f"{shape['where']}: 'points' is {str(shape.get('points'))[:80]}; a {kind} has {needed} "
            "pairs of finite numbers."
        )
    return points


def _mask_of(shape: dict, size: tuple[int, int]) -> np.ndarray:
    """Bool, shape (height, width) of the image; "mask" is a picture of the part between points."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as picture:
            part = np.array(picture.convert("L")) > 0
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise InputError(f"{shape['where']}: 'mask' is no picture in base64: {error}.") from error
    x, y = np.trunc(_points_of(shape).min(axis=0))
    height, width = part.shape
    if not (0 <= x <= size[0] - width and 0 <= y <= size[1] - height and part.any()):
        raise InputError(
            f"{shape['where']}: its mask of {width}x{height} pixels at ({x:g}, {y:g}) is empty, or "
            f"not inside the image of {size[0]}x{size[1]}."
        )
    mask = np.zeros(size[::-1], dtype=bool)
    mask[int(y) : int(y) + height, int(x) : int(x) + width] = part
    return mask
