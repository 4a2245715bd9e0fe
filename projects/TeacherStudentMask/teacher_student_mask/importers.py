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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree  # nosec B405  # expat limits entities and reads none from files

import msgspec
import numpy as np
import pycocotools.mask as mask_util
import yaml
from PIL import Image

from .coco_json import TRANSPOSED, orientation_of, read_coco
from .errors import InputError

__all__ = [
    "ImportedDataset",
    "files_in",
    "import_cvat",
    "import_labelme",
    "import_voc",
    "import_yolo",
    "read_text",
]

# What Ultralytics takes for images, where Pillow reads them.
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
# The first lines of LabelMe's own labels.txt; shapes of these names are no objects.
_LABELME_RESERVED = ("__ignore__", "_background_")


@dataclass
class ImportedDataset:
    """
    Images, classes and objects in COCO's format; coordinates are pixels from the upper left corner.

    Attributes:
        coco: content of a COCO json.
        image_root: folder that the file names are relative to; None where the input does not say.
        notes: what was changed or left out on the way -> how often.
    """

    coco: dict
    image_root: Path | None
    notes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_classes(cls, names: Mapping[int, str], image_root: Path | None) -> ImportedDataset:
        """Begin a dataset without images; ``names`` are by category id."""
        categories = [{"id": i, "name": name} for i, name in sorted(names.items())]
        return cls({"images": [], "annotations": [], "categories": categories}, image_root)

    def add_image(self, path: Path, where: str, declared: tuple = (0, 0)) -> tuple[int, int]:
        """
        Begin a new image, to which the objects that follow belong; returns (width, height).

        Args:
            path: of the image; without ``image_root``, its name.
            where: how the message of an InputError begins, if the image cannot be read.
            declared: width and height in the input. Where it has none, the image is read; training
                turns images by their EXIF orientation.
        """
        try:
            size = tuple(int(float(x or 0)) for x in declared)
        except ValueError as error:
            raise _input_error(where, "the size", declared, "numbers of pixels") from error
        if min(size) < 1:
            try:
                with Image.open(path) as picture:
                    is_turned = orientation_of(picture) in TRANSPOSED
                    size = picture.size[::-1] if is_turned else picture.size
            # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, ...
            except Exception as error:
                raise InputError(f"{where}: its image {path} cannot be read: {error}.") from error
        if self.image_root is not None:
            path = Path(os.path.relpath(path, self.image_root))
        image = {"id": len(self.coco["images"]) + 1, "file_name": path.as_posix()}
        self.coco["images"].append({**image, "width": size[0], "height": size[1]})
        return size

    def add_shapes(self, shapes: Iterable[tuple], where: str) -> None:
        """
        Add objects to the last image; shapes of one class and group are one object.

        The mask of an object is the union of its outlines and masks. One that has neither has no
        mask; a box beside them does not count.

        Args:
            shapes: (class name, group or None, kind, array). The array of a "box" is float (N, 2),
                x and y of corners in pixels; of an "outline" the same of N >= 3 points; of a
                "mask" bool (H, W) of the image, not empty.
            where: how the message of an InputError begins, if there is no class of such a name.
        """
        ids = {x["name"]: x["id"] for x in self.coco["categories"]}
        objects: dict[tuple, list[tuple[str, np.ndarray]]] = {}
        for number, (name, group, *shape) in enumerate(shapes):
            if name not in ids:
                here = f"{where}, object {number}"
                raise _input_error(here, "the class", repr(name), ", ".join(ids))
            key = ids[name], group, number if group is None else None
            objects.setdefault(key, []).append(shape)
        image, annotations = self.coco["images"][-1], self.coco["annotations"]
        for (category_id, *_), parts in objects.items():
            annotation = {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0}
            annotation |= {"category_id": category_id, **self._geometry(parts, image)}
            annotations.append(annotation)

    def _geometry(self, parts: list[tuple[str, np.ndarray]], image: dict) -> dict:
        boxes, outlines, masks = (
            [x for kind, x in parts if kind == wanted] for wanted in ("box", "outline", "mask")
        )
        if boxes and (outlines or masks):
            self.notes["boxes are in a group with an outline, which counts alone"] += len(boxes)
        given = outlines or boxes
        cut = [x.clip(0, [image["width"], image["height"]]) for x in given]
        if not all(map(np.array_equal, cut, given)):
            self.notes["boxes or outlines reached out of their image and were cut there"] += 1
        if cut:
            low, high = np.concatenate(cut).min(axis=0), np.concatenate(cut).max(axis=0)
            found = {"bbox": [*low.tolist(), *(high - low).tolist()]}
        if not outlines and not masks:
            return {**found, "area": float(np.prod(high - low))}
        flat = [x.ravel().tolist() for x in cut if outlines]
        rles = mask_util.frPyObjects(flat, image["height"], image["width"]) if flat else []
        rles += [mask_util.encode(np.asfortranarray(x, dtype=np.uint8)) for x in masks]
        rle = mask_util.merge(rles)
        if masks:
            found = {"bbox": mask_util.toBbox(rle).tolist()}
            flat = {**rle, "counts": rle["counts"].decode("ascii")}
        return {**found, "area": float(mask_util.area(rle)), "segmentation": flat}


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
    text = read_text(path)
    try:
        settings = yaml.safe_load(text)
        names = msgspec.convert(settings, _YoloSettings).names
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}.") from error
    if not settings.get(split):
        raise _input_error(path, repr(split), "missing", f"one of {', '.join(map(str, settings))}")
    if "kpt_shape" in settings:
        raise InputError(f"{path}: 'kpt_shape' says that the labels are keypoints, not outlines.")
    root = path.parent / str(settings.get("path") or "")
    root = root if root.is_dir() else Path(str(settings["path"]))  # from the current folder
    entries = settings[split] if isinstance(settings[split], list) else [settings[split]]
    # Exports of Roboflow begin with "../" too much; Ultralytics does the same.
    choices = [(root / str(x), root / str(x).removeprefix("../")) for x in entries]
    places = [given if given.exists() else other for given, other in choices]
    for place in places:
        if not place.exists():
            raise InputError(f"{path}: {split!r} names {place}, which does not exist.")
    images: list[Path] = []
    for place in places:
        if place.is_dir():
            images += files_in(place, *_IMAGE_SUFFIXES)
        else:  # a list of images, relative to its folder
            images += [place.parent / x.strip() for x in read_text(place).split("\n") if x.strip()]
    labels_of = {image: _yolo_labels(image) for image in sorted(images)}
    if not any(x.is_file() for x in labels_of.values()):
        raise InputError(f"{path}: none of the {len(images)} images of {split!r} has its txt.")
    common = Path(os.path.commonpath([x.parent.absolute() for x in images]))
    by_id = enumerate(names) if isinstance(names, list) else names.items()
    names = {i: str(name) for i, name in by_id}
    dataset = ImportedDataset.of_classes(names, common)
    for image, labels in labels_of.items():
        size = dataset.add_image(image, str(path))
        if not labels.is_file():
            dataset.notes["images have no txt, and so no objects"] += 1
            continue
        shapes = [
            _read_yolo_line(line, names, f"{labels}, line {number}", size)
            for number, line in enumerate(read_text(labels).split("\n"), start=1)
            if line.strip()
        ]
        dataset.add_shapes(shapes, str(labels))
    folders = {x.parent for x in labels_of.values()}
    orphans = {x for y in folders for x in y.glob("[!.]*.txt")}.difference(labels_of.values())
    # Programs for labelling leave a list of the class names, classes.txt, beside the labels.
    note = "txts with labels have no image and were left out"
    dataset.notes.update(note for x in orphans if x.stem != "classes")
    return dataset


