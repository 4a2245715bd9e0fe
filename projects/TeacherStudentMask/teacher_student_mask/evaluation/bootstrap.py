"""Confidence intervals by resampling the images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["percentile_intervals", "resample_images"]


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
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1.")
    tail = 50 * (1 - confidence)
    result = np.full((2, *samples.shape[1:]), np.nan)
    is_defined = (
        ~np.isnan(samples).all(axis=0) if len(samples) else np.zeros(samples.shape[1:], bool)
    )
    result[:, is_defined] = np.nanpercentile(samples[:, is_defined], [tail, 100 - tail], axis=0)
    return result
