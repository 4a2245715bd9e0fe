"""
Annotations of other tools as the content of a COCO json in which any object may lack its mask.

An object without an outline stays one without a mask. Common converters make a rectangular mask of
its box, which would teach a model that objects are rectangles.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element  # nosec B405  # A type; read_xml does the reading.

import msgspec
import numpy as np
import pycocotools.mask as mask_util
import yaml
from PIL import Image

from .errors import InputError
from .imported_dataset import (
    ImportedDataset,
    box_around,
    check_different,
    files_in,
    image_size,
    input_error,
    number_or_nan,
    paste_mask,
    read_coco_lists,
    read_json,
    read_text,
    read_xml,
    show_progress,
    to_outline,
    xml_text,
)

__all__ = ["import_cvat", "import_labelme", "import_lvis", "import_voc", "import_yolo"]

# With a character that is not blank.
_Name = Annotated[str, msgspec.Meta(pattern=r"\S")]

# What Ultralytics takes for images, where Pillow reads them.
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
# Rounding may carry a coordinate this far out of [0, 1].
_TOLERANCE = 0.01


class _YoloSettings(msgspec.Struct):
    # Without quotes, yaml takes yes, no, on and off for truth values, and ~ for nothing.
    names: list[_Name | int | float] | dict[int, _Name | int | float]


def import_yolo(data_yaml: str | os.PathLike, split: str = "train") -> ImportedDataset:
    """
    Read the labels of Ultralytics: a txt beside each image, with boxes and outlines mixed.

    Args:
        data_yaml: file with "names" and the splits.
        split: key of the yaml: "train", "val" or "test".

    Raises:
        InputError: a file is missing or broken; the message names it, the line and the value.
    """
    path = Path(data_yaml)
    settings, names = _read_yolo_settings(path, split)
    folder = str(settings.get("path") or "")
    root = next((x for x in (path.parent / folder, Path(folder)) if x.is_dir()), None)
    if root is None:
        raise input_error(path, "'path'", folder, "a folder, from the yaml or the current folder")
    places = list(_yolo_places(path, root, settings[split], split))
    images = sorted(x for place in places for x in _yolo_images(place, root))
    if not any(_yolo_labels(image).is_file() for image in images):
        raise InputError(
            f"{path}: none of the {len(images)} images of {split!r} has a txt with its labels, "
            f"such as {', '.join(map(str, map(_yolo_labels, images[:1])))}."
        )
    common = Path(os.path.commonpath([x.parent.absolute() for x in images]))
    dataset = ImportedDataset(names, common)
    for image in show_progress(images):
        size = image_size(image, str(path), dataset.notes)
        dataset.add_image(image, size)
        labels = _yolo_labels(image)
        if not labels.is_file():
            dataset.notes["images have no txt, and so no objects"] += 1
            continue
        for number, line in enumerate(read_text(labels).splitlines(), start=1):
            if line.strip():
                _add_yolo_line(dataset, names, line, f"{labels}, line {number}", size)
    _note_orphans(dataset, places, images)
    return dataset


def _read_yolo_settings(path: Path, split: str) -> tuple[dict, dict[int, str]]:
    """The content of a data.yaml, and the class names by number."""
    try:
        settings = yaml.safe_load(read_text(path))
        names = msgspec.convert(settings, _YoloSettings).names
    # The readers of dates and numbers raise ValueError; yaml takes several lines to say what it is.
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}.") from error
    names = dict(enumerate(names)) if isinstance(names, list) else names
    names = {i: str(name) for i, name in names.items()}
    check_different(list(names.values()), str(path))
    if not settings.get(split):
        raise input_error(path, repr(split), "missing", f"one of {', '.join(map(str, settings))}")
    if settings.get("nc") not in (None, len(names)):
        raise input_error(path, "'nc'", settings["nc"], f"{len(names)}, as 'names' has")
    if "kpt_shape" in settings:
        raise InputError(f"{path}: 'kpt_shape' says that the labels are keypoints, not outlines.")
    return settings, names


def _yolo_places(path: Path, root: Path, entries: object, split: str) -> Iterator[Path]:
    """What the split names: folders with images, and txts with lists of images."""
    for entry in entries if isinstance(entries, list) else [entries]:
        place = root / str(entry)
        if not place.exists() and str(entry).startswith("../"):
            place = root / str(entry)[3:]  # as in exports of Roboflow; Ultralytics does the same
        if place.is_dir():
            if next(files_in(place, _IMAGE_SUFFIXES), None) is None:
                raise input_error(path, repr(split), place, "a folder with images")
        elif place.suffix != ".txt":
            raise input_error(path, repr(split), place, "a folder that exists, or a txt")
        yield place


def _yolo_images(place: Path, root: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from files_in(place, _IMAGE_SUFFIXES)
        return
    for line in filter(None, map(str.strip, read_text(place).splitlines())):
        # In such a list "./" is the folder of the list.
        yield (place.parent if line.startswith("./") else root) / line


def _yolo_labels(image: Path) -> Path:
    """The txt of an image: the last folder named images becomes labels, as in Ultralytics."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _add_yolo_line(
    dataset: ImportedDataset, names: dict[int, str], line: str, where: str, size: tuple[int, int]
) -> None:
    class_index, *values = map(number_or_nan, line.split())
    if class_index not in names:
        allowed = f"{', '.join(map(str, sorted(names)))}, the numbers of 'names'"
        raise input_error(where, "the class", line.split()[0], allowed)
    is_box = len(values) == 4
    if not is_box and (len(values) < 6 or len(values) % 2):
        raise InputError(
            f"{where}: {len(values)} numbers behind the class; allowed: 4 of a box (center x, "
            "center y, width, height), or x and y of at least 3 points of an outline. A confidence "
            "at the end must be taken out."
        )
    if not all(-_TOLERANCE <= x <= 1 + _TOLERANCE for x in values):  # nan fails, too
        allowed = "coordinates in [0, 1], fractions of the width and height of the image"
        raise input_error(where, "it", repr(line), allowed)
    points = np.reshape(values, (-1, 2)) * size
    if is_box:
        center, sides = points
        dataset.add_box(int(class_index), [*(center - sides / 2), *(center + sides / 2)])
    else:
        dataset.add_polygons(int(class_index), [points])


