"""The sets of ContrastMask's loss against numpy's gradient and a distance transform."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.modeling.priors.contrast_sets import (
    sample_pixels,
    sets_of_cams,
    sets_of_masks,
)


def reference(mask):
    """easy+, hard+, easy-, hard- of one mask, pixel by pixel."""
    rows, columns = np.gradient(mask.astype(float))
    edge = (rows != 0) | (columns != 0)
    points = np.argwhere(edge)
    band = np.zeros_like(mask)
    for i, j in np.ndindex(mask.shape):
        band[i, j] = any(math.dist((i, j), p) < 2 for p in points)
    hard = band & ~edge
    return mask & ~hard, hard & mask, ~(mask | band), hard & ~mask


def random_masks(seed, side=9):
    """Blobs, noise, an empty and a full mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    cy, cx, r = rng.uniform(0, side, 3)
    masks = [(y - cy) ** 2 + (x - cx) ** 2 < r**2, rng.random((side, side)) < 0.5]
    return np.stack([*masks, np.zeros((side, side), bool), np.ones((side, side), bool)])


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6))
def test_sets_of_masks_against_loops(seed):
    masks = random_masks(seed)
    sets = sets_of_masks(torch.from_numpy(masks))
    for n, mask in enumerate(masks):
        for actual, expected in zip(sets.keys, reference(mask)):
            assert np.array_equal(actual[n].numpy(), expected)
    assert np.array_equal(sets.inside.numpy(), masks)
    assert np.array_equal(sets.outside.numpy(), ~masks)


def test_a_half_plane_by_hand():
    # Columns 0-4 are the object: the edge is 4 and 5, the band 3 and 6.
    mask = torch.zeros(1, 4, 10, dtype=torch.bool)
    mask[:, :, :5] = True
    sets = sets_of_masks(mask)
    columns = [x[0, 2].nonzero()[:, 0].tolist() for x in sets.keys]
    assert columns == [[0, 1, 2, 4], [3], [7, 8, 9], [6]]


def test_sets_of_cams_by_hand():
    cam = torch.tensor([[[0.0, 0.05, 0.1], [0.5, 0.9, 0.91], [1.0, 0.099, 0.2]]])
    sets = sets_of_cams(cam)
    high = [[0, 0, 0], [0, 0, 1], [1, 0, 0]]
    low = [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert all(torch.equal(a, b) for a, b in zip(sets.keys[:2], [torch.tensor([high]) > 0] * 2))
    for positive in (sets.easy_positive, sets.hard_positive, sets.inside):
        assert positive[0].int().tolist() == high
    for negative in (sets.easy_negative, sets.hard_negative, sets.outside):
        assert negative[0].int().tolist() == low


def test_each_roi_has_the_sets_of_its_kind():
    masks, cams = torch.from_numpy(random_masks(0)), torch.rand(4, 9, 9)
    by_mask, by_cam = sets_of_masks(masks), sets_of_cams(cams)
    has_mask = torch.tensor([True, False, False, True])
    mixed = by_mask.where(has_mask, by_cam)
    for name in ("easy_positive", "hard_positive", "easy_negative", "hard_negative", "inside"):
        for n in range(4):
            source = by_mask if has_mask[n] else by_cam
            assert torch.equal(getattr(mixed, name)[n], getattr(source, name)[n])


@pytest.mark.parametrize("min_pixels, expected", [(3, [True, True]), (4, [False, True])])
def test_enough_pixels_in_every_set(min_pixels, expected):
    # 4 rows of one band pixel each, and 3.
    mask = torch.zeros(2, 4, 10, dtype=torch.bool)
    mask[:, :, :5] = True
    sets = sets_of_masks(mask)
    sets.hard_negative[0, 0] = False
    assert sets.have_enough(min_pixels).tolist() == expected
    assert sets.have_enough(1).shape == (2,)


def test_no_roi():
    empty = torch.zeros(0, 8, 8, dtype=torch.bool)
    sets = sets_of_masks(empty).where(torch.zeros(0, dtype=torch.bool), sets_of_cams(empty.float()))
    assert all(x.shape == (0, 8, 8) for x in sets.keys)
    assert sets.have_enough(5).shape == (0,)
    assert sample_pixels(empty, 0.3).shape == (0, 8, 8)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_a_share_of_the_pixels_is_drawn(seed, share):
    masks = torch.from_numpy(random_masks(seed, side=12))
    torch.manual_seed(seed)
    drawn = sample_pixels(masks, share)
    assert not (drawn & ~masks).any()
    for mask, x in zip(masks, drawn):
        assert int(x.sum()) == math.ceil(int(mask.sum()) * share)
    torch.manual_seed(seed)
    assert torch.equal(sample_pixels(masks, share), drawn)


def test_every_pixel_is_drawn_as_often_as_the_others():
    torch.manual_seed(0)
    mask = torch.zeros(1000, 4, 5, dtype=torch.bool)
    mask[:, :2] = True
    counts = sample_pixels(mask, 0.3)[:, :2].sum(dim=0)
    # 3 of 10, a thousand times: 300 with a deviation of 14.
    assert counts.min() > 230 and counts.max() < 370 and counts.sum() == 3000
