"""
Annotations of other tools as the content of a COCO json in which any object may lack its mask.

An object without an outline stays one without a mask. Common converters make a rectangular mask of
its box, which would teach a model that objects are rectangles. What was changed or left out is
counted in the ``notes`` of the dataset. All raise InputError if a file is missing or broken; the
message names it, and the line or object and its value.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree  # nosec B405  # expat limits entities and reads none from files
from xml.etree.ElementTree import Element  # nosec B405  # As above.

import msgspec
import numpy as np
import yaml
from PIL import Image

from .coco_json import read_coco
from .errors import InputError
from .imported_dataset import (
    ImportedDataset,
    files_in,
    image_size,
    input_error,
    number_or_nan,
    paste_mask,
    read_text,
    to_outline,
)

__all__ = ["import_cvat", "import_labelme", "import_lvis", "import_voc", "import_yolo"]

# What Ultralytics takes for images, where Pillow reads them.
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
# Rounding may carry a coordinate this far out of [0, 1].
_TOLERANCE = 0.01


class _YoloSettings(msgspec.Struct):
    # Without quotes, yaml takes yes, no, on and off for truth values.
    names: list[str | int | float] | dict[int, str | int | float]


def import_yolo(data_yaml: str | os.PathLike, split: str = "train") -> ImportedDataset:
    """
    Read the labels of Ultralytics: a txt beside each image, with boxes and outlines mixed.

    Args:
        data_yaml: file with "names" and the splits.
        split: key of the yaml: "train", "val" or "test".
    """
    path = Path(data_yaml)
    settings, names = _read_yolo_settings(path, split)
    root = path.parent / str(settings.get("path") or "")
    if not root.is_dir():
        root = Path(settings["path"])  # from the current folder
    entries = settings[split] if isinstance(settings[split], list) else [settings[split]]
    # Exports of Roboflow begin with "../" too much; Ultralytics does the same.
    choices = [(root / str(x), root / str(x).removeprefix("../")) for x in entries]
    places = [given if given.exists() else other for given, other in choices]
    images = sorted(x for place in places for x in _yolo_images(place, root))
    if not any(_yolo_labels(image).is_file() for image in images):
        what = f"{len(images)} images of {split!r}, {', '.join(map(str, places))}"
        raise InputError(f"{path}: none of the {what}, has a txt with its labels.")
    common = Path(os.path.commonpath([x.parent.absolute() for x in images]))
    dataset = ImportedDataset.of_classes(names, common)
    for image in images:
        size = image_size(image, str(path))
        dataset.add_image(image, size)
        labels = _yolo_labels(image)
        if not labels.is_file():
            dataset.notes["images have no txt, and so no objects"] += 1
            continue
        for number, line in enumerate(read_text(labels).splitlines(), start=1):
            if line.strip():
                _add_yolo_line(dataset, line, f"{labels}, line {number}", size)
    folders = {_yolo_labels(x / "any.png").parent for x in places if x.is_dir()}
    found = {x for folder in folders for x in files_in(folder, (".txt",))}
    # Programs for labelling leave a list of the class names beside the labels.
    orphans = [x for x in found.difference(map(_yolo_labels, images)) if x.stem != "classes"]
    if orphans:
        note = f"txts with labels have no image and were left out, such as {min(orphans)}"
        dataset.notes[note] = len(orphans)
    return dataset


def _read_yolo_settings(path: Path, split: str) -> tuple[dict, dict[int, str]]:
    """The content of a data.yaml, and the class names by number."""
    try:
        settings = yaml.safe_load(read_text(path))
        names = msgspec.convert(settings, _YoloSettings).names
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}.") from error
    if not settings.get(split):
        raise input_error(path, repr(split), "missing", f"one of {', '.join(map(str, settings))}")
    if "kpt_shape" in settings:
        raise InputError(f"{path}: 'kpt_shape' says that the labels are keypoints, not outlines.")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    return settings, {i: str(name) for i, name in names.items()}


def _yolo_images(place: Path, root: Path) -> list[Path]:
    if place.is_dir():
        return list(files_in(place, _IMAGE_SUFFIXES))
    lines = filter(None, map(str.strip, read_text(place).splitlines()))
    # In such a list "./" is the folder of the list.
    return [(place.parent if line.startswith("./") else root) / line for line in lines]


def _yolo_labels(image: Path) -> Path:
    """The txt of an image: the last folder named images becomes labels, as in Ultralytics."""
    before, folder, after = f"/{image.as_posix()}".rpartition("/images/")
    path = f"{before}/labels/{after}"[1:] if folder else image
    return Path(path).with_suffix(".txt")


def _add_yolo_line(dataset: ImportedDataset, line: str, where: str, size: tuple[int, int]) -> None:
    class_index, *values = map(number_or_nan, line.split())
    numbers = [x["id"] for x in dataset.coco["categories"]]
    if class_index not in numbers:
        allowed = f"{', '.join(map(str, numbers))}, the numbers of 'names'"
        raise input_error(where, "the class", line.split()[0], allowed)
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{where}: {len(values)} numbers behind the class; allowed: 4 of a box, or x and y of "
            "at least 3 points of an outline. A confidence at the end must be taken out."
        )
    if not all(-_TOLERANCE <= x <= 1 + _TOLERANCE for x in values):  # nan fails, too
        allowed = "coordinates in [0, 1], fractions of the width and height of the image"
        raise input_error(where, "it", repr(line), allowed)
    points = np.reshape(values, (-1, 2)) * size
    if is_box:
        center, half = points[0], points[1] / 2
        dataset.add_object(int(class_index), boxes=[np.array([center - half, center + half])])
    else:
        dataset.add_object(int(class_index), polygons=[points])


_LABELME_KINDS = ("polygon", "rectangle", "mask")
# The first lines of LabelMe's own labels.txt; shapes of these names are no objects.
_LABELME_RESERVED = ("__ignore__", "_background_")


class _LabelMeShape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: int | float | str | None = None
    mask: str | None = None  # a picture in base64, of the part between the two points

    @property
    def kind(self) -> str:
        return self.shape_type or "polygon"  # as LabelMe itself takes it


class _LabelMeFile(msgspec.Struct):
    imagePath: str
    shapes: list[_LabelMeShape]
    imageWidth: int | None = None
    imageHeight: int | None = None


def import_labelme(
    folder: str | os.PathLike, class_names: Sequence[str] | None = None
) -> ImportedDataset:
    """
    Read the jsons of LabelMe, one an image: polygons and masks are masks, rectangles boxes alone.

    Args:
        folder: of the jsons; images are where ``imagePath`` says, relative to their json.
        class_names: in the order of their ids; None: the labels that occur, by the alphabet.
    """
    contents: dict[Path, _LabelMeFile] = {}
    for path in sorted(files_in(Path(folder), (".json",))):
        try:
            contents[path] = msgspec.json.decode(read_text(path), type=_LabelMeFile)
        except ValueError as error:
            raise InputError(f"{path}: {error}.") from error
    if not contents:
        raise InputError(f"{folder}: there is no json in it.")
    if class_names is None:
        class_names = sorted({x.label for content in contents.values() for x in content.shapes})
    class_names = [x for x in class_names if x not in _LABELME_RESERVED]
    dataset = ImportedDataset.of_classes(dict(enumerate(class_names, start=1)), Path(folder))
    for path, content in contents.items():
        # LabelMe on Windows writes backslashes.
        image = path.parent / PurePosixPath(content.imagePath.replace("\\", "/"))
        size = content.imageWidth, content.imageHeight
        size = size if all(size) else image_size(image, str(path))
        dataset.add_image(image, size)
        objects: dict[object, list[_LabelMeShape]] = {}
        for number, shape in enumerate(content.shapes):
            if shape.label in _LABELME_RESERVED:
                dataset.notes[f"shapes with the label {shape.label!r} were left out"] += 1
            elif shape.kind not in _LABELME_KINDS:
                dataset.notes[f"shapes of the kind {shape.kind!r} were left out"] += 1
            else:  # shapes of one label and group are one object
                key = number if shape.group_id is None else (shape.label, shape.group_id)
                objects.setdefault(key, []).append(shape)
        for shapes in objects.values():
            where = f"{path}, shape {content.shapes.index(shapes[0])} ({shapes[0].label})"
            polygons, boxes, masks = (
                [_read_labelme_shape(x, size, where) for x in shapes if x.kind == kind]
                for kind in _LABELME_KINDS
            )
            category_id = dataset.category_id(shapes[0].label, where)
            dataset.add_object(category_id, boxes, polygons, masks)
    return dataset


def _read_labelme_shape(shape: _LabelMeShape, size: tuple[int, int], where: str) -> np.ndarray:
    """The points of a polygon or of a box, or a mask of the whole image."""
    points = np.array(shape.points, dtype=float)
    if shape.kind == "polygon":
        return to_outline(shape.points, where)
    if len(points) < 2:
        raise input_error(where, "'points'", shape.points, f"two corners of a {shape.kind}")
    if shape.kind == "rectangle":
        return points
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape.mask))) as picture:
            part = np.array(picture.convert("L")) > 0
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, ...
    except Exception as error:
        raise InputError(f"{where}: 'mask' is no picture in base64: {error}.") from error
    left, top = np.trunc(points.min(axis=0))
    return paste_mask(part, left, top, size, where)


def import_voc(
    folder: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    zero_based: bool = False,
) -> ImportedDataset:
    """
    Read the xmls of Pascal VOC, one an image: boxes, and the outlines of <polygon> where there are.

    Args:
        folder: of the xmls.
        image_root: folder of the images; None: ``folder``.
        class_names: in the order of their ids; None: those that occur, by the alphabet.
        zero_based: whether 0 is the left border of the image. In VOC 1 is the first pixel, and
            xmax the last pixel that belongs to the object. Outlines are not of VOC: the programs
            that write them count from 0.
    """
    image_root = Path(folder if image_root is None else image_root)
    roots = {x: _read_xml(x) for x in sorted(files_in(Path(folder), (".xml",)))}
    if not roots:
        raise InputError(f"{folder}: there is no xml in it.")
    if class_names is None:
        found = {_text(x, "name") for root in roots.values() for x in root.findall("object")}
        class_names = sorted(found - {""})
    dataset = ImportedDataset.of_classes(dict(enumerate(class_names, start=1)), image_root)
    for path, root in roots.items():
        image = image_root / _text(root, "filename")
        declared = [number_or_nan(_text(root, f"size/{x}") or 0) for x in ("width", "height")]
        is_declared = all(x >= 1 for x in declared)
        size = tuple(map(int, declared)) if is_declared else image_size(image, str(path))
        dataset.add_image(image, size)
        if _text(root, "segmented") == "1" and root.find(".//polygon") is None:
            dataset.notes["images have masks in SegmentationObject, which is not read"] += 1
        for number, element in enumerate(root.findall("object")):
            where = f"{path}, object {number}"
            category_id = dataset.category_id(_text(element, "name"), where)
            outlines = [_voc_points(x) for x in element.findall("polygon")]
            polygons = [to_outline(points, where) for points in outlines if points]
            if polygons:
                dataset.add_object(category_id, polygons=polygons)
                continue
            texts = [_text(element, f"bndbox/{x}") for x in ("xmin", "ymin", "xmax", "ymax")]
            box = _read_corners(texts, where, "<bndbox>")
            dataset.add_object(category_id, boxes=[box if zero_based else box - [[1], [0]]])
    return dataset


def _read_xml(path: Path) -> Element:
    try:
        return ElementTree.parse(path).getroot()  # nosec B314  # As above.
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:
        raise InputError(f"{path}: no xml that can be read: {error}.") from error


def _text(element: Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _read_corners(texts: Sequence[str | None], where: str, field: str) -> np.ndarray:
    """Float64 [[left, top], [right, bottom]]."""
    x0, y0, x1, y1 = map(number_or_nan, texts)
    if not (x0 <= x1 and y0 <= y1):  # nan fails, too
        allowed = "left, top, right, bottom: finite numbers, the latter not below the former"
        raise input_error(where, field, texts, allowed)
    return np.array([[x0, y0], [x1, y1]])


def _voc_points(polygon: Element) -> list:
    # <x1>, <y1>, <x2>, <y2>, ..., or <pt> with <x> and <y>; else its text, which is no outline.
    numbers = sorted(int(x.tag[1:]) for x in polygon if re.fullmatch(r"x\d+", x.tag))
    numbered = [(polygon.findtext(f"x{i}"), polygon.findtext(f"y{i}")) for i in numbers]
    pairs = numbered or [(x.findtext("x"), x.findtext("y")) for x in polygon.findall("pt")]
    return pairs or "".join(polygon.itertext()).split()


def import_cvat(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> ImportedDataset:
    """
    Read what CVAT exports: "COCO 1.0" (a json) or "CVAT for images 1.1" (an xml).

    The json marks every object that has a bitmap for a mask with "iscrowd" 1, and training leaves
    crowds out; the mark is taken away. Turned boxes become the box around them.

    Args:
        path: of the json or xml.
        image_root: folder of the images, if it is known.
    """
    image_root = image_root and Path(image_root)
    if str(path).lower().endswith(".xml"):
        return _import_cvat_xml(Path(path), image_root)
    dataset = ImportedDataset(read_coco(path), image_root)
    sizes = {x["id"]: (x["width"], x["height"]) for x in dataset.coco["images"]}
    for annotation in dataset.coco["annotations"]:
        segmentation = annotation.get("segmentation")
        if annotation.get("iscrowd") == 1 and isinstance(segmentation, dict):
            annotation["iscrowd"] = 0
            dataset.notes["masks drawn with the brush are no longer marked as crowds"] += 1
        rotation = number_or_nan((annotation.get("attributes") or {}).get("rotation", 0))
        size = sizes.get(annotation["image_id"])
        if not segmentation and rotation % 360 > 0 and size:
            x, y, w, h = annotation["bbox"]
            corners = np.array([[x, y], [x + w, y + h]])
            low, high = _box_around(corners, rotation, dataset.notes).clip(0, size)
            sides = high - low
            annotation.update(bbox=[*low.tolist(), *sides.tolist()], area=float(sides.prod()))
    return dataset


def _import_cvat_xml(path: Path, image_root: Path | None) -> ImportedDataset:
    root = _read_xml(path)
    if root.find("track") is not None:
        raise InputError(
            f"{path}: it has the tracks of a video; export the task as 'COCO 1.0', which has the "
            "objects of each frame."
        )
    # A part of a skeleton names its <parent>.
    labels = [x for x in root.iterfind("meta//labels/label") if x.find("parent") is None]
    names = [_text(x, "name") for x in labels]
    dataset = ImportedDataset.of_classes(dict(enumerate(names, start=1)), image_root)
    for image in root.findall("image"):
        name, declared = image.get("name", ""), (image.get("width"), image.get("height"))
        where = f"{path}: image {name!r}"
        if not all(number_or_nan(x) >= 1 for x in declared):
            raise input_error(where, "its size", declared, "'width' and 'height' in pixels")
        size = tuple(int(float(x)) for x in declared)
        dataset.add_image(name if image_root is None else image_root / name, size)
        objects: dict[object, list[Element]] = {}
        for number, shape in enumerate(image):
            if shape.tag not in ("box", "polygon", "mask"):
                dataset.notes[f"shapes of the kind {shape.tag!r} were left out"] += 1
                continue
            # Shapes of one label and group are one object, such as the parts beside an occluder.
            group = shape.get("group_id", "0")
            key = number if group == "0" else (shape.get("label"), group)
            objects.setdefault(key, []).append(shape)
        for number, shapes in enumerate(objects.values()):
            here = f"{where}, object {number}"
            category_id = dataset.category_id(shapes[0].get("label", "").strip(), here)
            boxes = []
            for shape in filter(lambda x: x.tag == "box", shapes):
                texts = [shape.get(x) for x in ("xtl", "ytl", "xbr", "ybr")]
                rotation = number_or_nan(shape.get("rotation", "0"))
                corners = _read_corners(texts, here, "the box")
                boxes.append(_box_around(corners, rotation, dataset.notes))
            outlines = [re.split("[,;]", x.get("points", "")) for x in shapes if x.tag == "polygon"]
            polygons = [to_outline(x, here) for x in outlines]
            masks = [_read_cvat_mask(x, size, here) for x in shapes if x.tag == "mask"]
            dataset.add_object(category_id, boxes, polygons, masks)
    return dataset


def _box_around(corners: np.ndarray, degrees: float, notes: Counter) -> np.ndarray:
    """The upright box around one, [[left, top], [right, bottom]], turned about its middle."""
    if not degrees % 360 > 0:  # nan, too
        return corners
    cosine, sine = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half = np.array([[cosine, sine], [sine, cosine]]) @ (corners[1] - corners[0]) / 2
    middle = corners.mean(axis=0)
    notes["turned boxes have become the upright boxes around them"] += 1
    return np.round([middle - half, middle + half], 6)


def _read_cvat_mask(shape: Element, size: tuple[int, int], where: str) -> np.ndarray:
    # "rle" are lengths of runs, background first, by the rows of a part of the image.
    texts = [shape.get(x, "") for x in ("left", "top", "width", "height")]
    texts += shape.get("rle", "").split(",")
    try:
        left, top, width, height, *runs = map(int, texts)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    except ValueError as error:
        allowed = "left, top, width, height and the lengths of runs"
        raise input_error(where, "the mask", ", ".join(texts), allowed) from error
    return paste_mask(part, left, top, size, where)


def import_lvis(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> ImportedDataset:
    """
    Read a json of LVIS, and give its images a ``file_name``, such as train2017/000000391895.jpg.

    Args:
        path: of the json.
        image_root: folder of the images, if it is known.
    """
    dataset = ImportedDataset(read_coco(path), image_root and Path(image_root))
    for image in dataset.coco["images"]:
        if not image.get("file_name"):
            parts = str(image.get("coco_url")).split("/")
            if len(parts) < 2:
                where = f"{path}: image {image['id']} has no 'file_name'"
                url = repr(image.get("coco_url"))
                raise input_error(where, "'coco_url'", url, "one that ends in folder and file")
            image["file_name"] = "/".join(parts[-2:])
            dataset.notes["images have got a 'file_name' from their 'coco_url'"] += 1
    return dataset
