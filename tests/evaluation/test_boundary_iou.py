import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_student_mask.evaluation import boundary_iou, boundary_region


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def square(size, top, left, side):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def near_outline(mask, distance):
    """Brute force: mask pixels with background, or the end of the image, within the distance."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        window = mask[
            max(y - distance, 0) : y + distance + 1, max(x - distance, 0) : x + distance + 1
        ]
        side = 2 * distance + 1
        result[y, x] = window.shape != (side, side) or not window.all()
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_boundary_region_is_what_lies_near_the_outline(seed, distance):
    rng = np.random.default_rng(seed)
    mask = np.zeros((23, 31), dtype=bool)
    for _ in range(3):
        top, left = rng.integers(0, 15), rng.integers(0, 20)
        mask[top : top + rng.integers(1, 14), left : left + rng.integers(1, 14)] = True
    expected = near_outline(mask, distance)
    np.testing.assert_array_equal(boundary_region(mask, distance), expected)


def test_two_squares_by_hand():
    # Diagonal of 60 x 80 is 100, so the boundary is 2 pixels wide.
    first, second = square((60, 80), 10, 10, 20), square((60, 80), 10, 14, 20)
    # Rings of 20^2 - 16^2 = 144 pixels. Both hold, in the 16 common columns, the two upper and two
    # lower rows: 64. Columns 14-15 of the first ring's inside are only in the second, and so on;
    # right columns 28-29 of the first and left columns 14-15 of the second meet nothing else.
    assert boundary_iou(encode(first), encode(second)) == pytest.approx(64 / (144 + 144 - 64))


@pytest.mark.parametrize("size, distance", [((60, 80), 2), ((240, 320), 8), ((10, 10), 1)])
def test_width_is_two_percent_of_the_diagonal_and_at_least_one_pixel(size, distance):
    side = size[0]
    full = square(size, 0, 0, side)

    def iou_with_ring(width):
        return boundary_iou(
            encode(full), encode(full & ~square(size, width, width, side - 2 * width))
        )

    # All of a ring is boundary, as its inner outline counts too; the image's border is an outline.
    assert iou_with_ring(distance) == 1
    assert iou_with_ring(distance + 1) < 1
    if distance > 1:
        assert iou_with_ring(distance - 1) < 1


def test_identical_disjoint_and_empty_masks():
    first, second = square((60, 80), 5, 5, 9), square((60, 80), 40, 50, 9)
    empty = np.zeros((60, 80), dtype=bool)
    assert boundary_iou(encode(first), encode(first)) == 1
    assert boundary_iou(encode(first), encode(second)) == 0
    assert boundary_iou(encode(first), encode(empty)) == 0
    assert np.isnan(boundary_iou(encode(empty), encode(empty)))
    assert boundary_region(np.zeros((0, 3), dtype=bool), 1).shape == (0, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_equals_the_definition_on_whole_images_and_is_symmetric(seed):
    rng = np.random.default_rng(seed)
    first, second = (
        square((60, 80), *rng.integers(0, 45, 2), rng.integers(1, 40)) for _ in range(2)
    )
    a, b = near_outline(first, 2), near_outline(second, 2)
    expected = (a & b).sum() / (a | b).sum()
    assert boundary_iou(encode(first), encode(second)) == pytest.approx(expected)
    assert boundary_iou(encode(second), encode(first)) == pytest.approx(expected)
