"""Masks of single objects, their polygons and overlaps, against numpy and pycocotools."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from coco_json.mask_polygons import MIN_IOU, mask_to_polygons

from completion.masks import clip_box, make_mask
from completion.overlaps import overlaps_in_image
from completion.results import need_of

SIZE = (40, 60)
BOX = [10.0, 5.0, 38.0, 33.0]  # 28 x 28: a cell is a pixel


def decode(segmentation, size=SIZE):
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    return mask_util.decode(segmentation).astype(bool)


def half(value, other=0.1, side=28):
    """The left half of the box has one probability, the right half another."""
    probs = torch.full((side, side), float(other))
    probs[:, : side // 2] = value
    return probs


def in_image(left, right):
    mask = np.zeros(SIZE, bool)
    mask[5:33, left:right] = True
    return mask


def make(probs, masks_of="student", box=BOX, size=SIZE, segmentation_format="rle"):
    return make_mask(probs, masks_of, box, size, segmentation_format)


def test_mask_score_and_agreement_by_hand():
    probs = {"student": half(0.9), "teacher": half(0.3, 0.8)}
    student = make(probs)
    assert (decode(student["segmentation"]) == in_image(10, 24)).all()
    assert (student["area"], student["score"], student["agreement"]) == (28 * 14, 0.9, 0.0)
    teacher = make(probs, "teacher")
    assert (decode(teacher["segmentation"]) == in_image(24, 38)).all()
    both = make(probs, "both")  # 0.6 on the left, 0.45 on the right
    assert both["segmentation"] == student["segmentation"] and both["score"] == 0.6
    assert not both["is_fallback"]
    same = make({"student": half(0.9), "teacher": half(0.7, 0.6)})
    assert same["agreement"] == 0.5
    assert make({"student": half(0.9)})["agreement"] is None


def test_both_heads_with_other_grids_meet_on_the_finer_one():
    probs = {"student": half(0.9), "teacher": half(0.9, side=56)}
    both = make(probs, "both")
    assert (decode(both["segmentation"]) == in_image(10, 24)).all()


def test_where_nothing_comes_to_one_half_the_box_is_filled_as_well_as_can_be():
    record = make({"student": half(0.32, 0.02), "teacher": half(0.9)})
    # No threshold fills more than the left half, and the highest of these is 0.3.
    assert (decode(record["segmentation"]) == in_image(10, 24)).all()
    assert record["is_fallback"] and record["score"] == 0.32
    # The student says nothing at 0.5.
    assert record["agreement"] == 0
    full = make({"student": half(0.32, 0.12)})
    assert (decode(full["segmentation"]) == in_image(10, 38)).all()
    assert full["score"] == 0.22 < 0.5


def test_where_no_cell_has_a_probability_there_is_no_mask():
    assert "finds nothing" in make({"student": half(0.049, 0.0)})["problem"]
    assert "finds nothing" in make({"student": half(float("nan"), 0.0)})["problem"]


def test_a_box_between_two_centres_of_pixels_has_no_mask():
    record = make({"student": half(1, 1)}, box=[10.6, 5.0, 11.4, 9.0])
    assert "no pixel" in record["problem"]
    assert need_of(record) == 1


@pytest.mark.parametrize("segmentation_format", ["rle", "polygon"])
def test_no_pixel_has_its_centre_outside_of_the_box(segmentation_format):
    rng = np.random.default_rng(0)
    for _ in range(30):
        x, y = rng.uniform(0, 40), rng.uniform(0, 25)
        box = [x, y, x + rng.uniform(2, 19), y + rng.uniform(2, 14)]
        probs = torch.from_numpy(rng.uniform(0.1, 0.4, (2, 2)).repeat(14, 0).repeat(14, 1)).float()
        record = make({"student": probs}, box=box, segmentation_format=segmentation_format)
        rows, columns = np.nonzero(decode(record["segmentation"]))
        assert record["is_fallback"] and len(rows) == record["area"] > 0
        assert (columns + 0.5 >= box[0]).all() and (columns + 0.5 <= box[2]).all()
        assert (rows + 0.5 >= box[1]).all() and (rows + 0.5 <= box[3]).all()


def test_a_centre_outside_by_less_than_the_model_can_see_is_outside():
    """In float32 the edges are at 20.5 and the pasted probability there is 0.5."""
    probs = {"student": torch.ones(28, 28)}
    inside = decode(make(probs, box=[10.0, 5.0, 20.5, 15.5])["segmentation"])
    assert inside[10, 20] and inside[15, 15]
    mask = decode(make(probs, box=[10.0, 5.0, 20.5 - 1e-9, 15.5 - 1e-9])["segmentation"])
    assert mask[10, 19] and not mask[:, 20].any() and not mask[15].any()


def test_boxes_are_clipped_to_the_image():
    assert clip_box([-5, 10, 20, 100], SIZE) == [0, 10, 15, 40]
    for box in ([5, 5, 0, 4], [5, 5, 4, -1], [60, 5, 4, 4], [-9, 0, 9, 9], [1e9, 1, 1e-9, 1]):
        assert clip_box(box, SIZE) is None


def test_polygons_are_the_edges_of_the_pixels():
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:7] = True
    mask[7, 9] = True
    polygons = sorted(sorted(zip(x[::2], x[1::2])) for x in mask_to_polygons(mask))
    assert polygons == [[(3, 2), (3, 5), (7, 2), (7, 5)], [(9, 7), (9, 8), (10, 7), (10, 8)]]


def test_polygons_of_random_masks_have_their_pixels_or_are_refused():
    rng = np.random.default_rng(0)
    num_polygons = 0
    for _ in range(300):
        mask = rng.random(rng.integers(1, 12, 2)) < rng.choice([0.3, 0.6, 0.95])
        polygons = mask_to_polygons(mask)
        if polygons is None:
            continue
        num_polygons += 1
        filled = decode(polygons, mask.shape)
        assert (filled & mask).sum() / (filled | mask).sum() >= MIN_IOU
    assert num_polygons > 100


def test_polygons_leave_out_what_does_not_matter():
    y, x = np.mgrid[:200, :200] + 0.5
    mask = (x - 100) ** 2 + (y - 100) ** 2 < 90**2
    (polygon,) = mask_to_polygons(mask)
    assert 8 <= len(polygon) // 2 < 100
    filled = decode([polygon], mask.shape)
    assert (filled & mask).sum() / (filled | mask).sum() >= MIN_IOU


def test_a_hole_is_no_polygon():
    mask = np.ones((9, 9), bool)
    mask[4, 4] = False
    assert mask_to_polygons(mask) is None and mask_to_polygons(mask & False) is None
    probs = torch.full((28, 28), 0.9)
    probs[10:18, 10:18] = 0.1
    record = make({"student": probs}, segmentation_format="polygon")
    assert record["is_rle_instead"] and isinstance(record["segmentation"], dict)
    assert not decode(record["segmentation"])[19, 24] and decode(record["segmentation"])[7, 12]


def test_overlaps_by_hand_and_broken_masks_cover_nothing():
    square = [[0, 0, 10, 0, 10, 10, 0, 10]]
    rle = {"size": list(SIZE), "counts": [0, 400, 2000]}  # 10 columns of 40
    boxes = [[0, 0, 10, 10], [5, 0, 10, 10], [0, 0, 0, 5], None, [0, 0, 1, 1]]
    overlaps, num_unreadable = overlaps_in_image(
        boxes, [square, None, rle, {"size": [1, 1], "counts": "x"}, [[1e300] * 6]], SIZE
    )
    assert overlaps == [1, 0.5, 0, 0, 1] and num_unreadable == 2
    assert overlaps_in_image([], [], SIZE) == ([], 0)


def test_need_is_one_minus_score_times_agreement():
    assert need_of({"score": 0.8, "agreement": 0.5}) == pytest.approx(0.6)
    assert need_of({"score": 0.8, "agreement": None}) == pytest.approx(0.2)
    assert need_of({"score": 0.8, "agreement": 0.0}) == 1
