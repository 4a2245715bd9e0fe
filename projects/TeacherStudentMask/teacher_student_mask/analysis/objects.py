"""What a model's masks are like on each annotated object."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from ..evaluation import boundary_iou, count_pixels, find_object_regions

__all__ = ["ObjectTable", "match_boxes", "measure_objects"]

# Of the box of a detection and the box of the object that it is taken for.
_MIN_BOX_IOU = 0.5


@dataclass(frozen=True)
class ObjectTable:
    """
    One row per non-crowd object of the ground truth, in its order.

    Args:
        annotation_ids: int, shape (n,).
        overlaps: shape (n,), in [0, 1], Eq. (1) of the paper.
        is_unseen: bool, shape (n,).
        scores: shape (n,), of the matched detection; nan where there is none, as in the IoUs.
        ious: shape (n,), mask IoU in [0, 1].
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


def match_boxes(
    gt_boxes: np.ndarray, dt_boxes: np.ndarray, *, by_iou: bool = False
) -> list[tuple[int, int]]:
    """
    Assign detections of one image and class to objects, one to one, at a box IoU of at least 0.5.

    Args:
        gt_boxes, dt_boxes: shape (G, 4) and (D, 4), XYWH absolute; detections by falling score.
        by_iou: assign the pairs of the highest IoU first. Otherwise detections choose in their
            order, each the free object of the highest IoU.

    Returns:
        Pairs (object, detection).
    """
    if len(gt_boxes) == 0 or len(dt_boxes) == 0:
        return []
    ious = mask_util.iou(
        np.asarray(dt_boxes, dtype=np.float64),
        np.asarray(gt_boxes, dtype=np.float64),
        [False] * len(gt_boxes),
    )
    d, g = np.nonzero(ious >= _MIN_BOX_IOU)
    order = np.lexsort((g, d, -ious[d, g])) if by_iou else np.lexsort((g, -ious[d, g], d))
    taken_d, taken_g, pairs = set(), set(), []
    for i, j in zip(d[order].tolist(), g[order].tolist()):
        if i not in taken_d and j not in taken_g:
            taken_d.add(i)
            taken_g.add(j)
            pairs.append((j, i))
    return pairs


def measure_objects(
    coco: COCO,
    detections: Sequence[dict],
    overlaps: Mapping[int, float],
    unseen_ids: Collection[int],
    *,
    protocol: str = "detections",
    score_threshold: float = 0.5,
    ties: str = "seen",
) -> ObjectTable:
    """
    Find the detection of each object and compare the masks.

    With the protocol "detections", those of at least ``score_threshold`` take part and choose
    among the objects of their class by falling score. With "gt_boxes", detections were made on
    ground-truth boxes: all take part, the best fitting boxes first, and boundary IoU is measured.

    Args:
        coco: the ground truth, all masks compressed RLE.
        detections: as :func:`load_results` gives them.
        overlaps: {annotation id: overlap} of the non-crowd objects.
        unseen_ids: category ids of the unseen classes.
        protocol, score_threshold: see above.
        ties: see :func:`find_object_regions`.
    """
    if protocol == "detections":
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
        image, annotations = coco.imgs[image_id], coco.imgToAnns.get(image_id, [])
        in_image = [x for x in annotations if not x["iscrowd"]]
        pairs = _match_image(in_image, found, by_iou=protocol == "gt_boxes")
        if not pairs:
            continue
        regions = find_object_regions(
            (image["height"], image["width"]),
            [x["segmentation"] for x in in_image],
            [x["category_id"] not in unseen_ids for x in in_image],
            [x["segmentation"] for x in annotations if x["iscrowd"]],
            ties=ties,
        )
        for annotation, detection in pairs:
            row = rows[annotation["id"]]
            rles[row], own = detection["segmentation"], annotation["segmentation"]
            counts = count_pixels(rles[row], own, regions)
            scores[row] = detection["score"]
            ious[row] = counts.intersection / counts.union if counts.union else 0.0
            false_positives[row] = counts.background, counts.seen, counts.unseen
            crowd_pixels[row] = counts.crowd
            if protocol == "gt_boxes":
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


def _match_image(
    objects: list[dict], detections: list[dict], by_iou: bool
) -> list[tuple[dict, dict]]:
    """Pairs of an object and a detection of its class; detections by falling score."""
    by_class = defaultdict(lambda: ([], []))
    for x in objects:
        by_class[x["category_id"]][0].append(x)
    for x in detections:
        by_class[x["category_id"]][1].append(x)
    return [
        (of_class[g], found[d])
        for of_class, found in by_class.values()
        for g, d in match_boxes(
            np.array([x["bbox"] for x in of_class]),
            np.array([x["bbox"] for x in found]),
            by_iou=by_iou,
        )
    ]
