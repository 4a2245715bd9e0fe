"""Matching of detected with annotated masks, done once for all subsets of the objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

__all__ = ["IOU_THRESHOLDS", "CandidatePairs", "Matches", "find_candidate_pairs"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)

# What a detection is matched to, where it is not the number of an object.
_NOTHING, _CROWD = -1, -2


@dataclass(frozen=True)
class CandidatePairs:
    """
    All pairs of a detection and an object of one image and class that could match.

    G objects and D detections; images and classes by their position in ``image_ids`` and
    ``category_ids``. Objects are ordered by image; detections by class, and within a class by
    falling score, as precision is accumulated. ``pair_*`` have one entry per pair whose IoU (for a
    crowd: intersection over the detection's area) reaches the lowest threshold, ordered by
    detection.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    gt_ids: np.ndarray
    gt_images: np.ndarray
    gt_classes: np.ndarray
    gt_areas: np.ndarray
    gt_is_crowd: np.ndarray
    dt_images: np.ndarray
    dt_classes: np.ndarray
    dt_areas: np.ndarray
    pair_dt: np.ndarray
    pair_gt: np.ndarray
    pair_iou: np.ndarray

    def positions_of_classes(self, category_ids: Collection[int]) -> list[int]:
        """Positions in ``category_ids`` of those ids of the json that are there."""
        return np.flatnonzero(np.isin(self.category_ids, list(category_ids))).tolist()


def find_candidate_pairs(
    coco: COCO,
    detections: Sequence[dict],
    *,
    max_detections: int = 100,
    image_ids: Sequence[int] | None = None,
    ious: Mapping[tuple[int, int], np.ndarray] | None = None,
) -> CandidatePairs:
    """
    Compute the mask IoU of detections and objects of the same image and class.

    Args:
        coco: the objects, with masks, ``area`` and ``iscrowd``.
        detections: ``image_id``, ``category_id``, ``score``, ``area`` and ``segmentation`` (a
            compressed RLE) of each, as :func:`load_results` or ``COCO.loadRes`` gives them.
        max_detections: of an image and class, those of the highest scores take part.
        image_ids: of the images to take; None: all.
        ious: {(image id, category id): IoU, shape (detections by falling score, objects)} where
            they are known already, as ``COCOeval.ious``.
    """
    if image_ids is not None:
        chosen = set(image_ids)
        detections = [x for x in detections if x["image_id"] in chosen]
    image_ids = np.unique(coco.getImgIds() if image_ids is None else image_ids)
    category_ids = np.unique(coco.getCatIds())
    known = set(category_ids.tolist())
    objects = [
        x
        for i in image_ids.tolist()
        for x in coco.imgToAnns.get(i, [])
        if x["category_id"] in known
    ]
    gt_images = np.searchsorted(image_ids, _column(objects, "image_id", np.int64))
    gt_classes = np.searchsorted(category_ids, _column(objects, "category_id", np.int64))
    is_crowd = _column(objects, "iscrowd", bool)

    dt_images = np.searchsorted(image_ids, _column(detections, "image_id", np.int64))
    dt_classes = np.searchsorted(category_ids, _column(detections, "category_id", np.int64))
    scores = _column(detections, "score", np.float64)
    # Of equal scores the first in the file comes first: lexsort is stable.
    by_group = np.lexsort((-scores, dt_images, dt_classes))
    rank = _rank_in_group(dt_classes[by_group] * len(image_ids) + dt_images[by_group])
    by_group = by_group[rank < max_detections]
    by_class = by_group[np.lexsort((-scores[by_group], dt_classes[by_group]))]
    position = np.empty(len(detections), dtype=np.int64)
    position[by_class] = np.arange(len(by_class))

    gt_groups = _split_by_group(gt_classes, gt_images, np.arange(len(objects)))
    dt_groups = _split_by_group(dt_classes[by_group], dt_images[by_group], by_group)
    pairs = []
    for group, gts in gt_groups.items():
        dts = dt_groups.get(group)
        if dts is None:
            continue
        if ious is None:
            iou = mask_util.iou(
                [detections[i]["segmentation"] for i in dts],
                [_rle(coco, objects[j]) for j in gts],
                is_crowd[gts].tolist(),
            )
        else:
            iou = np.asarray(ious[int(image_ids[group[1]]), int(category_ids[group[0]])])
        d, g = np.nonzero(iou >= IOU_THRESHOLDS[0])
        pairs.append((position[dts[d]], gts[g], iou[d, g]))
    pair_dt, pair_gt, pair_iou = (
        np.concatenate(column) if pairs else np.zeros(0, dtype)
        for column, dtype in zip(zip(*pairs) if pairs else [[]] * 3, (np.int64, np.int64, float))
    )
    order = np.lexsort((pair_gt, pair_dt))
    return CandidatePairs(
        image_ids=image_ids,
        category_ids=category_ids,
        gt_ids=_column(objects, "id", np.int64),
        gt_images=gt_images,
        gt_classes=gt_classes,
        gt_areas=_column(objects, "area", np.float64),
        gt_is_crowd=is_crowd,
        dt_images=dt_images[by_class],
        dt_classes=dt_classes[by_class],
        dt_areas=_column(detections, "area", np.float64)[by_class],
        pair_dt=pair_dt[order],
        pair_gt=pair_gt[order],
        pair_iou=pair_iou[order],
    )


class Matches:
    """
    Which object each detection is matched to, at each IoU threshold: COCOeval's rule.

    Detections choose by falling score: each takes the free object of the highest IoU, at least the
    threshold, and an ignored object only where it finds no other. So which objects are ignored can
    change the matching, but only where a detection has a choice. Such images and classes, few in
    practice, are matched again for each set of ignored objects; all others once.
    """

    def __init__(self, pairs: CandidatePairs):
        self.pairs = pairs
        num_candidates = np.bincount(pairs.pair_dt, minlength=len(pairs.dt_images))
        is_crowd_pair = pairs.gt_is_crowd[pairs.pair_gt]
        num_crowds = np.bincount(pairs.pair_dt[is_crowd_pair], minlength=len(pairs.dt_images))
        has_choice = (num_candidates > 1) & (num_crowds < num_candidates)
        group = pairs.dt_classes * len(pairs.image_ids) + pairs.dt_images
        in_choice_group = np.isin(group, group[has_choice])
        pair_has_choice = in_choice_group[pairs.pair_dt]
        self._groups = _split_pairs(group[pairs.pair_dt], pair_has_choice)

        dt, gt = self._match_without_choice(~pair_has_choice & ~is_crowd_pair)
        only_crowd = np.flatnonzero((num_crowds > 0) & ~in_choice_group)
        crowd_iou = np.zeros(len(pairs.dt_images))
        np.maximum.at(crowd_iou, pairs.pair_dt[is_crowd_pair], pairs.pair_iou[is_crowd_pair])
        dt = [
            np.concatenate([d, only_crowd[crowd_iou[only_crowd] >= t]])
            for d, t in zip(dt, _reachable(IOU_THRESHOLDS))
        ]
        gt = [np.concatenate([g, np.full(len(d) - len(g), _CROWD)]) for d, g in zip(dt, gt)]
        choosing = np.unique(pairs.pair_dt[pair_has_choice])
        self._choosing = choosing
        self._num_thresholds = len(IOU_THRESHOLDS)
        threshold = np.repeat(np.arange(len(dt)), [len(d) + len(choosing) for d in dt])
        position = np.concatenate([np.concatenate([d, choosing]) for d in dt])
        matched = np.concatenate([np.concatenate([g, np.full(len(choosing), -3)]) for g in gt])
        order = np.lexsort((position, threshold))
        #: Threshold and detection of all entries that are matched for some ignored objects.
        self.threshold, self.position = threshold[order], position[order]
        self._matched = matched[order]
        self._choosing_entries = np.flatnonzero(self._matched == -3)
        self.unrestricted = self.match(np.zeros(len(pairs.gt_ids), dtype=bool))

    def match(self, ignored: np.ndarray) -> np.ndarray:
        """
        Args:
            ignored: bool, shape (G,); crowds are ignored in any case.

        Returns:
            int, one per entry of ``threshold`` and ``position``: the number of the object, -1 for
            none, -2 for a crowd.
        """
        result = self._matched.copy()
        table = np.full((self._num_thresholds, len(self._choosing)), _NOTHING)
        for group in self._groups:
            self._match_group(group, ignored, table)
        result[self._choosing_entries] = table.ravel()
        return result

    def _match_without_choice(self, is_eligible: np.ndarray) -> tuple[list, list]:
        # Every detection has one candidate at most, so an object goes to the first that reaches it.
        pairs = self.pairs
        dt, gt, iou = (x[is_eligible] for x in (pairs.pair_dt, pairs.pair_gt, pairs.pair_iou))
        order = np.lexsort((dt, gt))
        dt, gt, iou = dt[order], gt[order], iou[order]
        dts, gts = [], []
        for t in _reachable(IOU_THRESHOLDS):
            reaches = iou >= t
            d, g = dt[reaches], gt[reaches]
            is_first = np.diff(g, prepend=-1) != 0
            dts.append(d[is_first])
            gts.append(g[is_first])
        return dts, gts

    def _match_group(self, group: np.ndarray, ignored: np.ndarray, table: np.ndarray) -> None:
        """Match the detections of one image and class, whose pairs are ``group``."""
        pairs = self.pairs
        dts, gts = pairs.pair_dt[group], pairs.pair_gt[group]
        is_crowd = {int(g): bool(pairs.gt_is_crowd[g]) for g in gts}
        is_ignored = {g: is_crowd[g] or bool(ignored[g]) for g in is_crowd}
        by_dt = defaultdict(list)
        for d, g, iou in zip(dts.tolist(), gts.tolist(), pairs.pair_iou[group].tolist()):
            by_dt[d].append((is_ignored[g], g, iou))
        columns = np.searchsorted(self._choosing, list(by_dt))
        for row, t in enumerate(_reachable(IOU_THRESHOLDS)):
            taken = set()
            # Detections stand in the order of falling scores.
            for column, candidates in zip(columns, by_dt.values()):
                best, best_iou, best_is_ignored = _NOTHING, t, True
                # Objects that count come first; of equal IoU the last one wins, as in COCOeval.
                for g_is_ignored, g, iou in sorted(candidates, key=lambda x: x[:2]):
                    if g in taken and not is_crowd[g]:
                        continue
                    if best != _NOTHING and not best_is_ignored and g_is_ignored:
                        break
                    if iou >= best_iou:
                        best, best_iou, best_is_ignored = g, iou, g_is_ignored
                if best != _NOTHING:
                    taken.add(best)
                    table[row, column] = _CROWD if is_crowd[best] else best


def _reachable(thresholds: np.ndarray) -> np.ndarray:
    # As COCOeval: an IoU of 1 less rounding reaches a threshold of 1.
    return np.minimum(thresholds, 1 - 1e-10)


def _rle(coco: COCO, annotation: dict) -> dict:
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (bytes, str)):
        return segmentation
    return coco.annToRLE(annotation)


def _column(rows: Sequence[dict], key: str, dtype) -> np.ndarray:
    return np.fromiter((x[key] for x in rows), dtype, len(rows))


def _rank_in_group(sorted_groups: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(sorted_groups, prepend=-1))
    sizes = np.diff(np.append(starts, len(sorted_groups)))
    return np.arange(len(sorted_groups)) - np.repeat(starts, sizes)


def _split_by_group(classes: np.ndarray, images: np.ndarray, values: np.ndarray) -> dict:
    """{(class, image): its values in their order}."""
    order = np.lexsort((images, classes))
    keys = np.stack([classes[order], images[order]], axis=1)
    starts = np.flatnonzero((np.diff(keys, axis=0, prepend=-1) != 0).any(axis=1))
    parts = np.split(values[order], starts[1:])
    return {(int(c), int(i)): part for (c, i), part in zip(keys[starts], parts)}


def _split_pairs(groups: np.ndarray, is_selected: np.ndarray) -> list[np.ndarray]:
    selected = np.flatnonzero(is_selected)
    selected = selected[np.argsort(groups[selected], kind="stable")]
    if len(selected) == 0:
        return []
    return np.split(selected, np.flatnonzero(np.diff(groups[selected])) + 1)
