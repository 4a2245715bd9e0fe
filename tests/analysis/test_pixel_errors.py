import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from teacher_student_mask.analysis.objects import boundary_iou, count_pixels, find_object_regions


def encode(mask):
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_equals_a_loop_over_the_pixels(seed):
    rng = np.random.default_rng(seed)
    size = (9, 11)
    masks = rng.random((5, *size)) < 0.3
    is_seen = rng.random(5) < 0.5
    crowd, predicted = rng.random(size) < 0.2, rng.random(size) < 0.5
    own = int(rng.integers(5))
    coco = COCO()
    coco.imgs = {1: {"height": size[0], "width": size[1]}}
    coco.imgToAnns[1] = [{"segmentation": encode(crowd), "category_id": 5, "iscrowd": 1}]
    coco.imgToAnns[1] += [
        {"segmentation": encode(x), "category_id": k, "iscrowd": 0} for k, x in enumerate(masks)
    ]
    regions = find_object_regions(coco, 1, np.flatnonzero(~is_seen).tolist())
    counts = count_pixels(encode(predicted), encode(masks[own]), regions)

    expected = dict(seen=0, unseen=0, background=0, crowd=0)
    for y, x in np.argwhere(predicted & ~masks[own]):
        covering = [i for i in range(5) if masks[i][y, x]]
        if not covering:
            kind = "crowd" if crowd[y, x] else "background"
        else:
            kind = "seen" if any(is_seen[i] for i in covering) else "unseen"
        expected[kind] += 1
    expected["intersection"] = np.count_nonzero(predicted & masks[own])
    expected["union"] = np.count_nonzero(predicted | masks[own])
    assert counts == expected


def square(size, top, left, side):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def near_outline(mask, distance):
    """Brute force: mask pixels with background, or the end of the image, within the distance."""
    result = np.zeros_like(mask)
    side = 2 * distance + 1
    for y, x in np.argwhere(mask):
        rows = slice(max(y - distance, 0), y + distance + 1)
        window = mask[rows, max(x - distance, 0) : x + distance + 1]
        result[y, x] = window.shape != (side, side) or not window.all()
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_boundary_iou_is_that_of_pixels_near_the_outlines(seed):
    rng = np.random.default_rng(seed)
    # Diagonal of 60 x 80 is 100, so the boundary is 2 pixels wide.
    first, second = (
        square((60, 80), *rng.integers(0, 45, 2), rng.integers(1, 40)) for _ in range(2)
    )
    first |= square((60, 80), *rng.integers(0, 45, 2), rng.integers(1, 40))
    a, b = near_outline(first, 2), near_outline(second, 2)
    expected = (a & b).sum() / (a | b).sum()
    assert boundary_iou(encode(first), encode(second)) == pytest.approx(expected)
    assert boundary_iou(encode(second), encode(first)) == pytest.approx(expected)


@pytest.mark.parametrize("size, distance", [((60, 80), 2), ((240, 320), 8), ((10, 10), 1)])
def test_boundary_is_two_percent_of_the_diagonal_wide_and_at_least_one_pixel(size, distance):
    full = square(size, 0, 0, size[0])

    def iou_with_ring(width):
        inside = square(size, width, width, size[0] - 2 * width)
        return boundary_iou(encode(full), encode(full & ~inside))

    # All of a ring is boundary, as its inner outline counts too; the image's border is an outline.
    assert iou_with_ring(distance) == 1
    assert iou_with_ring(distance + 1) < 1


def test_boundary_iou_of_empty_and_disjoint_masks():
    first, second = square((60, 80), 5, 5, 9), square((60, 80), 40, 50, 9)
    empty = np.zeros((60, 80), dtype=bool)
    assert boundary_iou(encode(first), encode(second)) == 0
    assert boundary_iou(encode(first), encode(empty)) == 0
    assert np.isnan(boundary_iou(encode(empty), encode(empty)))
