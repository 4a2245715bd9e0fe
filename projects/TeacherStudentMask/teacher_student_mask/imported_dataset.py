"""What the readers in importers.py share: the dataset that grows, and the reading of files."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from .coco_json import TRANSPOSED, orientation_of
from .errors import InputError

__all__ = [
    "ImportedDataset",
    "files_in",
    "image_size",
    "input_error",
    "number_or_nan",
    "paste_mask",
    "read_text",
    "to_outline",
]


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

    def __post_init__(self) -> None:
        self._ids = {x["name"]: x["id"] for x in self.coco["categories"]}

    @classmethod
    def of_classes(cls, names: Mapping[int, str], image_root: Path | None) -> ImportedDataset:
        """Begin a dataset without images; ``names`` are by category id."""
        categories = [{"id": i, "name": name} for i, name in sorted(names.items())]
        return cls({"images": [], "annotations": [], "categories": categories}, image_root)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each group of class names that differ by blanks or case alone."""
        groups: dict[str, list[str]] = {}
        for name in self._ids:
            groups.setdefault("".join(name.split()).casefold(), []).append(repr(name))
        return [
            f"the classes {', '.join(x)} differ by blanks or case alone; give them one name if "
            "they are the same"
            for x in groups.values()
            if len(x) > 1
        ]

    def category_id(self, name: str, where: str) -> int:
        """Return the id of a class; InputError, which begins with ``where``, if there is none."""
        if name not in self._ids:
            raise input_error(where, "the class", repr(name), ", ".join(self._ids))
        return self._ids[name]

    def add_image(self, path: str | os.PathLike, size: tuple[int, int]) -> None:
        """
        Begin a new image, (width, height) in pixels; the objects that follow belong to it.

        Without ``image_root``, ``path`` is its name.
        """
        if self.image_root is not None:
            path = Path(os.path.relpath(path, self.image_root)).as_posix()
        number = len(self.coco["images"]) + 1
        image = {"id": number, "file_name": str(path), "width": size[0], "height": size[1]}
        self.coco["images"].append(image)

    def add_object(
        self,
        category_id: int,
        boxes: Sequence = (),
        polygons: Sequence[np.ndarray] = (),
        masks: Sequence[np.ndarray] = (),
    ) -> None:
        """
        Add an object; its mask is the union of polygons and masks.

        Args:
            category_id: of its class.
            boxes: float (N, 2) each, x and y of corners in pixels. They count where there is
                neither a polygon nor a mask; the object is without a mask then.
            polygons: float (N, 2) each, x and y in pixels, at least 3 points; cut at the borders.
            masks: bool (H, W) of the image each, not empty.
        """
        image = self.coco["images"][-1]
        width, height = image["width"], image["height"]
        annotation = {
            "id": len(self.coco["annotations"]) + 1,
            "image_id": image["id"],
            "category_id": category_id,
            "iscrowd": 0,
        }
        if boxes and (polygons or masks):
            self.notes["boxes are in a group with an outline, which counts alone"] += len(boxes)
        parts = [x.clip(0, [width, height]) for x in polygons or boxes]
        if not all(map(np.array_equal, parts, polygons or boxes)):
            self.notes["boxes or outlines reached out of their image and were cut there"] += 1
        if parts:
            points = np.concatenate(parts)
            low, high = points.min(axis=0), points.max(axis=0)
            annotation["bbox"] = [*low.tolist(), *(high - low).tolist()]
            annotation["area"] = float(np.prod(high - low))
        if polygons or masks:
            flat = [x.ravel().tolist() for x in parts] if polygons else []
            rles = mask_util.frPyObjects(flat, height, width) if polygons else []
            rles += [mask_util.encode(np.asfortranarray(x, dtype=np.uint8)) for x in masks]
            rle = mask_util.merge(rles)
            annotation["area"] = float(mask_util.area(rle))
            annotation["segmentation"] = flat
        if masks:
            annotation["bbox"] = mask_util.toBbox(rle).tolist()
            annotation["segmentation"] = {**rle, "counts": rle["counts"].decode("ascii")}
        self.coco["annotations"].append(annotation)


def input_error(where: object, field: str, value: object, allowed: str) -> InputError:
    """Say which value of a field is there, cut to 200 characters, and what is allowed."""
    return InputError(f"{where}: {field} is {str(value)[:200]}; allowed: {allowed}.")


def number_or_nan(value: object) -> float:
    """Convert a text or number to a finite number, or nan where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


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
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8: {error}.") from error


def image_size(path: Path, where: str) -> tuple[int, int]:
    """
    Return (width, height) of an image as training sees it, which turns it by its EXIF orientation.

    Args:
        path: of the image.
        where: how the message of an InputError begins, if there is no such image.
    """
    try:
        with Image.open(path) as image:
            is_turned = orientation_of(image) in TRANSPOSED
            return image.size[::-1] if is_turned else image.size
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise InputError(f"{where}: its image {path} cannot be read: {error}.") from error


def to_outline(points: Sequence[Sequence], where: str) -> np.ndarray:
    """Convert pairs of texts or numbers to float64 (N, 2); InputError if they are no outline."""
    try:
        outline = np.array(points, dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        outline = np.empty((0, 2))
    if len(outline) < 3 or not np.isfinite(outline).all():
        raise input_error(where, "the outline", points, "at least 3 pairs of finite numbers")
    return outline


def paste_mask(
    part: np.ndarray, x: float, y: float, size: tuple[int, int], where: str
) -> np.ndarray:
    """
    Put the mask of a part of an image, bool (h, w), into one of the whole image, bool (H, W).

    Args:
        part: the mask; InputError, which begins with ``where``, if it is empty or not inside.
        x, y: column and row of its upper left pixel in the image.
        size: (width, height) of the image.
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
