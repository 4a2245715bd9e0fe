"""ImageMask against what a list, a tensor and BitMasks do in its place."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.structures import ImageMask

HEIGHT, WIDTH = 5, 7


@pytest.fixture
def image_map():
    return torch.from_numpy(np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.4)


@pytest.mark.parametrize(
    "item",
    [
        slice(1, 99, 2),
        slice(3, 1),
        torch.tensor([True, False, True, True]),
        torch.tensor([3, 0, 0, 2, 3, 1]),
        torch.tensor([], dtype=torch.int64),
    ],
    ids=str,
)
def test_indexing_selects_as_many_instances_as_of_a_tensor(image_map, item):
    selected = ImageMask(image_map, 4)[item]
    assert len(selected) == len(torch.zeros(4)[item])
    assert selected.tensor.data_ptr() == image_map.data_ptr()


def test_instances_index_and_move_it(image_map):
    instances = Instances((HEIGHT, WIDTH), gt_exclusion_masks=ImageMask(image_map, 4))
    assert len(instances[torch.tensor([True, False, True, False])].gt_exclusion_masks) == 2
    assert len(instances[-1].gt_exclusion_masks) == 1
    moved = instances.to(torch.device("meta"))
    assert moved.gt_exclusion_masks.tensor.device == torch.device("meta") and len(moved) == 4


coordinates = st.floats(-4, 40, width=32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    corners=st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=5),
    side=st.sampled_from([1, 7, 28]),
)
def test_crops_equal_those_of_bitmasks(seed, size, corners, side):
    image_map = torch.from_numpy(np.random.default_rng(seed).random(size) < 0.5)
    x0, y0, x1, y1 = torch.tensor(corners).unbind(1)
    boxes = torch.stack([x0.minimum(x1), y0.minimum(y1), x0.maximum(x1), y0.maximum(y1)], dim=1)
    bit_masks = BitMasks(image_map.expand(len(boxes), -1, -1))
    crops = ImageMask(image_map, len(boxes)).crop_and_resize(boxes, side)
    assert crops.dtype == torch.bool
    assert torch.equal(crops, bit_masks.crop_and_resize(boxes, side))
