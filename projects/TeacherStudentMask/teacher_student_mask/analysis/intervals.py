"""All AP of one result file, with confidence intervals by resampling the images."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..evaluation import (
    AREA_RANGES,
    CandidatePairs,
    Matches,
    OverlapBin,
    PrecisionOfSubsets,
    Subset,
    at_iou,
    mean_percent,
    subset_metrics,
)

__all__ = [
    "Statistics",
    "compute_statistics",
    "percentile_intervals",
    "resample_images",
]

# A statistic: ("segm_unseen", "AP"), ("bin 3", "AP50"), ("class 17", "AP").
Key = tuple[str, str]

# Detections times resamples that are processed at once: enough that numpy's calls cost little, and
# small enough for the caches.
_MAX_ELEMENTS = 300_000


@dataclass(frozen=True)
class Statistics:
    """
    Args:
        values: in 0-100, nan where there is no object.
        samples: shape (resamples,) each, the values on resampled images.
        num_gt: {the first part of the keys: number of objects that count}.
        confidence: of the intervals.
    """

    values: dict[Key, float]
    samples: dict[Key, np.ndarray]
    num_gt: dict[str, int]
    confidence: float

    def interval(self, key: Key) -> list[float] | None:
        """Low and high end of the confidence interval; None where it is undefined."""
        return _interval(self.samples[key], self.confidence)

    def difference(self, baseline: Statistics, key: Key) -> tuple[float, list[float] | None]:
        """
        Difference to another model on the same objects, and its interval.

        Both must have been computed with the same resamples, confidence and seed.
        """
        samples = self.samples[key] - baseline.samples[key]
        return self.values[key] - baseline.values[key], _interval(samples, self.confidence)


def compute_statistics(
    pairs: CandidatePairs,
    overlaps: np.ndarray,
    unseen: Collection[int],
    *,
    overlap_threshold: float,
    bins: Sequence[OverlapBin],
    num_resamples: int,
    confidence: float,
    seed: int,
    progress: Callable[[int], object] = lambda num_done: None,
) -> Statistics:
    """
    The tasks "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap" with six metrics each,
    "bin k" (unseen objects of the k-th bin; AP, AP50) and "class k" (AP, AP50, AP75).

    Args:
        pairs: detections and objects.
        overlaps: shape (G,), in [0, 1], of the objects of ``pairs``; any value for crowds.
        unseen: positions of the unseen classes.
        overlap_threshold: smallest overlap in "segm_unseen_overlap".
        bins: of the overlap.
        num_resamples: how often the images are drawn again; 0: no intervals.
        confidence: of the intervals, in (0, 1).
        seed: of the draws.
        progress: called with the number of resamples done since the last call.
    """
    is_unseen = np.isin(pairs.gt_classes, list(unseen))
    counts = {
        "segm": np.ones(len(overlaps), dtype=bool),
        "segm_unseen_overlap": is_unseen & (overlaps >= overlap_threshold),
        **{f"bin {k}": is_unseen & x.contains(overlaps) for k, x in enumerate(bins)},
    }
    subsets = {}
    for name, mask in counts.items():
        for area in AREA_RANGES if name.startswith("segm") else ("all",):
            subsets[f"{name}/{area}"] = Subset(mask, area)
    evaluate = PrecisionOfSubsets(Matches(pairs), subsets)
    seen = set(range(len(pairs.category_ids))) - set(unseen)

    def measure(weights: np.ndarray | None = None) -> dict[Key, np.ndarray]:
        return _to_values(evaluate(weights), seen, unseen, len(bins))

    values = {key: float(x) for key, x in measure().items()}
    size = max(1, _MAX_ELEMENTS // max(1, len(pairs.dt_images)))
    draws = resample_images(len(pairs.image_ids), num_resamples, seed, batch_size=size)
    # numpy lets other threads run while it computes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sampled = []
        for batch in pool.map(measure, draws):
            sampled.append(batch)
            progress(len(batch["segm", "AP"]))
    samples = {key: np.concatenate([np.zeros(0), *(x[key] for x in sampled)]) for key in values}
    counts["segm_seen"], counts["segm_unseen"] = ~is_unseen, is_unseen
    counts |= {f"class {k}": pairs.gt_classes == k for k in range(len(pairs.category_ids))}
    num_gt = {name: int((mask & ~pairs.gt_is_crowd).sum()) for name, mask in counts.items()}
    return Statistics(values, samples, num_gt, confidence)


def resample_images(
    num_images: int, num_resamples: int, seed: int, batch_size: int = 1
) -> Iterator[np.ndarray]:
    """
    Draw images with replacement, as many as there are (Efron's bootstrap).

    The same seed draws the same images, whatever the batch size, so that models are compared on the
    same resamples.

    Yields:
        int, shape (batch, num_images), how often each image was drawn; ``num_resamples`` rows in
        all, ``batch_size`` at a time.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, num_resamples, batch_size):
        size = min(batch_size, num_resamples - start)
        drawn = rng.integers(num_images, size=(size, num_images))
        yield np.stack([np.bincount(x, minlength=num_images) for x in drawn])


def percentile_intervals(samples: np.ndarray, confidence: float) -> np.ndarray:
    """
    Interval between the percentiles that leave out the same share of the samples on either side.

    Args:
        samples: shape (resamples, ...), values of the statistic; nan where a resample left it
            undefined, which is left out.
        confidence: share of the samples inside, in (0, 1).

    Returns:
        Shape (2, ...): low and high ends, nan where no sample is defined.
    """
    tail = 50 * (1 - confidence)
    result = np.full((2, *samples.shape[1:]), np.nan)
    is_defined = (~np.isnan(samples)).any(axis=0)
    result[:, is_defined] = np.nanpercentile(samples[:, is_defined], [tail, 100 - tail], axis=0)
    return result


def _to_values(
    precision: dict[str, np.ndarray], seen: Collection[int], unseen: Collection[int], num_bins: int
) -> dict[Key, np.ndarray]:
    tasks = {
        "segm": subset_metrics(precision, "segm"),
        "segm_seen": subset_metrics(precision, "segm", seen),
        "segm_unseen": subset_metrics(precision, "segm", unseen),
        "segm_unseen_overlap": subset_metrics(precision, "segm_unseen_overlap"),
    }
    values = {(task, metric): x for task in tasks for metric, x in tasks[task].items()}
    for k in range(num_bins):
        in_bin = precision[f"bin {k}/all"]
        values[f"bin {k}", "AP"] = mean_percent(in_bin)
        values[f"bin {k}", "AP50"] = mean_percent(at_iou(in_bin, 0.5))
    of_classes = precision["segm/all"]
    for metric, rows in (
        ("AP", of_classes),
        ("AP50", at_iou(of_classes, 0.5)),
        ("AP75", at_iou(of_classes, 0.75)),
    ):
        # Of one class, all thresholds are defined or none.
        per_class = 100 * rows.mean(axis=-2)
        values |= {(f"class {k}", metric): per_class[..., k] for k in range(per_class.shape[-1])}
    return values


def _interval(samples: np.ndarray, confidence: float) -> list[float] | None:
    low, high = percentile_intervals(samples, confidence).tolist()
    return None if np.isnan(low) else [low, high]
