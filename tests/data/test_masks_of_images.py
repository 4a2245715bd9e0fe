"""Segmentations of an image at once, against Detectron2's and pycocotools' functions for one."""

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import BitMasks, PolygonMasks, polygons_to_bitmask
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.data.dataset_mapper import (
    lie_in_image,
    union_of_masks,
    usable_segmentations,
)

SIZE = (23, 31)
coordinates = st.floats(-20, 60) | st.integers(-5, 35).map(float)
polygons = st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=9).map(
    lambda points: np.array(points).reshape(-1)
)
objects = st.lists(st.lists(polygons, min_size=1, max_size=3), max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(objects)
def test_the_union_is_detectron2s(polygons_of):
    union = union_of_masks(PolygonMasks(polygons_of), SIZE)
    flat = [x for polygons in polygons_of for x in polygons]
    assert union.dtype == torch.bool
    np.testing.assert_array_equal(union.numpy(), polygons_to_bitmask(flat, *SIZE))


def test_the_union_of_nothing_and_of_bitmasks():
    assert union_of_masks(PolygonMasks([]), SIZE).shape == SIZE
    bits = torch.zeros(2, *SIZE, dtype=torch.bool)
    bits[0, 3, 4] = bits[1, 5, 6] = True
    assert union_of_masks(BitMasks(bits), SIZE).nonzero().tolist() == [[3, 4], [5, 6]]


def test_masks_beside_the_image_are_not_in_it():
    right, below = [31.0, 2, 40, 2, 40, 9], [2.0, 23, 9, 23, 9, 30]
    polygons = [[np.array(x)] for x in (right, below, [30.0, 2, 40, 2, 40, 9])]
    assert lie_in_image(PolygonMasks([*polygons, []]), SIZE).tolist() == [False, False, True, False]


def test_rles_become_compressed_and_empty_ones_none():
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[3:9, 4:11] = 1
    rle = mask_util.encode(mask)
    runs = [4 * 23 + 3] + [6, 17] * 7
    runs[-1] = SIZE[0] * SIZE[1] - sum(runs[:-1])
    given_ = [rle, {"size": list(SIZE), "counts": runs}, {"size": list(SIZE), "counts": [23 * 31]}]
    first, second, third = usable_segmentations([*given_], SIZE, "x")
    for x in (first, second):
        np.testing.assert_array_equal(mask_util.decode(x), mask)
    assert third is None
    assert usable_segmentations([None, []], SIZE, "x") == [None, None]


def test_crossing_edges_are_the_pixels_that_pycocotools_fills():
    """Two triangles of 40 x 17 and, with a signed area of 0, 680 pixels in all."""
    bow_tie = [10, 10, 50, 44, 50, 10, 10, 44]
    (found,) = usable_segmentations([[bow_tie]], (72, 96), "a.png")
    masks = PolygonMasks([found])
    assert lie_in_image(masks, (72, 96)).tolist() == [True]
    assert union_of_masks(masks, (72, 96)).sum() == 680
    line = [2, 2, 9, 2, 5, 2]
    assert usable_segmentations([[line]], (72, 96), "a.png") == [None]
    outside = [[x + 100 * (i % 2 == 0) for i, x in enumerate(bow_tie)]]
    assert usable_segmentations([outside], (72, 96), "a.png") == [None]
