"""COCO AP of any subset of the objects from one matching, also for resampled images."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from .matching import IOU_THRESHOLDS, Matches
from .results_table import METRICS

__all__ = [
    "AREA_RANGES",
    "PrecisionOfSubsets",
    "Subset",
    "at_iou",
    "mean_percent",
    "subset_metrics",
]

# Of the objects' areas in pixels; both ends belong to the range, as in COCOeval.
AREA_RANGES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
_RECALLS = np.linspace(0, 1, 101)
_NEXT_RECALLS = np.append(_RECALLS[1:], np.inf)


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
        self._is_matched = matches.unrestricted != -1
        self._dt_counts = {
            area: _in_range(pairs.dt_areas, area) for area in {x.area for x in subsets.values()}
        }
        self._entry_counts = {
            area: self._is_matched & counts[matches.position]
            for area, counts in self._dt_counts.items()
        }
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
            area: (
                _exclusive_cumsum(dt_weights * self._dt_counts[area]),
                _exclusive_cumsum(entry_weights * self._entry_counts[area]),
            )
            for area in self._dt_counts
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
        change = (matched == -1).astype(np.int32) - (matches.unrestricted == -1)
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
        Args:
            dts_before: int, shape (..., D + 1), weight of the detections before each, all classes.
            matched_before: int, shape (..., entries + 1), weight of the matched ones before each
                entry.
            image_weights: int, shape (..., images).

        Returns:
            Shape (..., IoU thresholds, classes).
        """
        num_gt = image_weights.astype(np.float32) @ self._num_gt
        sums = np.zeros((*num_gt.shape[:-1], len(IOU_THRESHOLDS) * self._num_classes))
        if len(self._entries):
            sums[..., self._segments] = self._sum_precision(
                dts_before, matched_before, image_weights, num_gt
            )
        shape = (*num_gt.shape[:-1], len(IOU_THRESHOLDS), self._num_classes)
        return np.where(num_gt[..., None, :] == 0, np.nan, sums.reshape(shape) / len(_RECALLS))

    def _sum_precision(
        self,
        dts_before: np.ndarray,
        matched_before: np.ndarray,
        image_weights: np.ndarray,
        num_gt: np.ndarray,
    ) -> np.ndarray:
        """Sum over the recall thresholds of the interpolated precision, per segment."""
        weights = _exclusive_cumsum(image_weights[..., self._images])
        tp = weights[..., 1:] - self._spread(weights[..., self._starts])
        offset = dts_before[..., self._first_position] - matched_before[..., self._first_entry]
        fp = dts_before[..., self._positions] - matched_before[..., self._entries]
        if len(self._changes):
            changes = _exclusive_cumsum(image_weights[..., self._changed_images] * self._changes)
            fp += changes[..., self._changes_before]
            offset += changes[..., self._changes_before_segment]
        fp -= self._spread(offset)
        precision = tp / (tp + fp + np.spacing(1))
        # The highest precision from each true positive to the end of its segment.
        precision += self._bands
        highest = np.maximum.accumulate(precision[..., ::-1], axis=-1)[..., ::-1] - self._bands

        num_gt_of_segment = np.maximum(num_gt, 1)[..., self._segments % self._num_classes]
        reached = _recalls_reached(tp / self._spread(num_gt_of_segment))
        newly = np.diff(reached, prepend=0, axis=-1)
        newly[..., self._starts] = reached[..., self._starts]
        return np.add.reduceat(highest * newly, self._starts, axis=-1)

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """From one value per segment to one per true positive."""
        return np.repeat(values, self._lengths, axis=-1)


def subset_metrics(
    precision: Mapping[str, np.ndarray], name: str, classes: Collection[int] | None = None
) -> dict[str, np.ndarray]:
    """
    The six AP of COCO.

    Args:
        precision: as of :class:`PrecisionOfSubsets`; "<name>/<area>" for each area.
        name: of the subset.
        classes: positions of the classes to average over; None: all.

    Returns:
        {metric: AP in 0-100, shape (...)}, nan where there is no object.
    """
    take = slice(None) if classes is None else np.asarray(sorted(classes), dtype=np.int64)
    by_area = {area: precision[f"{name}/{area}"][..., take] for area in AREA_RANGES}
    values = (
        by_area["all"],
        at_iou(by_area["all"], 0.5),
        at_iou(by_area["all"], 0.75),
        by_area["small"],
        by_area["medium"],
        by_area["large"],
    )
    return {metric: mean_percent(x) for metric, x in zip(METRICS, values)}


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
