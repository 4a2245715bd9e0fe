"""Masks of some instances: indexing, cropping, joining, against BitMasks and PolygonMasks."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.structures import SparseMasks

SIZE = 24
TRIANGLES = [[2, 2, 12, 2, 2, 12], [8, 6, 22, 6, 22, 20]]
BOXES = torch.tensor([[2.0, 2, 12, 12], [8, 6, 22, 20], [0, 0, 24, 24], [5, 5, 15, 18]])


def masks_of(kind):
    masks = PolygonMasks([[np.array(x, dtype=np.float64)] for x in TRIANGLES])
    return masks if kind == "polygon" else BitMasks.from_polygon_masks(masks, SIZE, SIZE)


kinds = pytest.mark.parametrize("kind", ["polygon", "bitmask"])


@kinds
def test_crops_are_those_of_the_masks_and_nothing_elsewhere(kind):
    masks = masks_of(kind)
    sparse = SparseMasks(masks, torch.tensor([1, -1, 0, 1]))
    crops = sparse.crop_and_resize(BOXES, 14)
    expected = masks[torch.tensor([1, 0, 1])].crop_and_resize(BOXES[[0, 2, 3]], 14)
    assert crops.dtype == torch.bool and crops.shape == (4, 14, 14)
    assert torch.equal(crops[[0, 2, 3]], expected.to(torch.bool)) and expected.any()
    assert not crops[1].any()


@kinds
@pytest.mark.parametrize("num", [0, 3])
def test_without_a_mask_all_is_false(kind, num):
    sparse = SparseMasks(masks_of(kind), torch.full((num,), -1))
    crops = sparse.crop_and_resize(BOXES[:num], 7)
    assert crops.shape == (num, 7, 7) and not crops.any()


indices = st.one_of(
    st.integers(-5, 4),
    st.slices(5).filter(lambda x: x.step is None or x.step > 0),
    st.lists(st.integers(-5, 4)).map(lambda x: torch.tensor(x, dtype=torch.int64)),
    st.lists(st.booleans(), min_size=5, max_size=5).map(torch.tensor),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(indices)
def test_indexing_is_a_tensors(index):
    rows = torch.tensor([0, -1, 1, 1, 0])
    masks = masks_of("polygon")
    selected = SparseMasks(masks, rows)[index]
    assert selected.masks is masks
    assert selected.rows.tolist() == rows[index].reshape(-1).tolist()
    assert len(selected) == len(selected.rows)


def test_it_travels_in_instances():
    instances = Instances((SIZE, SIZE))
    instances.classes = torch.tensor([5, 6, 7])
    instances.masks = SparseMasks(masks_of("bitmask"), torch.tensor([-1, 1, 0]))
    chosen = instances[torch.tensor([True, False, True])].to("cpu")
    assert chosen.masks.rows.tolist() == [-1, 0]
    joined = Instances.cat([instances[torch.tensor([2])], instances[torch.tensor([0])]])
    assert joined.masks.rows.tolist() == [0, -1] and joined.classes.tolist() == [7, 5]


def test_wrong_arguments_are_errors():
    masks = masks_of("bitmask")
    for rows in ([2], [-2], [[0]]):
        with pytest.raises(ValueError, match=r"rows of shape \(N,\) in \[-1, 2\)"):
            SparseMasks(masks, torch.tensor(rows))
    with pytest.raises(ValueError, match="2 boxes were given for 1 instances"):
        SparseMasks(masks, torch.tensor([0])).crop_and_resize(BOXES[:2], 7)
    with pytest.raises(ValueError, match="different masks"):
        others = [SparseMasks(masks_of("bitmask"), torch.tensor([0])) for _ in range(2)]
        SparseMasks.cat(others)
    with pytest.raises(IndexError):
        SparseMasks(masks, torch.tensor([0]))[3]
