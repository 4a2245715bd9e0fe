"""ImageMask against what a list, a tensor and BitMasks do in its place."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
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
        slice(None),
        slice(1, 3),
        slice(None, None, 2),
        slice(3, 1),
        slice(2, 99),
        torch.tensor([True, False, True, True]),
        torch.tensor([False] * 4),
        torch.tensor([3, 0, 0, 2, 3, 1]),
        torch.tensor([-1]),
        [0],
        [-4],
        torch.tensor([], dtype=torch.int64),
        [2, 1],
    ],
    ids=str,
)
def test_indexing_selects_as_many_instances_as_of_a_tensor(image_map, item):
    selected = ImageMask(image_map, 4)[item]
    assert len(selected) == len(torch.zeros(4)[item])
    assert selected.tensor.data_ptr() == image_map.data_ptr()


def test_the_map_is_stored_as_bool_and_shared(image_map):
    mask = ImageMask(image_map, 3)
    assert mask.tensor.data_ptr() == image_map.data_ptr()
    assert torch.equal(ImageMask(image_map.to(torch.uint8), 3).tensor, image_map)
    assert mask.image_size == (HEIGHT, WIDTH)
    assert mask.device == torch.device("cpu")
    assert repr(mask) == "ImageMask(num_instances=3, image_size=(5, 7))"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("map_device", ["cpu", "cuda"])
def test_indices_may_be_on_a_gpu(image_map, map_device):
    mask = ImageMask(image_map, 3).to(map_device)
    assert len(mask[torch.tensor([0, 2], device="cuda")]) == 2
    assert len(mask[torch.tensor([True, False, False], device="cuda")]) == 1
    crops = mask.crop_and_resize(torch.tensor([[0.0, 0, 7, 5]] * 3, device="cuda"), 28)
    assert crops.device.type == "cuda"


def test_cat_adds_up_instances_of_one_image(image_map):
    mask = ImageMask(image_map, 4)
    joined = ImageMask.cat([mask[1:], mask[:0], mask[0], ImageMask(image_map.clone(), 2)])
    assert len(joined) == 6
    assert joined.tensor.data_ptr() == image_map.data_ptr()


def make_instances(image_map, num_instances):
    instances = Instances((HEIGHT, WIDTH))
    instances.gt_boxes = Boxes(torch.arange(num_instances * 4).reshape(-1, 4).float())
    instances.gt_exclusion_masks = ImageMask(image_map, num_instances)
    return instances


def test_instances_index_and_join_it(image_map):
    instances = make_instances(image_map, 4)
    assert len(instances[torch.tensor([True, False, True, False])].gt_exclusion_masks) == 2
    assert len(instances[-1].gt_exclusion_masks) == 1
    moved = instances.to(torch.device("meta"))
    assert moved.gt_exclusion_masks.device == torch.device("meta") and len(moved) == 4
    joined = Instances.cat([instances[:1], instances[2:]])
    assert len(joined) == len(joined.gt_exclusion_masks) == 3
    assert joined.gt_exclusion_masks.tensor.data_ptr() == image_map.data_ptr()


def test_crop_of_a_hand_written_map():
    mask = ImageMask(torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]), 2)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 3.0, 3.0]])
    crops = mask.crop_and_resize(boxes, 2)
    # Means over 2x2 pixels are 1/4 but for the crop that has its own pixel a cell.
    assert crops.tolist() == [[[False, False], [False, False]], [[True, True], [True, False]]]


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