def _yolo_labels(image: Path) -> Path:
    """The txt of an image: the last folder named images becomes labels, as in Ultralytics."""
    before, folder, after = f"/{image.as_posix()}".rpartition("/images/")
    path = f"{before}/labels/{after}"[1:] if folder else image
    return Path(path).with_suffix(".txt")


def _read_yolo_line(
    line: str, names: Mapping[int, str], where: str, size: tuple[int, int]
) -> tuple[str, None, str, np.ndarray]:
    try:
        class_index, *values = map(float, line.split())
    except ValueError:
        class_index, values = -1, []
    is_outline = len(values) >= 6 and len(values) % 2 == 0
    # Rounding may carry a coordinate a little out of [0, 1]; nan fails, too.
    are_fractions = all(-0.01 <= x <= 1.01 for x in values)
    if class_index not in names or not (len(values) == 4 or is_outline) or not are_fractions:
        allowed = "a number of 'names', then a box or at least 3 points in [0, 1], no confidence"
        raise _input_error(where, "it", repr(line), allowed)
    points = np.reshape(values, (-1, 2)) * size
    if is_outline:
        return names[class_index], None, "outline", points
    center, half = points[0], points[1] / 2
    return names[class_index], None, "box", np.array([center - half, center + half])


class _LabelMeShape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: int | float | str | None = None
    mask: str | None = None  # a picture in base64, of the part between the two points


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

    A COCO json beside them, which may have been made of them, is not read.

    Args:
        folder: of the jsons; images are where ``imagePath`` says, relative to their json.
        class_names: in the order of their ids; None: the labels that occur, by the alphabet.
    """
    contents: dict[Path, _LabelMeFile] = {}
    for path in files_in(Path(folder), ".json"):
        text = read_text(path)
        if '"imagePath"' not in text and '"annotations"' in text:
            continue  # COCO's format, perhaps made of the others
        try:
            contents[path] = msgspec.json.decode(text, type=_LabelMeFile)
        except ValueError as error:
            raise InputError(f"{path}: {error}.") from error
    found = {x.label for content in contents.values() for x in content.shapes}
    class_names = [x for x in class_names or sorted(found) if x not in _LABELME_RESERVED]
    dataset = ImportedDataset.of_classes(dict(enumerate(class_names, start=1)), Path(folder))
    for path, content in contents.items():
        # LabelMe on Windows writes backslashes.
        image = path.parent / PurePosixPath(content.imagePath.replace("\\", "/"))
        size = dataset.add_image(image, str(path), (content.imageWidth, content.imageHeight))
        shapes = []
        for number, shape in enumerate(content.shapes):
            where = f"{path}, shape {number} ({shape.label})"
            kind = shape.shape_type or "polygon"  # as LabelMe itself takes it
            if shape.label in _LABELME_RESERVED:
                dataset.notes[f"shapes with the label {shape.label!r} were left out"] += 1
                continue
            if kind == "polygon":
                part = "outline", _to_points(shape.points, where, "the outline", 3)
            elif kind == "rectangle":
                part = "box", _to_points(shape.points, where, "'points'", 2)
            elif kind == "mask":
                part = "mask", _read_labelme_mask(shape, size, where)
            else:
                dataset.notes[f"shapes of the kind {kind!r} were left out"] += 1
                continue
            shapes.append((shape.label, shape.group_id, *part))
        dataset.add_shapes(shapes, str(path))
    return dataset


def _read_labelme_mask(shape: _LabelMeShape, size: tuple[int, int], where: str) -> np.ndarray:
    left, top = np.trunc(_to_points(shape.points, where, "'points'", 2).min(axis=0))
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape.mask))) as picture:
            part = np.array(picture.convert("L")) > 0
    except Exception as error:
        raise InputError(f"{where}: 'mask' is no picture in base64: {error}.") from error
    return _paste_mask(part, left, top, size, where)


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
            xmax the last pixel of the object. Outlines, which VOC itself lacks, count from 0.
    """
    image_root = Path(folder if image_root is None else image_root)
    roots = {x: _read_xml(x) for x in files_in(Path(folder), ".xml")}
    found = {_text(x, "name") for root in roots.values() for x in root.findall("object")}
    class_names = class_names or sorted(found - {""})
    dataset = ImportedDataset.of_classes(dict(enumerate(class_names, start=1)), image_root)
    for path, root in roots.items():
        declared = _text(root, "size/width"), _text(root, "size/height")
        dataset.add_image(image_root / _text(root, "filename"), str(path), declared)
        if _text(root, "segmented") == "1" and root.find(".//polygon") is None:
            dataset.notes["images have masks in SegmentationObject, which is not read"] += 1
        shapes = []
        for number, element in enumerate(root.findall("object")):
            where = f"{path}, object {number}"
            outlines = [x for x in element.findall("polygon") if "".join(x.itertext()).strip()]
            parts = [("outline", _read_voc_polygon(x, where)) for x in outlines]
            if not parts:
                texts = [_text(element, f"bndbox/{x}") for x in ("xmin", "ymin", "xmax", "ymax")]
                box = _to_points(texts, where, "<bndbox>", 2)
                if (box[0] > box[1]).any():
                    raise _input_error(where, "<bndbox>", texts, "minima not above the maxima")
                parts = [("box", box if zero_based else box - [[1], [0]])]
            shapes += [(_text(element, "name"), number, *part) for part in parts]
        dataset.add_shapes(shapes, str(path))
    return dataset


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()  # nosec B314  # As above.
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:
        raise InputError(f"{path}: no xml that can be read: {error}.") from error


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _read_voc_polygon(polygon: ElementTree.Element, where: str) -> np.ndarray:
    # <x1>, <y1>, <x2>, <y2>, ..., or <pt> with <x> and <y>.
    x, y = ([e.text for e in polygon.iter() if re.fullmatch(rf"{axis}\d*", e.tag)] for axis in "xy")
    return _to_points(list(zip(x, y)), where, "the outline", 3)