def _note_orphans(dataset: ImportedDataset, places: list[Path], images: list[Path]) -> None:
    """Count the txts whose image is not there; it need not be in the split to be there."""
    folders = {x for x in places if x.is_dir()} | {x.parent for x in images}
    found, known = set(), {_yolo_labels(x) for x in images}
    for folder in folders:
        if folders.isdisjoint(folder.parents):  # else seen with the folder that it is in
            found.update(files_in(_yolo_labels(folder / "any.txt").parent, (".txt",)))
            known.update(map(_yolo_labels, files_in(folder, _IMAGE_SUFFIXES)))
    # Programs for labelling leave a list of the class names beside the labels.
    orphans = [x for x in found.difference(known, places) if x.name != "classes.txt"]
    if orphans:
        note = f"txts with labels have no image and were left out, such as {min(orphans)}"
        dataset.notes[note] = len(orphans)


# Kind of a shape -> how many points it has; None: 3 or more.
_LABELME_KINDS = {"polygon": None, "rectangle": (2, 4), "mask": (2,)}
# The first lines of LabelMe's own labels.txt; shapes of these names are no objects.
_LABELME_RESERVED = ("__ignore__", "_background_")


class _LabelMeShape(msgspec.Struct):
    label: _Name
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
    imageWidth: object = 0
    imageHeight: object = 0


