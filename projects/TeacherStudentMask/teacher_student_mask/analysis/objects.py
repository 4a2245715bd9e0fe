"""Single objects: what each model's mask is like, and pictures of those that tell the most."""

import base64
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import detection_utils as utils
from PIL import Image
from pycocotools.coco import COCO

__all__ = [
    "ObjectTable",
    "PIXEL_COLORS",
    "boundary_iou",
    "count_pixels",
    "draw_objects",
    "extreme_objects",
    "find_object_regions",
    "measure_objects",
    "select_objects",
]

logger = logging.getLogger(__name__)

# What the pixels of a picture are; false positives are in the same colours in the figures.
PIXEL_COLORS = {
    "correct": "#0072b2",
    "missed": "#ffffff",
    "background": "#009e73",
    "seen": "#e69f00",
    "unseen": "#cc79a7",
}
_PANEL_SIZE = 160  # of a picture, longer side in pixels


@dataclass(frozen=True)
class ObjectTable:
    """
    One row per non-crowd object of the ground truth, in its order: n rows.

    Args:
        annotation_ids: int, shape (n,).
        overlaps: shape (n,), in [0, 1], Eq. (1) of the paper.
        is_unseen: bool, shape (n,).
        scores, ious: shape (n,), of the matched detection; nan where there is none.
        boundary_ious: shape (n,), in [0, 1]; nan everywhere if not measured.
        false_positives: int, shape (n, 3), pixels on background, seen and unseen objects.
        crowd_pixels: int, shape (n,), false positives under crowds alone, counted nowhere else.
        rles: the matched detections' masks as compressed RLE, None where there is none.
        protocol: "detections" or "gt_boxes".
        num_unmatched_detections: detections that took part and belong to no object.
    """

    annotation_ids: np.ndarray
    overlaps: np.ndarray
    is_unseen: np.ndarray
    scores: np.ndarray
    ious: np.ndarray
    boundary_ious: np.ndarray
    false_positives: np.ndarray
    crowd_pixels: np.ndarray
    rles: list[dict | None]
    protocol: str
    num_unmatched_detections: int

    @property
    def is_matched(self) -> np.ndarray:
        """bool, shape (n,)."""
        return ~np.isnan(self.ious)


def measure_objects(
    coco: COCO,
    detections: Sequence[dict],
    overlaps: Mapping[int, float],
    unseen_ids: Collection[int],
    *,
    protocol: str = "detections",
    score_threshold: float = 0.5,
) -> ObjectTable:
    """
    Find the detection of each object and compare the masks.

    They have one class and a box IoU of at least 0.5. With the protocol "detections", those of at
    least ``score_threshold`` choose by falling score. With "gt_boxes", detections were made on
    ground-truth boxes: all take part, the best fitting boxes first, and boundary IoU is measured.

    Args:
        coco: the ground truth, all masks compressed RLE.
        detections: as :func:`load_results` gives them.
        overlaps: {annotation id: overlap} of the non-crowd objects.
        unseen_ids: category ids of the unseen classes.
        protocol, score_threshold: see above.
    """
    is_on_gt_boxes = protocol == "gt_boxes"
    if not is_on_gt_boxes:
        detections = [x for x in detections if x["score"] >= score_threshold]
    objects = [x for x in coco.dataset["annotations"] if not x["iscrowd"]]
    rows = {x["id"]: k for k, x in enumerate(objects)}
    scores, ious, boundary_ious = np.full((3, len(rows)), np.nan)
    false_positives = np.zeros((len(rows), 3), dtype=np.int64)
    crowd_pixels = np.zeros(len(rows), dtype=np.int64)
    rles: list[dict | None] = [None] * len(rows)
    detections_of = defaultdict(list)
    # Stable: of equal scores the first in the file comes first.
    for x in sorted(detections, key=lambda x: -x["score"]):
        detections_of[x["image_id"]].append(x)
    for image_id, found in detections_of.items():
        objects_of_image = [x for x in coco.imgToAnns.get(image_id, []) if not x["iscrowd"]]
        pairs = _match(objects_of_image, found, by_iou=is_on_gt_boxes)
        regions = find_object_regions(coco, image_id, unseen_ids) if pairs else None
        for annotation, detection in pairs:
            row = rows[annotation["id"]]
            rles[row], own = detection["segmentation"], annotation["segmentation"]
            counts = count_pixels(rles[row], own, regions)
            scores[row] = detection["score"]
            ious[row] = counts["intersection"] / counts["union"] if counts["union"] else 0.0
            false_positives[row] = [counts[x] for x in ("background", "seen", "unseen")]
            crowd_pixels[row] = counts["crowd"]
            if is_on_gt_boxes:
                boundary_ious[row] = np.nan_to_num(boundary_iou(rles[row], own))
    return ObjectTable(
        annotation_ids=np.fromiter(rows, np.int64, len(rows)),
        overlaps=np.array([overlaps[i] for i in rows], dtype=np.float64),
        is_unseen=np.array([x["category_id"] in unseen_ids for x in objects], dtype=bool),
        scores=scores,
        ious=ious,
        boundary_ious=boundary_ious,
        false_positives=false_positives,
        crowd_pixels=crowd_pixels,
        rles=rles,
        protocol=protocol,
        num_unmatched_detections=len(detections) - sum(x is not None for x in rles),
    )