def import_cvat(
    path: str | os.PathLike, image_root: str | os.PathLike | None = None
) -> ImportedDataset:
    """
    Read what CVAT exports: "COCO 1.0" (a json) or "CVAT for images 1.1" (an xml).

    The json marks every object that has a bitmap for a mask with "iscrowd" 1, and training leaves
    crowds out; the mark is taken away. Turned boxes become the box around them.
    """
    image_root = image_root and Path(image_root)
    if str(path).lower().endswith(".xml"):
        return _import_cvat_xml(Path(path), image_root)
    dataset = ImportedDataset(read_coco(path), image_root)
    for annotation in dataset.coco["annotations"]:
        segmentation = annotation.get("segmentation")
        if annotation.get("iscrowd") == 1 and isinstance(segmentation, dict):
            annotation["iscrowd"] = 0
            dataset.notes["masks drawn with the brush are no longer marked as crowds"] += 1
        attributes = annotation.get("attributes")
        rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
        if not segmentation and isinstance(rotation, (int, float)):
            del attributes["rotation"]  # the box has it now
            x, y, w, h = annotation["bbox"]
            corners = np.array([[x, y], [x + w, y + h]])
            low, high = _box_around(corners, rotation, dataset.notes)
            annotation["bbox"] = [*low.tolist(), *(high - low).tolist()]
    return dataset