def import_labelme(
    folder: str | os.PathLike, class_names: Sequence[str] | None = None
) -> ImportedDataset:
    """
    Read the jsons of LabelMe, one an image: polygons and masks are masks, rectangles boxes alone.

    Args:
        folder: of the jsons; images are where ``imagePath`` says, relative to their json.
        class_names: in the order of their ids; None: the labels that occur, by the alphabet.

    Raises:
        InputError: a file is missing or broken; the message names it, the shape and the value.
    """
    folder = Path(folder)
    paths = sorted(files_in(folder, (".json",)))
    contents = {x: read_json(x, _LabelMeFile) for x in show_progress(paths)}
    if not contents:
        raise InputError(f"{folder}: there is no json in it.")
    if class_names is None:
        class_names = sorted({x.label for content in contents.values() for x in content.shapes})
    class_names = [x for x in class_names if x not in _LABELME_RESERVED]
    dataset = ImportedDataset(dict(enumerate(class_names, start=1)), folder)
    for path, content in contents.items():
        # LabelMe on Windows writes backslashes.
        image = path.parent / PurePosixPath(content.imagePath.replace("\\", "/"))
        # LabelMe turns images by their EXIF, so this is the size of the turned one.
        declared = (content.imageWidth, content.imageHeight)
        fields = "'imageWidth' and 'imageHeight'"
        size = image_size(image, str(path), dataset.notes, declared, fields)
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
            _add_labelme_object(dataset, shapes, size, where)
    return dataset