def _match(objects: list[dict], detections: list[dict], by_iou: bool) -> list[tuple[dict, dict]]:
    """Pairs of an object and a detection, one to one; detections by falling score."""
    if not objects:
        return []
    gt_boxes, dt_boxes = (
        np.array([x["bbox"] for x in rows], dtype=float) for rows in (objects, detections)
    )
    gt_classes, dt_classes = ([x["category_id"] for x in rows] for rows in (objects, detections))
    ious = mask_util.iou(dt_boxes, gt_boxes, [False] * len(objects))
    ious[np.not_equal.outer(dt_classes, gt_classes)] = 0
    d, g = np.nonzero(ious >= 0.5)
    # The best pairs first, or each detection in turn.
    order = np.lexsort((g, d, -ious[d, g])) if by_iou else np.lexsort((g, -ious[d, g], d))
    object_of: dict[int, int] = {}
    for i, j in zip(d[order].tolist(), g[order].tolist()):
        if i not in object_of and j not in object_of.values():
            object_of[i] = j
    return [(objects[j], detections[i]) for i, j in object_of.items()]


def find_object_regions(coco: COCO, image_id: int, unseen_ids: Collection[int]) -> dict[str, dict]:
    """
    Find the pixels of an image that its objects cover.

    Args:
        coco: the ground truth, all masks compressed RLE.
        image_id: of the image.
        unseen_ids: category ids of the unseen classes.

    Returns:
        Compressed RLEs: "seen", objects of seen classes, with those of unseen classes on them;
        "objects", any object; "all", crowds, too.
    """
    image, annotations = coco.imgs[image_id], coco.imgToAnns[image_id]
    nothing = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")

    def union(chosen: Sequence[dict]) -> dict:
        return mask_util.merge([mask_util.encode(nothing), *(x["segmentation"] for x in chosen)])

    objects = [x for x in annotations if not x["iscrowd"]]
    seen = [x for x in objects if x["category_id"] not in unseen_ids]
    return {"seen": union(seen), "objects": union(objects), "all": union(annotations)}