def _import_cvat_xml(path: Path, image_root: Path | None) -> ImportedDataset:
    root = _read_xml(path)
    if root.find("track") is not None:
        raise InputError(f"{path}: it has the tracks of a video; export the task as 'COCO 1.0'.")
    # A part of a skeleton names its <parent>.
    labels = root.iterfind("meta//labels/label")
    names = [_text(x, "name") for x in labels if x.find("parent") is None]
    dataset = ImportedDataset.of_classes(dict(enumerate(names, start=1)), image_root)
    for image in root.findall("image"):
        name = image.get("name", "")
        where = f"{path}: image {name!r}"
        declared = image.get("width"), image.get("height")
        size = dataset.add_image(Path(image_root or "", name), where, declared)
        shapes = []
        for number, shape in enumerate(image):
            here = f"{where}, object {number}"
            if shape.tag == "box":
                texts = [shape.get(x) for x in ("xtl", "ytl", "xbr", "ybr")]
                corners = _to_points(texts, here, "the box", 2)
                part = "box", _box_around(corners, shape.get("rotation"), dataset.notes)
            elif shape.tag == "polygon":
                texts = re.split("[,;]", shape.get("points", ""))
                part = "outline", _to_points(texts, here, "the outline", 3)
            elif shape.tag == "mask":
                part = "mask", _read_cvat_mask(shape, size, here)
            else:
                dataset.notes[f"shapes of the kind {shape.tag!r} were left out"] += 1
                continue
            group = shape.get("group_id", "0")
            shapes.append((shape.get("label"), None if group == "0" else group, *part))
        dataset.add_shapes(shapes, where)
    return dataset


