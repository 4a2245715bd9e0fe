"""Segmentations of an image at once, against Detectron2's and pycocotools' functions for one."""

import numpy as np
import torch
from detectron2.structures import PolygonMasks, polygons_to_bitmask
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
    is_chosen = torch.arange(len(polygons_of)) != 1
    union = union_of_masks(PolygonMasks(polygons_of), is_chosen, SIZE)
    flat = [x for i, polygons in enumerate(polygons_of) for x in polygons if i != 1]
    assert union.dtype == torch.bool
    np.testing.assert_array_equal(union.numpy(), polygons_to_bitmask(flat, *SIZE))


def test_crossing_edges_are_the_pixels_that_pycocotools_fills():
    """Two triangles of 40 x 17 and, with a signed area of 0, 680 pixels in all."""
    bow_tie = [10, 10, 50, 44, 50, 10, 10, 44]
    (found,) = usable_segmentations([[bow_tie]], (72, 96), "a.png")
    right, below = [96.0, 2, 99, 2, 99, 9], [2.0, 72, 9, 72, 9, 79]
    masks = PolygonMasks([found, [np.array(right)], [np.array(below)], []])
    assert lie_in_image(masks, (72, 96)).tolist() == [True, False, False, False]
    assert union_of_masks(masks, torch.ones(4, dtype=torch.bool), (72, 96)).sum() == 680
    line = [2, 2, 9, 2, 5, 2]
    assert usable_segmentations([[line]], (72, 96), "a.png") == [None]
    outside = [[x + 100 * (i % 2 == 0) for i, x in enumerate(bow_tie)]]
    assert usable_segmentations([outside], (72, 96), "a.png") == [None]