def count_pixels(predicted: dict, own: dict, regions: Mapping[str, dict]) -> dict[str, int]:
    """
    Attribute the pixels of a predicted mask (Fig. 3 of the paper, per instance).

    Args:
        predicted: compressed RLE of the prediction.
        own: compressed RLE of the object that it belongs to.
        regions: of :func:`find_object_regions`, ``own`` included.

    Returns:
        Pixels: "intersection" and "union" with ``own``; and of those outside ``own``, each counted
        once, "background", "seen" and "unseen" objects, and "crowd", under a crowd alone.
    """
    # On runs rather than pixels: no image is ever decoded.
    true_positive = _intersect(predicted, own)
    num_predicted, num_tp = _area(predicted), _area(true_positive)

    def count_outside_own(region: dict) -> int:
        return _area(_intersect(predicted, region)) - _area(_intersect(true_positive, region))

    seen, objects, all_ = (count_outside_own(regions[x]) for x in ("seen", "objects", "all"))
    return {
        "intersection": num_tp,
        "union": num_predicted + _area(own) - num_tp,
        "background": num_predicted - num_tp - all_,
        "seen": seen,
        "unseen": objects - seen,
        "crowd": all_ - objects,
    }


def boundary_iou(mask: dict, other: dict) -> float:
    """
    Boundary IoU of Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation
    Evaluation", CVPR 2021: the IoU of the parts of both masks that lie within d of their outline,
    d being 2 % of the image's diagonal, at least one pixel.

    Args:
        mask, other: compressed RLE of one size.

    Returns:
        In [0, 1]; nan if both are empty.
    """
    height, width = mask["size"]
    distance = max(1, round(0.02 * float(np.hypot(height, width))))
    masks = mask_util.decode([mask, other])
    # Pixels outside both boxes say nothing.
    left, top, width, height = mask_util.toBbox(mask_util.merge([mask, other])).astype(int)
    # With a frame of background: what touches the image's border is boundary, too.
    masks = np.pad(masks[top : top + height, left : left + width], ((1, 1), (1, 1), (0, 0)))
    eroded = cv2.erode(masks, np.ones((3, 3), np.uint8), iterations=distance)
    first, second = np.moveaxis(masks > eroded, -1, 0)
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else float("nan")


def _intersect(first: dict, second: dict) -> dict:
    return mask_util.merge([first, second], intersect=True)


def _area(rle: dict) -> int:
    return int(mask_util.area(rle))


def select_objects(tables: Sequence[ObjectTable], num_objects: int) -> np.ndarray:
    """
    Rows of the tables to show, those of unseen classes first.

    Of two models: objects that both have a mask for, by falling difference of the IoU. Of one:
    objects with false-positive pixels, by their falling share of the mask.
    """
    if len(tables) == 1:
        pixels = tables[0].false_positives.sum(axis=1)
        areas = np.array([0 if x is None else mask_util.area(x) for x in tables[0].rles])
        merit = pixels / np.maximum(areas, 1)
        rows = np.flatnonzero(pixels > 0)
    else:
        merit = np.abs(tables[1].ious - tables[0].ious)
        rows = np.flatnonzero(~np.isnan(merit))
    order = np.lexsort((-merit[rows], ~tables[0].is_unseen[rows]))
    return rows[order][:num_objects]


