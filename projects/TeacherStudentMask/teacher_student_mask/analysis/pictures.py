"""Pictures of single objects: what two models made of the objects on which they differ most."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageOps

from ..evaluation import find_object_regions
from .chart_style import model_colour
from .picture_drawing import (
    WHITE,
    crop_window,
    draw_kinds,
    draw_mask,
    join_columns,
    pixel_kinds,
    resize_crop,
    resize_mask,
    rgb,
    to_data_uri,
)

if TYPE_CHECKING:
    from .analysis import Analysis
    from .objects import ObjectTable

__all__ = ["ObjectPicture", "draw_objects", "models_to_picture", "select_objects"]

logger = logging.getLogger(__name__)

_GREY = 150


@dataclass(frozen=True)
class ObjectPicture:
    """
    One object as the report shows it.

    The picture has a column for the ground truth and one for each model. Above stand the masks,
    below the image as it is and the false-positive and missed pixels of each model.
    """

    annotation_id: int
    image_id: int | str
    file_name: str
    class_name: str
    is_unseen: bool
    overlap: float
    ious: tuple[float, ...]  # one per model
    boundary_ious: tuple[float, ...]  # nan where not measured
    has_image: bool
    width: int
    height: int
    source: str  # data URI


def models_to_picture(analysis: Analysis) -> list[str]:
    """
    The models to compare in pictures: the first two whose masks were made in the same way.

    Returns:
        One name if there are no two (IoU on detected and on ground-truth boxes do not compare),
        none if there is no model.
    """
    names = list(analysis.objects)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if analysis.objects[a].protocol == analysis.objects[b].protocol:
                return [a, b]
    return names[:1]


def select_objects(tables: Sequence[ObjectTable], num_objects: int) -> np.ndarray:
    """
    The objects to show: of unseen classes first, then of seen ones, within each the clearest first.

    Args:
        tables: of two models: objects that both have a mask for, by falling difference of the IoU.
            Of one model: objects with false-positive pixels, by their falling share of the mask.
        num_objects: how many at most.

    Returns:
        Rows of the tables; objects that are equal stand in the order of the tables.
    """
    if len(tables) == 1:
        table = tables[0]
        pixels = table.false_positives.sum(axis=1)
        areas = np.array([0 if x is None else float(mask_util.area(x)) for x in table.rles])
        merit = pixels / np.maximum(areas, 1)
        is_eligible = np.isfinite(table.ious) & (pixels > 0)
    else:
        a, b = tables
        is_eligible = np.isfinite(a.ious) & np.isfinite(b.ious)
        merit = np.abs(np.where(is_eligible, b.ious - a.ious, 0.0))
    rows = np.flatnonzero(is_eligible)
    order = np.lexsort((-merit[rows], ~tables[0].is_unseen[rows]))
    return rows[order][:num_objects]


def draw_objects(
    analysis: Analysis, models: Sequence[str], image_root: str | None, num_objects: int
) -> list[ObjectPicture]:
    """
    Draw the objects that :func:`select_objects` chooses.

    Args:
        analysis: not changed.
        models: one or two of its models.
        image_root: folder of the images; with None, and where an image is missing, outside of the
            folder, unreadable or of another size than the json says, the masks stand on grey. How
            many is logged.
        num_objects: how many pictures at most.
    """
    coco = analysis.coco
    tables = {x: analysis.objects[x] for x in models}
    first = tables[models[0]]
    rows = select_objects(list(tables.values()), num_objects)
    image_ids = [coco.anns[int(first.annotation_ids[row])]["image_id"] for row in rows]
    positions_of_image: dict = {}
    for position, image_id in enumerate(image_ids):
        positions_of_image.setdefault(image_id, []).append(position)

    pictures: list = [None] * len(rows)
    problems = Counter()
    for image_id, positions in positions_of_image.items():
        scene = _Scene(analysis, image_id, image_root)
        if scene.problem:
            problems[scene.problem] += 1
        for position in positions:
            pictures[position] = scene.draw(tables, int(rows[position]))
    if problems and image_root is not None:
        logger.warning(
            f"{image_root}: of {len(positions_of_image)} images with objects to show, "
            + ", ".join(f"{count} {problem}" for problem, count in sorted(problems.items()))
            + ". Their objects are drawn on grey."
        )
    return pictures


class _Scene:
    """An image and what its objects cover."""

    def __init__(self, analysis: Analysis, image_id, image_root: str | None):
        coco = analysis.coco
        self._analysis = analysis
        self._info = coco.imgs[image_id]
        self._pixels, self.problem = _read_image(self._info, image_root)
        seen_names = set(analysis.summary["dataset"]["seen_classes"])
        annotations = coco.imgToAnns[image_id]
        objects = [x for x in annotations if not x.get("iscrowd")]
        # The rule by which the false positives of the tables were counted.
        self._regions = find_object_regions(
            (self._info["height"], self._info["width"]),
            [coco.annToRLE(x) for x in objects],
            [coco.cats[x["category_id"]]["name"] in seen_names for x in objects],
            [coco.annToRLE(x) for x in annotations if x.get("iscrowd")],
            ties=analysis.summary["settings"].get("ties", "seen"),
        )

    def draw(self, tables: Mapping[str, ObjectTable], row: int) -> ObjectPicture:
        first = next(iter(tables.values()))
        coco = self._analysis.coco
        annotation = coco.anns[int(first.annotation_ids[row])]
        window = crop_window(annotation["bbox"], self._info["height"], self._info["width"])
        x0, y0, x1, y1 = window
        pixels = resize_crop(self._pixels[y0:y1, x0:x1])

        def crop_mask(rle: dict) -> np.ndarray:
            mask = mask_util.decode(rle)[y0:y1, x0:x1].astype(bool)
            return resize_mask(mask, pixels.shape[:2])

        own = crop_mask(coco.annToRLE(annotation))
        regions = [crop_mask(getattr(self._regions, x)) for x in ("seen", "objects", "all")]
        columns = [(draw_mask(pixels, own, WHITE), pixels)]
        models = list(self._analysis.objects)
        for model, table in tables.items():
            mask = crop_mask(table.rles[row])
            kinds = pixel_kinds(mask, own, *regions)
            colour = rgb(model_colour(models.index(model)))
            columns.append((draw_mask(pixels, mask, colour), draw_kinds(pixels, kinds, own)))
        picture = join_columns(columns)
        return ObjectPicture(
            annotation_id=annotation["id"],
            image_id=annotation["image_id"],
            file_name=self._info.get("file_name", ""),
            class_name=coco.cats[annotation["category_id"]]["name"],
            is_unseen=bool(first.is_unseen[row]),
            overlap=float(first.overlaps[row]),
            ious=tuple(float(x.ious[row]) for x in tables.values()),
            boundary_ious=tuple(float(x.boundary_ious[row]) for x in tables.values()),
            has_image=not self.problem,
            width=picture.shape[1],
            height=picture.shape[0],
            source=to_data_uri(picture),
        )


def _read_image(info: dict, image_root: str | None) -> tuple[np.ndarray, str]:
    """
    Returns:
        RGB uint8, shape (H, W, 3), and why it is plain grey ("" where it is not).
    """
    height, width = info["height"], info["width"]
    grey = np.full((height, width, 3), _GREY, dtype=np.uint8)
    if image_root is None:
        return grey, "without image_root"
    path = os.path.join(image_root, info.get("file_name", ""))
    # A report is passed on: a json of a stranger must not put a private picture into it.
    root = os.path.abspath(image_root)
    if os.path.commonpath([root, os.path.abspath(path)]) != root:
        return grey, "outside of this folder"
    if not os.path.isfile(path):
        return grey, "missing"
    try:
        with Image.open(path) as image:
            # As Detectron2 reads images: the camera's orientation is applied.
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    # Pillow raises SyntaxError for some broken PNG files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return grey, "unreadable"
    if pixels.shape[:2] != (height, width):
        return grey, "of another size than the annotations say"
    return pixels, ""
