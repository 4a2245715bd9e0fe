"""COCO mask AP of any subset of the objects from one matching, also for resampled images."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

__all__ = [
    "AREA_RANGES",
    "CandidatePairs",
    "IOU_THRESHOLDS",
    "Matches",
    "PrecisionOfSubsets",
    "Subset",
    "at_iou",
    "find_candidate_pairs",
    "mean_percent",
]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Of the objects' areas in pixels; both ends belong to the range, as in COCOeval.
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
_RECALLS = np.linspace(0, 1, 101)
_NEXT_RECALLS = np.append(_RECALLS[1:], np.inf)
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


def find_candidate_pairs(
    coco: COCO,
    detections: Sequence[dict],
    *,
    max_detections: int = 100,
    image_ids: Sequence[int] | None = None,
    ious: Mapping[tuple[int, int], np.ndarray] | None = None,
    iou_type: str = "segm",
) -> CandidatePairs:
    """
    Compute the IoU of detections and objects of the same image and class.

    Args:
        coco: the objects, with masks (or boxes), ``area`` and ``iscrowd``.
        detections: ``image_id``, ``category_id``, ``score``, ``area`` and ``segmentation`` (a
            compressed RLE) of each, as :func:`load_results` or ``COCO.loadRes`` gives them.
        max_detections: of an image and class, those of the highest scores take part.
        image_ids: of the images to take; None: all.
        ious: {(image id, category id): IoU, shape (detections by falling score, objects)} where
            they are known already, as ``COCOeval.ious``.
        iou_type: "segm", of the masks, or "bbox", of the boxes (``bbox``), whose area then is that
            of the detection.
    """
    if image_ids is not None:
        chosen = set(image_ids)
        detections = [x for x in detections if x["image_id"] in chosen]
    image_ids = np.unique(coco.getImgIds() if image_ids is None else image_ids)
    category_ids = np.unique(coco.getCatIds())
    objects = [x for i in image_ids.tolist() for x in coco.imgToAnns.get(i, [])]
    gt_images = np.searchsorted(image_ids, _column(objects, "image_id", np.int64))
    gt_classes = np.searchsorted(category_ids, _column(objects, "category_id", np.int64))
    is_crowd = _column(objects, "iscrowd", bool)

    dt_images = np.searchsorted(image_ids, _column(detections, "image_id", np.int64))
    dt_classes = np.searchsorted(category_ids, _column(detections, "category_id", np.int64))
    scores = _column(detections, "score", np.float64)
    # Of equal scores the first in the file comes first.
    by_score = np.argsort(-scores, kind="stable")
    dt_groups = {
        group: by_score[x[:max_detections]]
        for group, x in _by_group((dt_classes * len(image_ids) + dt_images)[by_score]).items()
    }
    kept = np.concatenate([np.zeros(0, np.int64), *dt_groups.values()])
    by_class = kept[np.lexsort((-scores[kept], dt_classes[kept]))]
    position = np.empty(len(detections), dtype=np.int64)
    position[by_class] = np.arange(len(by_class))

    is_mask = iou_type == "segm"
    pairs = []
    for group, gts in _by_group(gt_classes * len(image_ids) + gt_images).items():
        dts = dt_groups.get(group)
        if dts is None:
            continue
        if ious is None:
            iou = mask_util.iou(
                [detections[i]["segmentation" if is_mask else "bbox"] for i in dts],
                [coco.annToRLE(objects[j]) if is_mask else objects[j]["bbox"] for j in gts],
                is_crowd[gts].tolist(),
            )
        else:
            category, image = divmod(group, len(image_ids))
            iou = np.asarray(ious[int(image_ids[image]), int(category_ids[category])])
        d, g = np.nonzero(iou >= IOU_THRESHOLDS[0])
        pairs.append((position[dts[d]], gts[g], iou[d, g]))
    none = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    pair_dt, pair_gt, pair_iou = (np.concatenate(x) for x in zip(none, *pairs))
    order = np.lexsort((pair_gt, pair_dt))
    if is_mask:
        dt_areas = _column(detections, "area", np.float64)
    else:
        dt_areas = np.array([w * h for *_, w, h in (x["bbox"] for x in detections)], np.float64)
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
        dt_areas=dt_areas[by_class],
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
        # Detections with a candidate, one column of the table each.
        dts, self._columns, num_candidates = np.unique(
            pairs.pair_dt, return_inverse=True, return_counts=True
        )
        groups = _by_group(
            (pairs.dt_classes * len(pairs.image_ids) + pairs.dt_images)[pairs.pair_dt]
        )
        # What is on a crowd is matched again, too, although it has no choice.
        pair_has_choice = num_candidates[self._columns] > 1
        pair_has_choice |= pairs.gt_is_crowd[pairs.pair_gt]
        self._table = np.full((len(IOU_THRESHOLDS), len(dts)), _NOTHING)
        nothing_ignored = np.zeros(len(pairs.gt_ids), dtype=bool)
        self._groups = []
        has_choice = np.zeros(len(dts), dtype=bool)
        for group in groups.values():
            self._match_group(group, nothing_ignored, self._table)
            if pair_has_choice[group].any():
                self._groups.append(group)
                has_choice[self._columns[group]] = True
        self._is_entry = (self._table != _NOTHING) | has_choice
        #: Threshold and detection of all entries that are matched for some ignored objects.
        self.threshold, columns = np.nonzero(self._is_entry)
        self.position = dts[columns]
        self.unrestricted = self._table[self._is_entry]

    def match(self, ignored: np.ndarray) -> np.ndarray:
        """
        Match again where the ignored objects, bool, shape (G,), matter; crowds always are ignored.

        Returns:
            int, one per entry of ``threshold`` and ``position``: the number of the object, -1 for
            none, -2 for a crowd.
        """
        table = self._table.copy()
        for group in self._groups:
            self._match_group(group, ignored, table)
        return table[self._is_entry]

    def _match_group(self, group: np.ndarray, ignored: np.ndarray, table: np.ndarray) -> None:
        """Match the detections of one image and class, whose pairs are ``group``."""
        gts = self.pairs.pair_gt[group]
        is_crowd = self.pairs.gt_is_crowd[gts]
        crowds = set(gts[is_crowd].tolist())
        is_ignored = (ignored[gts] | is_crowd).tolist()
        # Detections stand in the order of falling scores.
        by_dt = defaultdict(list)
        ious = self.pairs.pair_iou[group].tolist()
        for column, *candidate in zip(
            self._columns[group].tolist(), is_ignored, gts.tolist(), ious
        ):
            by_dt[column].append(candidate)
        for candidates in by_dt.values():
            candidates.sort()  # objects that count come first
        for t, row in zip(IOU_THRESHOLDS.tolist(), table):
            taken = set()
            for column, candidates in by_dt.items():
                best = None
                for candidate in candidates:
                    candidate_is_ignored, g, iou = candidate
                    if g in taken:
                        continue
                    if best is not None and candidate_is_ignored and not best[0]:
                        break
                    # Of equal IoU the last one wins, as in COCOeval.
                    if iou >= (t if best is None else best[2]):
                        best = candidate
                if best is None:
                    row[column] = _NOTHING
                elif best[1] in crowds:
                    row[column] = _CROWD
                else:
                    row[column] = best[1]
                    taken.add(best[1])


@dataclass(frozen=True)
class Subset:
    """
    Args:
        counts: bool, shape (G,), the objects of the subset. Others are ignored: what is matched to
            one is neither right nor wrong. What is matched to nothing is wrong as always.
        area: of :data:`AREA_RANGES`. Objects outside are ignored as well, and so is what is
            matched to nothing and has an area outside.
    """

    counts: np.ndarray
    area: str = "all"


class PrecisionOfSubsets:
    """
    Average precision per IoU threshold and class, for several subsets at once.

    What COCOeval sums over all detections is split here: detections and matches are counted once
    for all subsets of an area range, true positives per subset. That makes bootstrap intervals
    affordable.
    """

    def __init__(self, matches: Matches, subsets: Mapping[str, Subset]):
        self._pairs = pairs = matches.pairs
        self._entry_images = pairs.dt_images[matches.position]
        is_matched = matches.unrestricted != _NOTHING
        self._counts = {}
        for area in {x.area for x in subsets.values()}:
            counts = _in_range(pairs.dt_areas, area)
            self._counts[area] = counts, is_matched & counts[matches.position]
        self._subsets = {name: _TruePositives(matches, x) for name, x in subsets.items()}

    def __call__(self, image_weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """
        Args:
            image_weights: int, shape (..., images), how often each of ``image_ids`` counts, for one
                or several draws of the images; None: once.

        Returns:
            {name of the subset: AP in [0, 1], shape (..., IoU thresholds, classes)}; nan for a
            class without an object.
        """
        if image_weights is None:
            image_weights = np.ones(len(self._pairs.image_ids))
        image_weights = np.asarray(image_weights).astype(np.int32)
        dt_weights = image_weights[..., self._pairs.dt_images]
        entry_weights = image_weights[..., self._entry_images]
        counts = {
            area: (_exclusive_cumsum(dt_weights * dts), _exclusive_cumsum(entry_weights * entries))
            for area, (dts, entries) in self._counts.items()
        }
        return {
            name: subset.average_precision(*counts[subset.area], image_weights)
            for name, subset in self._subsets.items()
        }


class _TruePositives:
    """
    The true positives of one subset, as far as they do not depend on the weights of the images.

    They are ordered by segment, one segment per IoU threshold and class, then by falling score.
    """

    def __init__(self, matches: Matches, subset: Subset):
        pairs = matches.pairs
        self.area = subset.area
        counts = subset.counts & ~pairs.gt_is_crowd & _in_range(pairs.gt_areas, subset.area)
        self._num_classes = len(pairs.category_ids)
        # Objects per image and class; float, as BLAS multiplies no integers: exact to 2^24 objects.
        self._num_gt = np.zeros((len(pairs.image_ids), self._num_classes), dtype=np.float32)
        np.add.at(self._num_gt, (pairs.gt_images[counts], pairs.gt_classes[counts]), 1)

        matched = matches.match(~counts)
        is_tp = matched >= 0
        is_tp[is_tp] = counts[matched[is_tp]]
        self._entries = np.flatnonzero(is_tp)
        self._positions = matches.position[self._entries]
        self._images = pairs.dt_images[self._positions]
        classes = pairs.dt_classes[matches.position]
        segment = matches.threshold * self._num_classes + classes
        self._segments, self._starts = np.unique(segment[self._entries], return_index=True)
        self._lengths = np.diff(np.append(self._starts, len(self._entries)))
        # A band of values for each segment, higher than the bands behind it.
        self._bands = np.repeat(2.0 * np.arange(len(self._starts), 0, -1), self._lengths)
        self._first_entry = np.searchsorted(segment, self._segments)
        self._first_position = np.searchsorted(pairs.dt_classes, self._segments % self._num_classes)
        # Where ignoring objects has changed the matching: false positives more or fewer.
        change = (matched == _NOTHING).astype(np.int32) - (matches.unrestricted == _NOTHING)
        change *= _in_range(pairs.dt_areas, subset.area)[matches.position]
        changed = np.flatnonzero(change)
        self._changes = change[changed]
        self._changed_images = pairs.dt_images[matches.position[changed]]
        self._changes_before = np.searchsorted(changed, self._entries)
        self._changes_before_segment = np.searchsorted(changed, self._first_entry)

    def average_precision(
        self, dts_before: np.ndarray, matched_before: np.ndarray, image_weights: np.ndarray
    ) -> np.ndarray:
        """
        AP of shape (..., IoU thresholds, classes).

        ``dts_before``, int, shape (..., D + 1), is the weight of the detections before each, and
        ``matched_before``, shape (..., entries + 1), that of the matched ones before each entry.
        """
        num_gt = image_weights.astype(np.float32) @ self._num_gt
        ap = np.zeros((*num_gt.shape[:-1], len(IOU_THRESHOLDS) * self._num_classes))
        if len(self._entries):
            weights = _exclusive_cumsum(image_weights[..., self._images])
            tp = weights[..., 1:] - np.repeat(weights[..., self._starts], self._lengths, axis=-1)
            offset = dts_before[..., self._first_position] - matched_before[..., self._first_entry]
            fp = dts_before[..., self._positions] - matched_before[..., self._entries]
            if len(self._changes):
                changes = _exclusive_cumsum(
                    image_weights[..., self._changed_images] * self._changes
                )
                fp += changes[..., self._changes_before]
                offset += changes[..., self._changes_before_segment]
            fp -= np.repeat(offset, self._lengths, axis=-1)
            precision = tp / (tp + fp + np.spacing(1))
            # The highest precision from each true positive to the end of its segment.
            precision += self._bands
            highest = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1] - self._bands

            of_segment = np.maximum(num_gt, 1)[..., self._segments % self._num_classes]
            reached = _recalls_reached(tp / np.repeat(of_segment, self._lengths, axis=-1))
            newly = np.diff(reached, prepend=0, axis=-1)
            newly[..., self._starts] = reached[..., self._starts]
            # The mean over the recall thresholds of the interpolated precision.
            sums = np.add.reduceat(highest * newly, self._starts, axis=-1)
            ap[..., self._segments] = sums / len(_RECALLS)
        ap = ap.reshape(*num_gt.shape[:-1], len(IOU_THRESHOLDS), self._num_classes)
        return np.where(num_gt[..., None, :] == 0, np.nan, ap)


def at_iou(precision: np.ndarray, threshold: float) -> np.ndarray:
    """The row of one IoU threshold; shape (..., 1, classes)."""
    row = int(np.argmin(np.abs(IOU_THRESHOLDS - threshold)))
    return precision[..., row : row + 1, :]


def mean_percent(precision: np.ndarray) -> np.ndarray:
    """Mean over thresholds and classes of what is defined, times 100; nan if nothing is."""
    is_defined = ~np.isnan(precision)
    count = is_defined.sum(axis=(-2, -1))
    total = np.where(is_defined, precision, 0).sum(axis=(-2, -1))
    return np.where(count > 0, 100 * total / np.maximum(count, 1), np.nan)


def _in_range(areas: np.ndarray, name: str) -> np.ndarray:
    low, high = AREA_RANGES[name]
    return (areas >= low) & (areas <= high)


def _exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    result = np.zeros((*values.shape[:-1], values.shape[-1] + 1), dtype=np.int32)
    np.cumsum(values, axis=-1, out=result[..., 1:])
    return result


def _recalls_reached(recall: np.ndarray) -> np.ndarray:
    """How many of COCO's 101 recall thresholds are at most this recall."""
    # searchsorted(_RECALLS, recall, "right"), but faster: a guess that is right or one too low.
    guess = (recall * 100 - 1e-9).astype(np.int32)
    return guess + 1 + (_NEXT_RECALLS[guess] <= recall)


def _column(rows: Sequence[dict], key: str, dtype) -> np.ndarray:
    return np.fromiter((x[key] for x in rows), dtype, len(rows))


def _by_group(groups: np.ndarray) -> dict[int, np.ndarray]:
    """{group: its positions, rising}, groups rising."""
    order = np.argsort(groups, kind="stable")
    keys, starts = np.unique(groups[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:])))
