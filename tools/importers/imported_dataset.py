"""A COCO json that grows from another format, object by object."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util

from importers.input_files import ImageHeader, InputError

__all__ = ["TURNED", "ImportedDataset"]

# A note: of an image that is only mirrored or upside down, no size tells what its labels refer to.
TURNED = (
    "images are turned as their EXIF orientation says, in training as well; their boxes and "
    "outlines must fit the turned image"
)


class ImportedDataset:
    """
    Images, classes and objects in COCO's format; coordinates are pixels from the upper left corner.

    Attributes:
        image_root: folder that the names of the images are relative to.
        class_names: by category id.
        notes: what was changed or left out on the way -> how often.
    """

    def __init__(self, image_root: Path, class_names: dict[int, str]):
        """
        Args:
            image_root: see above.
            class_names: by category id; all different.
        """
        self.image_root = image_root
        self.notes: Counter[str] = Counter()
        self._category_ids = {name: i for i, name in class_names.items()}
        self.class_names = dict(class_names)
        self._images: list[dict] = []
        self._annotations: list[dict] = []

    def category_id(self, name: str, where: str) -> int:
        """
        Raises:
            InputError: there is no such class.
        """
        if name not in self._category_ids:
            raise InputError(
                f"{where}: the class is {name!r}; the classes are: {', '.join(self._category_ids)}."
            )
        return self._category_ids[name]

    def add_image(self, header: ImageHeader) -> None:
        """Begin a new image; the objects that follow are of it."""
        name = Path(os.path.relpath(header.path, self.image_root)).as_posix()
        width, height = header.size
        image = {"id": len(self._images) + 1, "file_name": name, "width": width, "height": height}
        self._images.append(image)
        if header.is_turned:
            self.notes[TURNED] += 1

    def add_box(self, category_id: int, corners: Sequence[float]) -> None:
        """
        Add an object without a mask.

        Args:
            corners: x0, y0, x1, y1 in pixels; cut at the borders of the image.
        """
        x0, y0, x1, y1 = self._inside(np.asarray(corners, dtype=float).reshape(2, 2)).ravel()
        self._add(category_id, [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0), {})

    def add_polygons(self, category_id: int, polygons: Sequence[Sequence[float]]) -> None:
        """
        Add an object with a mask, and the box around it.

        Args:
            polygons: the mask is their union; of each x, y, x, y, ... in pixels, at least 3 points.
        """
        parts = [self._inside(np.asarray(x, dtype=float).reshape(-1, 2)) for x in polygons]
        points = np.concatenate(parts)
        low, high = points.min(axis=0), points.max(axis=0)
        flat = [x.ravel().tolist() for x in parts]
        image = self._images[-1]
        rles = mask_util.frPyObjects(flat, image["height"], image["width"])
        area = float(mask_util.area(mask_util.merge(rles)))
        self._add(category_id, [*low, *(high - low)], area, {"segmentation": flat})

    def add_mask(self, category_id: int, mask: np.ndarray) -> None:
        """
        Add an object with a mask, and the box around it.

        Args:
            mask: bool, shape (height, width) of the image, with at least one pixel.
        """
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        box, area = mask_util.toBbox(rle).tolist(), float(mask_util.area(rle))
        rle["counts"] = rle["counts"].decode("ascii")
        self._add(category_id, box, area, {"segmentation": rle})

    def to_coco(self) -> dict:
        """The dataset as the content of a COCO json."""
        return {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [{"id": i, "name": name} for i, name in sorted(self.class_names.items())],
        }

    def _inside(self, points: np.ndarray) -> np.ndarray:
        image = self._images[-1]
        inside = points.clip(0, [image["width"], image["height"]])
        if not np.array_equal(inside, points):
            self.notes[
                "boxes or outlines reached out of their image and were cut at its border"
            ] += 1
        return inside

    def _add(self, category_id: int, bbox: list[float], area: float, mask: dict) -> None:
        self._annotations.append(
            {
                "id": len(self._annotations) + 1,
                "image_id": self._images[-1]["id"],
                "category_id": category_id,
                "bbox": [float(x) for x in bbox],
                "area": area,
                "iscrowd": 0,
                **mask,
            }
        )
