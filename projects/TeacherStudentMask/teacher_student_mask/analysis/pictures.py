"""Pictures of single objects: what one or two models made of those that tell the most."""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pycocotools.mask as mask_util
from PIL import Image, ImageOps

from ..evaluation import ObjectRegions, find_object_regions
from .figures import ERROR_COLORS

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from .measure import Analysis
    from .objects import ObjectTable

__all__ = ["PIXEL_COLORS", "ObjectPicture", "draw_objects", "models_to_picture", "select_objects"]

# What the pixels of a panel are, and their colours, in the order in which they are painted.
PIXEL_COLORS = {"correct": "#0072b2", "missed": "#ffffff", **ERROR_COLORS}

_PANEL_SIZE = 160  # longer side, pixels
_GREY = 150


@dataclass(frozen=True)
class ObjectPicture:
    """One object as the report shows it: a panel for the true mask, and one for each model."""

    annotation_id: int
    file_name: str
    class_name: str
    is_unseen: bool
    overlap: float
    ious: tuple[float, ...]  # one per model
    width: int
    height: int
    source: str  # data URI


def models_to_picture(analysis: Analysis) -> list[str]:
    """
    The models to compare in pictures: the first two whose masks were made in the same way.

    Returns:
        One name if there are no two: IoU on detected and on ground-truth boxes do not compare.
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
        is_eligible = table.is_matched & (pixels > 0)
    else:
        a, b = tables
        is_eligible = a.is_matched & b.is_matched
        merit = np.abs(np.where(is_eligible, b.ious - a.ious, 0.0))
    rows = np.flatnonzero(is_eligible)
    order = np.lexsort((-merit[rows], ~tables[0].is_unseen[rows]))
    return rows[order][:num_objects]


def draw_objects(
    analysis: Analysis, models: Sequence[str], image_root: str | None, num_objects: int
) -> tuple[list[ObjectPicture], dict[str, int]]:
    """
    Draw the objects that :func:`select_objects` chooses.

    Args:
        analysis: not changed.
        models: one or two of its models.
        image_root: folder of the images; with None, and where an image cannot be used, the masks
            stand on grey.
        num_objects: how many pictures at most.

    Returns:
        The pictures, and {why an image could not be used: number of objects}.
    """
    coco = analysis.coco
    tables = [analysis.objects[x] for x in models]
    rows = select_objects(tables, num_objects).tolist()
    pictures: list = [None] * len(rows)
    problems: Counter = Counter()
    image_ids = [coco.anns[int(tables[0].annotation_ids[row])]["image_id"] for row in rows]
    # Image by image, so that each is read once.
    last, pixels, problem, regions = None, None, "", None
    for position in sorted(range(len(rows)), key=lambda i: image_ids[i]):
        row = rows[position]
        annotation = coco.anns[int(tables[0].annotation_ids[row])]
        info = coco.imgs[annotation["image_id"]]
        if info is not last:
            pixels, problem = _read_image(info, image_root)
            regions = _regions(coco, info, analysis.summary)
            last = info
        problems[problem] += bool(problem)
        masks = [table.rles[row] for table in tables]
        panels = _draw_panels(pixels, annotation, masks, regions)
        pictures[position] = ObjectPicture(
            annotation_id=annotation["id"],
            file_name=info.get("file_name", ""),
            class_name=coco.cats[annotation["category_id"]]["name"],
            is_unseen=bool(tables[0].is_unseen[row]),
            overlap=float(tables[0].overlaps[row]),
            ious=tuple(float(x.ious[row]) for x in tables),
            width=panels.shape[1],
            height=panels.shape[0],
            source=_to_data_uri(panels),
        )
    return pictures, {why: n for why, n in problems.items() if n}


def _regions(coco: COCO, info: Mapping, summary: Mapping) -> ObjectRegions:
    # By the rule by which the false positives of the tables were counted.
    seen_names = set(summary["dataset"]["seen_classes"])
    annotations = coco.imgToAnns[info["id"]]
    objects = [x for x in annotations if not x["iscrowd"]]
    return find_object_regions(
        (info["height"], info["width"]),
        [x["segmentation"] for x in objects],
        [coco.cats[x["category_id"]]["name"] in seen_names for x in objects],
        [x["segmentation"] for x in annotations if x["iscrowd"]],
        ties=summary["settings"]["ties"],
    )


def _draw_panels(
    pixels: np.ndarray, annotation: Mapping, masks: Sequence[dict], regions: ObjectRegions
) -> np.ndarray:
    """The true mask and, for each predicted mask, what its pixels are; panels side by side, RGB."""
    x0, y0, x1, y1 = _crop_window(annotation["bbox"], *pixels.shape[:2])
    crop = pixels[y0:y1, x0:x1]
    scale = _PANEL_SIZE / max(crop.shape[:2])
    size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
    crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)

    def decode(rle: dict) -> np.ndarray:
        mask = mask_util.decode(rle)[y0:y1, x0:x1].astype(np.float32)
        return cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR) >= 0.5

    own, seen, objects, covered = (
        decode(x) for x in (annotation["segmentation"], regions.seen, regions.objects, regions.all)
    )
    panels = [_paint(crop, {"correct": own}, own)]
    for rle in masks:
        mask = decode(rle)
        wrong = mask & ~own
        kinds = {
            "correct": mask & own,
            "missed": own & ~mask,
            "background": wrong & ~covered,
            "seen": wrong & seen,
            "unseen": wrong & objects & ~seen,
        }
        panels.append(_paint(crop, kinds, own))
    gap = np.full((size[1], 3, 3), 255, np.uint8)
    return np.hstack([x for panel in panels for x in (gap, panel)][1:])


def _paint(pixels: np.ndarray, kinds: Mapping[str, np.ndarray], own: np.ndarray) -> np.ndarray:
    """RGB pixels, grey but for the kinds of :data:`PIXEL_COLORS`, and the outline of an object."""
    drawn = np.repeat(0.8 * pixels.mean(axis=2, keepdims=True), 3, axis=2)
    for kind, color in PIXEL_COLORS.items():
        if kind in kinds:
            rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
            drawn[kinds[kind]] = 0.45 * drawn[kinds[kind]] + 0.55 * rgb
    drawn = np.ascontiguousarray(drawn.astype(np.uint8))
    outlines, _ = cv2.findContours(own.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(drawn, outlines, -1, (255, 255, 255), 1)


def _crop_window(box: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """A window around a box XYWH: 30 % larger, not too small, inside the image; X0Y0X1Y1."""
    x, y, w, h = box
    # A ski would otherwise be a strip in which nothing can be recognised.
    sides = max(1.3 * w, h, 24.0), max(1.3 * h, w, 24.0)
    ends = []
    for centre, side, limit in ((x + w / 2, sides[0], width), (y + h / 2, sides[1], height)):
        side = min(round(side), limit)
        start = min(max(0, round(centre - side / 2)), limit - side)
        ends.append((start, start + side))
    return ends[0][0], ends[1][0], ends[0][1], ends[1][1]


def _to_data_uri(pixels: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", pixels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def _read_image(info: Mapping, image_root: str | None) -> tuple[np.ndarray, str]:
    """RGB uint8, shape (H, W, 3), and why it is plain grey ("" where it is not)."""
    height, width = info["height"], info["width"]
    grey = np.full((height, width, 3), _GREY, dtype=np.uint8)
    if image_root is None:
        return grey, ""
    # A report is passed on: a json of a stranger must not put a private picture into it.
    root = os.path.abspath(image_root)
    path = os.path.abspath(os.path.join(root, info.get("file_name", "")))
    if os.path.commonpath([root, path]) != root:
        return grey, "outside of the folder"
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