def extreme_objects(
    tables: Sequence[ObjectTable], num_objects: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of the first model's masks with the lowest IoU, lowest first, and with the highest, highest
    first, of the objects that all models have a mask for.
    """
    rows = np.flatnonzero(np.all([x.is_matched for x in tables], axis=0))
    order = rows[np.argsort(tables[0].ious[rows], kind="stable")]
    worst, others = order[:num_objects], order[num_objects:]
    return worst, others[::-1][:num_objects]


def draw_objects(
    coco: COCO, summary: Mapping, tables: Sequence[ObjectTable], rows: np.ndarray, image_root: str
) -> list[dict]:
    """
    Draw objects: the true mask, then that of each model.

    Args:
        coco, summary: of an :class:`Analysis`.
        tables: its objects of one or two models.
        rows: of the tables, the objects.
        image_root: folder of the images. Objects whose image is missing, broken, of another size,
            or outside of the folder are left out with a warning.

    Returns:
        The variables of the report's template for each picture.
    """
    unseen_names = set(summary["dataset"]["unseen_classes"])
    unseen_ids = {i for i, x in coco.cats.items() if x["name"] in unseen_names}
    pictures = []
    for row in rows.tolist():
        annotation = coco.anns[int(tables[0].annotation_ids[row])]
        image = coco.imgs[annotation["image_id"]]
        pixels = _read_grey(image, image_root)
        if pixels is None:
            continue
        regions = find_object_regions(coco, image["id"], unseen_ids)
        panels = _draw_panels(pixels, annotation, [x.rles[row] for x in tables], regions)
        _, data = cv2.imencode(".jpg", panels[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
        picture = {
            "annotation_id": annotation.get("id_in_file", annotation["id"]),
            "file_name": image["file_name"],
            "class_name": coco.cats[annotation["category_id"]]["name"],
            "is_unseen": bool(tables[0].is_unseen[row]),
            "overlap": float(tables[0].overlaps[row]),
            "ious": [float(x.ious[row]) for x in tables],
            "width": panels.shape[1],
            "height": panels.shape[0],
            "source": "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii"),
        }
        pictures.append(picture)
    if len(pictures) < len(rows):
        num_lost = len(rows) - len(pictures)
        logger.warning(f"{image_root}: the images of {num_lost} shown objects cannot be used.")
    return pictures


def _read_grey(image: Mapping, image_root: str) -> np.ndarray | None:
    """uint8, shape (H, W); None where the image cannot be used."""
    # A report is passed on: a json of a stranger must not put a private picture into it.
    root = os.path.abspath(image_root)
    path = os.path.abspath(os.path.join(root, image.get("file_name") or ""))
    if not path.startswith(os.path.join(root, "")):
        return None
    try:
        pixels = utils.read_image(path, "L")[..., 0]
    # Pillow raises SyntaxError for some broken PNG files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return pixels if pixels.shape == (image["height"], image["width"]) else None


def _draw_panels(
    pixels: np.ndarray, annotation: Mapping, masks: Sequence[dict], regions: Mapping[str, dict]
) -> np.ndarray:
    """The true mask and, for each predicted mask, what its pixels are; panels side by side, RGB."""
    # A square around the box, 30 % larger, as far as it is in the image.
    x, y, w, h = annotation["bbox"]
    ends = []
    for centre, length in ((x + w / 2, pixels.shape[1]), (y + h / 2, pixels.shape[0])):
        centre, half = min(max(centre, 0), length), 0.65 * max(w, h, 18.0)
        ends.append((max(0, round(centre - half)), min(length, round(centre + half))))
    (x0, x1), (y0, y1) = ends
    scale = _PANEL_SIZE / max(y1 - y0, x1 - x0)
    size = (max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale)))
    grey = 0.8 * cv2.resize(pixels[y0:y1, x0:x1], size, interpolation=cv2.INTER_AREA)[..., None]

    def decode(rle: dict) -> np.ndarray:
        mask = mask_util.decode(rle)[y0:y1, x0:x1].astype(np.float32)
        return cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR) >= 0.5

    own = decode(annotation["segmentation"])
    seen, objects, covered = (decode(regions[x]) for x in ("seen", "objects", "all"))
    outlines, _ = cv2.findContours(own.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    colors = [[int(x[i : i + 2], 16) for i in (1, 3, 5)] for x in PIXEL_COLORS.values()]
    gap = np.full((size[1], 3, 3), 255, np.uint8)
    panels = []
    for mask in (own, *(decode(x) for x in masks)):
        # In the order of PIXEL_COLORS; of several, the first.
        kinds = [mask & own, own, mask & ~covered, mask & seen, mask & objects]
        tinted = [0.45 * grey + 0.55 * np.array(color) for color in colors]
        panel = np.select([x[..., None] for x in kinds], tinted, np.repeat(grey, 3, axis=2))
        panel = np.ascontiguousarray(panel.astype(np.uint8))
        panels += [gap, cv2.drawContours(panel, outlines, -1, (255, 255, 255), 1)]
    return np.hstack(panels[1:])
