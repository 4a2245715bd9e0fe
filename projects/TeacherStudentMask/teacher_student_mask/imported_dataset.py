"""What the readers of all formats in importers.py share: the dataset that grows, and files."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree  # nosec B405  # _PlainTree refuses what can declare entities
from xml.etree.ElementTree import Element  # nosec B405  # As above.

import msgspec
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image
from tqdm import tqdm

from .coco_json import DEEP_MODES, TRANSPOSED, orientation_of
from .errors import InputError

__all__ = [
    "ImportedDataset",
    "box_around",
    "check_different",
    "files_in",
    "image_size",
    "input_error",
    "number_or_nan",
    "paste_mask",
    "read_class_list",
    "read_coco_lists",
    "read_json",
    "read_text",
    "read_xml",
    "show_progress",
    "to_outline",
    "xml_text",
]

# Before the EXIF or XMP of a PNG. Without it Pillow need not decode the pixels to look for them.
_PNG_METADATA = re.compile(rb"eXIf|Raw profile type|XML:com\.adobe\.xmp")

# Of an image that is mirrored or upside down, no size tells what its labels refer to.
_TURNED = (
    "images are turned as their EXIF orientation says, in training as well; their boxes and "
    "outlines must fit the turned image"
)


class ImportedDataset:
    """
    Images, classes and objects in COCO's format; coordinates are pixels from the upper left corner.

    Attributes:
        coco: content of a COCO json.
        image_root: folder that the file names are relative to; None where the input does not say.
        notes: what was changed or left out on the way -> how often.
    """

    def __init__(self, class_names: Mapping[int, str], image_root: str | os.PathLike | None):
        """
        Args:
            class_names: by category id.
            image_root: see above.
        """
        categories = [{"id": i, "name": name} for i, name in sorted(class_names.items())]
        self.coco = {"images": [], "annotations": [], "categories": categories}
        self.image_root = None if image_root is None else Path(image_root)
        self.notes: Counter[str] = Counter()
        self._category_ids = {name: i for i, name in class_names.items()}

    @classmethod
    def from_coco(cls, coco: dict, image_root: str | os.PathLike | None) -> ImportedDataset:
        """Take the content of a COCO json as it is."""
        dataset = cls({}, image_root)
        dataset.coco = coco
        return dataset

    @property
    def warnings(self) -> list[str]:
        """A sentence for each group of class names that differ by blanks or case alone."""
        groups: dict[str, list[str]] = {}
        for category in self.coco["categories"]:
            name = category.get("name")
            if isinstance(name, str):
                groups.setdefault("".join(name.split()).casefold(), []).append(name)
        return [
            f"the classes {', '.join(map(repr, names))} differ by blanks or case alone; give them "
            "one name if they are the same"
            for names in groups.values()
            if len(names) > 1
        ]

    def category_id(self, name: str, where: str) -> int:
        """Return the id of a class; InputError, which begins with ``where``, if there is none."""
        if name not in self._category_ids:
            raise input_error(where, "the class", repr(name), ", ".join(self._category_ids))
        return self._category_ids[name]

    def add_image(self, path: str | os.PathLike, size: tuple[int, int]) -> None:
        """
        Begin a new image; the objects that follow belong to it.

        Args:
            path: of the image; without ``image_root``, its name.
            size: (width, height) in pixels.
        """
        if self.image_root is not None:
            path = Path(os.path.relpath(path, self.image_root)).as_posix()
        number = len(self.coco["images"]) + 1
        image = {"id": number, "file_name": str(path), "width": size[0], "height": size[1]}
        self.coco["images"].append(image)

    def add_box(self, category_id: int, corners: Sequence[float]) -> None:
        """Add an object without a mask: x0, y0, x1, y1 in pixels, cut at the image's borders."""
        (x0, y0), (x1, y1) = self._cut(np.asarray(corners, dtype=float).reshape(2, 2))
        self._add(category_id, [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0))

    def add_polygons(self, category_id: int, polygons: Sequence[np.ndarray]) -> None:
        """
        Add an object whose mask is the union of polygons, and the box around it.

        Args:
            category_id: of its class.
            polygons: float (N, 2), x and y in pixels, at least 3 points each; cut at the borders.
        """
        polygons = [self._cut(points) for points in polygons]
        points = np.concatenate(polygons)
        low, high = points.min(axis=0), points.max(axis=0)
        flat = [x.ravel().tolist() for x in polygons]
        image = self.coco["images"][-1]
        rle = mask_util.merge(mask_util.frPyObjects(flat, image["height"], image["width"]))
        self._add(category_id, [*low, *(high - low)], float(mask_util.area(rle)), flat)

    def add_mask(self, category_id: int, mask: np.ndarray) -> None:
        """Add an object with a mask, bool (H, W) of the image and not empty, and the box around."""
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        box, area = mask_util.toBbox(rle).tolist(), float(mask_util.area(rle))
        rle["counts"] = rle["counts"].decode("ascii")
        self._add(category_id, box, area, rle)

    def check_image_sizes(self, source: Path) -> None:
        """Compare the sizes in ``source`` with those of the images that are in ``image_root``."""
        for image in [] if self.image_root is None else show_progress(self.coco["images"]):
            name, where = image.get("file_name"), f"{source}: image {image.get('id')}"
            # What is no name, or names no file, the checks of the whole json tell.
            if isinstance(name, str) and (self.image_root / name).is_file():
                declared = (image.get("width"), image.get("height"))
                fields = "'width' and 'height'"
                image_size(self.image_root / name, where, self.notes, declared, fields)

    def _cut(self, points: np.ndarray) -> np.ndarray:
        image = self.coco["images"][-1]
        inside = points.clip(0, [image["width"], image["height"]])
        if not np.array_equal(inside, points):
            note = "boxes or outlines reached out of their image and were cut at its border"
            self.notes[note] += 1
        return inside

    def _add(self, category_id: int, bbox, area: float, segmentation=None) -> None:
        annotation = {
            "id": len(self.coco["annotations"]) + 1,
            "image_id": self.coco["images"][-1]["id"],
            "category_id": category_id,
            "bbox": [float(x) for x in bbox],
            "area": float(area),
            "iscrowd": 0,
        }
        if segmentation is not None:
            annotation["segmentation"] = segmentation
        self.coco["annotations"].append(annotation)