def _box_around(corners: np.ndarray, degrees: float | str | None, notes: Counter) -> np.ndarray:
    """The upright box around one, [[left, top], [right, bottom]], turned about its middle."""
    angle = math.radians(float(degrees or 0) % 360)
    if angle == 0:
        return corners
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    half = np.array([[cosine, sine], [sine, cosine]]) @ (corners[1] - corners[0]) / 2
    middle = corners.mean(axis=0)
    notes["turned boxes have become the upright boxes around them"] += 1
    return np.round([middle - half, middle + half], 6)


def _read_cvat_mask(shape: ElementTree.Element, size: tuple[int, int], where: str) -> np.ndarray:
    # "rle" are lengths of runs, background first, by the rows of a part of the image.
    texts = [shape.get(x, "") for x in ("left", "top", "width", "height")]
    texts += shape.get("rle", "").split(",")
    try:
        left, top, width, height, *runs = map(int, texts)
        part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    except ValueError as error:
        allowed = "left, top, width, height and the lengths of runs"
        raise _input_error(where, "the mask", ", ".join(texts), allowed) from error
    return _paste_mask(part, left, top, size, where)


def _input_error(where: object, field: str, value: object, allowed: str) -> InputError:
    """Say which value of a field is there, cut to 200 characters, and what is allowed."""
    return InputError(f"{where}: {field} is {str(value)[:200]}; allowed: {allowed}.")


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """
    Find the files of a folder and of those in it, links to folders included; InputError if none.

    Hidden ones, such as .ipynb_checkpoints and the ._* of macOS, are copies of other programs.
    """
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # by a link, such as one into a folder that contains it
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        names = [x for x in names if x.lower().endswith(suffixes) and not x.startswith(".")]
        found += [Path(root, x) for x in names]
    if not found:
        raise InputError(f"{folder}: there is no {' or '.join(suffixes)} in it.")
    return sorted(found)


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without the byte order mark of editors on Windows."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8: {error}.") from error


def _to_points(values: Sequence, where: str, field: str, least: int) -> np.ndarray:
    """Convert texts, numbers or pairs of them to float64 (N, 2), at least ``least`` points."""
    try:
        points = np.array(values, dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        points = np.empty((0, 2))
    if len(points) < least or not np.isfinite(points).all():
        raise _input_error(where, field, values, f"at least {least} pairs of finite numbers")
    return points


def _paste_mask(
    part: np.ndarray, x: float, y: float, size: tuple[int, int], where: str
) -> np.ndarray:
    """Put the mask of a part of an image, bool (h, w), at column x, row y of an empty (H, W)."""
    height, width = part.shape
    if not (0 <= x <= size[0] - width and 0 <= y <= size[1] - height and part.any()):
        part_of = f"{width}x{height} pixels at ({x:g}, {y:g}) of {size[0]}x{size[1]}"
        raise InputError(f"{where}: its mask, {part_of}, is empty or not inside the image.")
    mask = np.zeros(size[::-1], dtype=bool)
    mask[int(y) : int(y) + height, int(x) : int(x) + width] = part
    return mask