def _add_labelme_object(
    dataset: ImportedDataset, shapes: list[_LabelMeShape], size: tuple[int, int], where: str
) -> None:
    category_id = dataset.category_id(shapes[0].label, where)
    kind, points = shapes[0].kind, [np.array(x.points, dtype=float) for x in shapes]
    if len(shapes) > 1 and {x.kind for x in shapes} != {"polygon"}:
        kinds = ", ".join(x.kind for x in shapes)
        allowed = "polygons in a group, which is one object"
        raise input_error(where, f"'group_id' {shapes[0].group_id}", kinds, allowed)
    allowed = _LABELME_KINDS[kind]
    for x in points:
        if len(x) < 3 if allowed is None else len(x) not in allowed:
            needed = "at least 3" if allowed is None else " or ".join(map(str, allowed))
            raise input_error(where, "'points'", x.tolist(), f"{needed} points of a {kind}")
    if kind == "polygon":
        dataset.add_polygons(category_id, points)
    elif kind == "rectangle":
        dataset.add_box(category_id, [*points[0].min(axis=0), *points[0].max(axis=0)])
    else:
        try:
            content = io.BytesIO(base64.b64decode(shapes[0].mask, validate=True))
            with Image.open(content) as picture:
                part = np.array(picture.convert("L")) > 0
        # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, ...
        except Exception as error:
            raise InputError(f"{where}: 'mask' is no picture in base64: {error}.") from error
        left, top = np.trunc(points[0].min(axis=0))
        dataset.add_mask(category_id, paste_mask(part, left, top, size, where))


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

    Raises:
        InputError: a file is missing or broken; the message names it, the object and the value.
    """
    folder = Path(folder)
    image_root = folder if image_root is None else Path(image_root)
    roots = {x: read_xml(x) for x in show_progress(sorted(files_in(folder, (".xml",))))}
    if not roots:
        raise InputError(f"{folder}: there is no xml in it.")
    if class_names is None:
        objects = [(x, path) for path, root in roots.items() for x in root.iter("object")]
        class_names = sorted({xml_text(x, "name", path) for x, path in objects})
    dataset = ImportedDataset(dict(enumerate(class_names, start=1)), image_root)
    for path, root in roots.items():
        image = image_root / xml_text(root, "filename", path)
        # Programs differ in whether they turn images by their EXIF; the size tells.
        declared = [(root.findtext(f"size/{x}") or "").strip() for x in ("width", "height")]
        size = image_size(image, str(path), dataset.notes, declared, "<size>")
        dataset.add_image(image, size)
        if (root.findtext("segmented") or "").strip() == "1" and root.find(".//polygon") is None:
            dataset.notes["images have masks in SegmentationObject, which is not read"] += 1
        for number, element in enumerate(root.findall("object")):
            where = f"{path}, object {number}"
            category_id = dataset.category_id(xml_text(element, "name", path), where)
            outlines = map(_voc_points, element.findall("polygon"))
            polygons = [to_outline(points, where) for points in outlines if points]
            if polygons:
                dataset.add_polygons(category_id, polygons)
            else:
                dataset.add_box(category_id, _voc_corners(element, where, zero_based))
            if (element.findtext("difficult") or "").strip() == "1":
                dataset.notes["objects are marked as difficult; they are kept"] += 1
    return dataset


def _voc_corners(element: Element, where: str, zero_based: bool) -> list[float]:
    texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    x0, y0, x1, y1 = map(number_or_nan, texts)
    if not (x0 <= x1 and y0 <= y1):  # nan fails, too
        allowed = "xmin, ymin, xmax, ymax: finite numbers, the maxima not below the minima"
        raise input_error(where, "<bndbox>", texts, allowed)
    first = 0 if zero_based else 1
    return [x0 - first, y0 - first, x1, y1]


def _voc_points(polygon: Element) -> list:
    # <x1>, <y1>, <x2>, <y2>, ..., or <pt> with <x> and <y>; else its text, which is no outline.
    numbers = sorted(int(x.tag[1:]) for x in polygon if re.fullmatch(r"x\d+", x.tag))
    numbered = [(polygon.findtext(f"x{i}"), polygon.findtext(f"y{i}")) for i in numbers]
    pairs = numbered or [(x.findtext("x"), x.findtext("y")) for x in polygon.findall("pt")]
    return pairs or "".join(polygon.itertext()).split()


def import_cvat(
    path: str | os.PathLike,
    image_root: str | os.PathLike | None = None,
    keep_crowds: bool = False,
) -> ImportedDataset:
    """
    Read what CVAT exports: "COCO 1.0" (a json) or "CVAT for images 1.1" (an xml).

    The json marks every object that has a bitmap for a mask with "iscrowd" 1, and training leaves
    crowds out; the mark is taken away. Turned boxes become the box around them.

    Args:
        path: of the json or xml.
        image_root: folder of the images; None: the sizes are not compared.
        keep_crowds: leave the marks in a json.

    Raises:
        InputError: a file is missing or broken, or has the tracks of a video.
    """
    path = Path(path)
    if path.suffix.lower() == ".xml":
        return _import_cvat_xml(path, image_root)
    dataset = ImportedDataset.from_coco(read_coco_lists(path), image_root)
    images = [x for x in dataset.coco["images"] if isinstance(x.get("id"), int)]
    sizes = {x["id"]: (x.get("width"), x.get("height")) for x in images}
    for annotation in dataset.coco["annotations"]:
        segmentation, attributes = annotation.get("segmentation"), annotation.get("attributes")
        if annotation.get("iscrowd") == 1 and isinstance(segmentation, dict) and not keep_crowds:
            annotation["iscrowd"] = 0
            dataset.notes["masks drawn with the brush are no longer marked as crowds"] += 1
        rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
        if not segmentation and number_or_nan(rotation) % 360 > 0:
            try:
                x, y, w, h = map(float, annotation["bbox"])
                width, height = map(float, sizes[annotation["image_id"]])
            except (KeyError, TypeError, ValueError):
                continue  # the checks of the whole json name it
            corners = box_around([x, y, x + w, y + h], float(rotation), dataset.notes)
            x0, y0, x1, y1 = np.clip(corners, 0, [width, height] * 2).tolist()
            annotation.update(bbox=[x0, y0, x1 - x0, y1 - y0], area=(x1 - x0) * (y1 - y0))
    dataset.check_image_sizes(path)
    return dataset


def _import_cvat_xml(path: Path, image_root: str | os.PathLike | None) -> ImportedDataset:
    root = read_xml(path)
    if root.find("track") is not None:
        raise InputError(
            f"{path}: it has the tracks of a video; export the task as 'COCO 1.0', which has the "
            "objects of each frame."
        )
    images = root.findall("image")
    # A part of a skeleton names its <parent>.
    labels = [x for x in root.iterfind("meta//labels/label") if x.find("parent") is None]
    names = [(x.findtext("name") or "").strip() for x in labels]
    if not names:
        names = sorted({x.get("label", "") for image in images for x in image})
    dataset = ImportedDataset(dict(enumerate(names, start=1)), image_root)
    for image in images:
        name, declared = image.get("name", ""), (image.get("width"), image.get("height"))
        where = f"{path}: image {name!r}"
        if not all(number_or_nan(x) >= 1 for x in declared):
            raise input_error(where, "its size", declared, "'width' and 'height' in pixels")
        size = tuple(int(float(x)) for x in declared)
        dataset.add_image(name if image_root is None else Path(image_root, name), size)
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
            _add_cvat_object(dataset, shapes, size, f"{where}, object {number}")
    dataset.check_image_sizes(path)
    return dataset


def _add_cvat_object(
    dataset: ImportedDataset, shapes: list[Element], size: tuple[int, int], where: str
) -> None:
    category_id = dataset.category_id((shapes[0].get("label") or "").strip(), where)
    boxes = [_cvat_box(x, where, dataset.notes) for x in shapes if x.tag == "box"]
    outlines = [x.get("points", "").split(";") for x in shapes if x.tag == "polygon"]
    polygons = [to_outline([pair.split(",") for pair in x], where) for x in outlines]
    masks = [_cvat_mask(x, size, where) for x in shapes if x.tag == "mask"]
    if (polygons or masks) and boxes:
        dataset.notes["boxes are in a group with an outline, which counts alone"] += len(boxes)
    if masks:
        for points in polygons:
            rle = mask_util.frPyObjects([points.ravel().tolist()], size[1], size[0])[0]
            masks.append(mask_util.decode(rle).astype(bool))
        dataset.add_mask(category_id, np.any(masks, axis=0))
    elif polygons:
        dataset.add_polygons(category_id, polygons)
    else:
        corners = np.array(boxes)
        dataset.add_box(category_id, [*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0)])


def _cvat_box(shape: Element, where: str, notes: Counter) -> list[float]:
    texts = [shape.get(x) for x in ("xtl", "ytl", "xbr", "ybr")]
    x0, y0, x1, y1 = corners = list(map(number_or_nan, texts))
    if not (x0 <= x1 and y0 <= y1):  # nan fails, too
        allowed = "xtl, ytl, xbr, ybr: finite numbers, the latter not below the former"
        raise input_error(where, "the box", texts, allowed)
    rotation = number_or_nan(shape.get("rotation", "0"))
    return box_around(corners, rotation, notes) if rotation % 360 > 0 else corners


def _cvat_mask(shape: Element, size: tuple[int, int], where: str) -> np.ndarray:
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
        image_root: folder of the images; None: the sizes are not compared.

    Raises:
        InputError: it is no json of LVIS, or an image is of another size.
    """
    path = Path(path)
    dataset = ImportedDataset.from_coco(read_coco_lists(path), image_root)
    for image in dataset.coco["images"]:
        if image.get("file_name"):
            continue
        url = image.get("coco_url")
        try:
            parts = PurePosixPath(urlsplit(str(url)).path).parts
        except ValueError:  # such as a bracket without its other half
            parts = ()
        if len(parts) < 2:
            where = f"{path}: image {image.get('id')} has no 'file_name'"
            raise input_error(where, "'coco_url'", repr(url), "one that ends in folder and file")
        image["file_name"] = "/".join(parts[-2:])
        dataset.notes["images have got a 'file_name' from their 'coco_url'"] += 1
    dataset.check_image_sizes(path)
    return dataset