def input_error(where: object, field: str, value: object, allowed: str) -> InputError:
    """Say which value of a field is there, cut to 200 characters, and what is allowed."""
    return InputError(f"{where}: {field} is {str(value)[:200]}; allowed: {allowed}.")


def number_or_nan(value: object) -> float:
    """Convert a text or number to a finite number, or nan where it is none."""
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def show_progress(items: Iterable) -> Iterable:
    """Count files on the terminal; nothing where the output is none."""
    return tqdm(items, desc="Read", unit="file", dynamic_ncols=True, disable=None)


def read_class_list(path: str | os.PathLike) -> list[str]:
    """
    Read class names, one a line; blank lines are skipped.

    Raises:
        InputError: there is no name, or one twice.
    """
    path = Path(path)
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: empty; allowed: one class name a line.")
    check_different(names, str(path))
    return names


def check_different(names: Sequence[str], where: str) -> None:
    """Raise InputError, which begins with ``where``, if a name is there more than once."""
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(
                f"{where}: the class names are not all different: {name!r} is there {count} times."
            )


def files_in(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """
    Find the files of a folder and of those in it, links to folders included.

    Hidden files and folders, such as .ipynb_checkpoints and the ._* of macOS, are copies and notes
    of other programs.
    """
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        for name in list(folders):
            target = os.path.realpath(os.path.join(root, name))
            if target in seen:  # a link into a folder that contains it
                folders.remove(name)
            seen.add(target)
        for name in names:
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(root, name)


def read_text(path: Path) -> str:
    """Read a file in UTF-8, with or without the byte order mark of editors on Windows."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8: {error}.") from error


def read_json(path: Path, type: object = object):
    """Read a json; InputError if it is not of a type that msgspec can check."""
    try:
        return msgspec.json.decode(read_text(path), type=type)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: {error}.") from error


def read_coco_lists(path: Path) -> dict:
    """Read a COCO json; InputError if it lacks one of its three lists of dicts."""
    data = read_json(path)
    for key in ("images", "annotations", "categories"):
        rows = data.get(key) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(x, dict) for x in rows):
            raise InputError(f"{path}: a COCO json must have a list of dicts {key!r}.")
    return data


class _PlainTree(ElementTree.TreeBuilder):
    """Without a DOCTYPE there are no entities, which could grow without end."""

    def doctype(self, name, pubid, system):
        raise ValueError("a DOCTYPE is not allowed")


def read_xml(path: Path) -> Element:
    """Read an xml in the encoding that it declares; InputError if that cannot be done safely."""
    parser = ElementTree.XMLParser(target=_PlainTree())  # nosec B314  # As above.
    try:
        content = path.read_bytes()
        declared = re.match(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", content)
        if declared:
            # Not left to the parser, which takes no encoding of several bytes a character.
            encoding = declared[1].decode("ascii").lower()
            # Some programs declare UTF-16 and write UTF-8; one byte a character came up to here.
            content = content.decode("utf-8" if encoding.startswith("utf-16") else encoding)
        parser.feed(content)
        return parser.close()
    except (ElementTree.ParseError, LookupError, OSError, ValueError) as error:
        raise InputError(f"{path}: no xml that can be read: {error}.") from error


def xml_text(element: Element, name: str, path: Path) -> str:
    """Return the text of a child of an element; InputError if there is none."""
    text = (element.findtext(name) or "").strip()
    if not text:
        raise InputError(f"{path}: <{element.tag}> has no <{name}>.")
    return text


def image_size(
    path: Path, where: str, notes: Counter, declared: Sequence = (0, 0), fields: str = ""
) -> tuple[int, int]:
    """
    Return the size of an image as training sees it, which turns it by its EXIF orientation.

    Args:
        path: of the image.
        where: what names it, for the message.
        notes: to count turned images.
        declared: width and height that stand beside the labels, whose coordinates refer to them;
            None, "" or 0: not known.
        fields: names of the declared ones, for the message.

    Returns:
        (width, height) in pixels.

    Raises:
        InputError: there is no such image, training would spoil it, or the sizes differ.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata, which do no harm
            with Image.open(path) as image:
                mode, stored, orientation = image.mode, image.size, None
                may_have_exif = image.format != "PNG" or "exif" in image.info
                if may_have_exif or _PNG_METADATA.search(path.read_bytes()):
                    orientation = orientation_of(image)
    except FileNotFoundError as error:
        raise InputError(f"{where}: its image {path} does not exist.") from error
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise InputError(f"{where}: its image {path} cannot be read: {error}.") from error
    if mode.startswith(DEEP_MODES):
        allowed = "8 bits a channel, as training would cut all values above 255; convert it"
        raise input_error(f"{where}: its image {path}", "its mode", repr(mode), allowed)
    is_turned = orientation in range(2, 9)
    size = stored[::-1] if orientation in TRANSPOSED else stored
    if is_turned:
        notes[_TURNED] += 1
    sides = [0.0 if x in (None, "") else number_or_nan(x) for x in declared]
    if any(map(math.isnan, sides)):
        allowed = "whole numbers of pixels, or 0 where they are not known"
        raise input_error(where, f"the size in {fields}", " x ".join(map(str, declared)), allowed)
    if all(side in (0, there) for side, there in zip(sides, size)):
        return size
    turned = f", as its EXIF orientation {orientation} turns it" if is_turned else ""
    remedy = "import with the image that was labelled, or correct the size and all coordinates"
    if all(side in (0, there) for side, there in zip(sides, stored)):
        remedy = (
            "if the labels fit the image as it is stored, take the orientation, by which training "
            "turns it, out of the file (exiftool -Orientation= FILE)"
        )
    raise InputError(
        f"{where}: the size in {fields} is {sides[0]:.10g} x {sides[1]:.10g}, but its image {path} "
        f"has {size[0]} x {size[1]} pixels{turned}; allowed: the size of the image; {remedy}."
    )


def to_outline(points: Sequence[Sequence], where: str) -> np.ndarray:
    """Convert pairs of texts or numbers to float64 (N, 2); InputError if they are no outline."""
    try:
        outline = np.array(points, dtype=float)
        is_outline = outline.ndim == 2 and outline.shape[1] == 2 and len(outline) >= 3
    except (TypeError, ValueError):
        is_outline = False
    if not is_outline or not np.isfinite(outline).all():
        raise input_error(where, "the outline", points, "at least 3 pairs of finite numbers")
    return outline


def paste_mask(
    part: np.ndarray, x: float, y: float, size: tuple[int, int], where: str
) -> np.ndarray:
    """
    Put the mask of a part of an image into one of the whole image.

    Args:
        part: bool (h, w).
        x, y: column and row of its upper left pixel in the image.
        size: (width, height) of the image.
        where: how the message of an InputError begins, if the part is empty or not inside.

    Returns:
        bool (H, W).
    """
    height, width = part.shape
    if not (0 <= x <= size[0] - width and 0 <= y <= size[1] - height and part.any()):
        raise InputError(
            f"{where}: its mask of {width}x{height} pixels at ({x:g}, {y:g}) is empty, or not "
            f"inside the image of {size[0]}x{size[1]}."
        )
    mask = np.zeros(size[::-1], dtype=bool)
    mask[int(y) : int(y) + height, int(x) : int(x) + width] = part
    return mask


def box_around(corners: Sequence[float], degrees: float, notes: Counter) -> list[float]:
    """
    Return the upright box around one that is turned about its middle.

    Args:
        corners: x0, y0, x1, y1 before it is turned.
        degrees: by how much it is turned.
        notes: to count such boxes.
    """
    x0, y0, x1, y1 = corners
    sine, cosine = abs(math.sin(math.radians(degrees))), abs(math.cos(math.radians(degrees)))
    width = (x1 - x0) * cosine + (y1 - y0) * sine
    height = (x1 - x0) * sine + (y1 - y0) * cosine
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    notes["turned boxes have become the upright boxes around them"] += 1
    return [round(v, 6) for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)]
