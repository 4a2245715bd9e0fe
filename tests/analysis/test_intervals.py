import numpy as np
import pytest

from teacher_student_mask.analysis.measure import percentile_interval, resample_images


def test_interval_leaves_out_the_same_share_on_either_side_and_what_is_undefined():
    samples = np.random.default_rng(0).permutation(np.arange(101.0))
    assert percentile_interval(samples, 0.9) == pytest.approx([5, 95])
    assert percentile_interval(np.array([1.0, np.nan, 3.0]), 0.5) == pytest.approx([1.5, 2.5])
    assert percentile_interval(np.array([np.nan]), 0.5) is None
    assert percentile_interval(np.zeros(0), 0.95) is None


def test_interval_of_a_mean_is_the_one_of_statistics():
    """The bootstrap interval of a mean over many images is near mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(10, 3, size=900)
    weights = np.concatenate(list(resample_images(900, 2000, seed=2, batch_size=100)))
    low, high = percentile_interval((weights * values).sum(axis=1) / 900, 0.95)
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)


def test_resamples_are_seeded_and_keep_the_number_of_images():
    first = np.concatenate(list(resample_images(50, 20, 4)))
    in_batches = list(resample_images(50, 20, 4, batch_size=7))
    assert [len(x) for x in in_batches] == [7, 7, 6]
    np.testing.assert_array_equal(first, np.concatenate(in_batches))
    assert first.shape == (20, 50) and (first.sum(axis=1) == 50).all()
    assert not np.array_equal(first, np.concatenate(list(resample_images(50, 20, 5))))
