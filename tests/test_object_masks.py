"""Masks of single objects and their polygons, against numpy and pycocotools."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from teacher_student_mask.object_masks import make_mask, mask_to_polygons

SIZE = (40, 60)
BOX = [10.0, 5.0, 38.0, 33.0]  # 28 x 28: a cell is a pixel


def decode(segmentation, size=SIZE):
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    return mask_util.decode(segmentation).astype(bool)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def halves(left, right=0.1, side=28):
    """The left half of the box has one probability, the right half another."""
    probs = torch.full((side, side), float(right))
    probs[:, : side // 2] = left
    return probs


def columns(first, last):
    mask = np.zeros(SIZE, bool)
    mask[5:33, first:last] = True
    return mask


def make(probs, masks_of="student", box=BOX, mask_format="rle"):
    return make_mask(probs, box, SIZE, masks_of=masks_of, mask_format=mask_format)


def test_mask_score_and_agreement_by_hand():
    probs = {"student": halves(0.9), "teacher": halves(0.3, 0.8)}
    student = make(probs)
    assert (decode(student.pop("segmentation")) == columns(10, 24)).all()
    assert student == {
        "area": 28 * 14,
        "score": 0.9,
        "mask_source": "model",
        "teacher_student_agreement": 0.0,
    }
    assert (decode(make(probs, "teacher")["segmentation"]) == columns(24, 38)).all()
    both = make(probs, "both")  # 0.6 on the left, 0.45 on the right
    assert (decode(both["segmentation"]) == columns(10, 24)).all() and both["score"] == 0.6
    same = make({"student": halves(0.9), "teacher": halves(0.7, 0.6)})
    assert same["teacher_student_agreement"] == 0.5
    assert "teacher_student_agreement" not in make({"student": halves(0.9)})


def test_both_heads_with_other_grids_meet_on_the_finer_one():
    both = make({"student": halves(0.9), "teacher": halves(0.9, side=56)}, "both")
    assert (decode(both["segmentation"]) == columns(10, 24)).all()


def test_where_nothing_comes_to_one_half_the_box_is_filled_as_well_as_can_be():
    made = make({"student": halves(0.32, 0.02), "teacher": halves(0.9)})
    # No threshold fills more than the left half, and the highest of these is 0.3.
    assert (decode(made["segmentation"]) == columns(10, 24)).all()
    assert made["mask_fallback"] == "box_fit" and made["score"] == 0.32
    # The student says nothing at 0.5.
    assert made["teacher_student_agreement"] == 0
    full = make({"student": halves(0.32, 0.12)})
    assert (decode(full["segmentation"]) == columns(10, 38)).all() and full["score"] == 0.22


def test_where_there_is_nothing_to_take_there_is_no_mask():
    for value in (0.049, float("nan")):
        assert "nothing is found" in make({"student": halves(value, 0.0)})["problem"]
    between_centres = [10.6, 5.0, 11.4, 9.0]
    assert "no pixel" in make({"student": halves(1, 1)}, box=between_centres)["problem"]


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_no_pixel_has_its_centre_outside_of_the_box(mask_format):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.uniform(0, 40), rng.uniform(0, 25)
        box = [x, y, x + rng.uniform(2, 19), y + rng.uniform(2, 14)]
        probs = torch.from_numpy(rng.uniform(0.1, 0.4, (2, 2)).repeat(14, 0).repeat(14, 1)).float()
        made = make({"student": probs}, box=box, mask_format=mask_format)
        ys, xs = np.nonzero(decode(made["segmentation"]))
        assert "mask_fallback" in made and len(ys) == made["area"] > 0
        assert (xs + 0.5 >= box[0]).all() and (xs + 0.5 <= box[2]).all()
        assert (ys + 0.5 >= box[1]).all() and (ys + 0.5 <= box[3]).all()


def test_polygons_are_the_edges_of_the_pixels():
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:7] = True
    mask[7, 9] = True
    polygons = sorted(sorted(zip(x[::2], x[1::2])) for x in mask_to_polygons(mask))
    assert polygons == [[(3, 2), (3, 5), (7, 2), (7, 5)], [(9, 7), (9, 8), (10, 7), (10, 8)]]


def test_polygons_have_the_pixels_of_the_mask_or_are_refused():
    rng = np.random.default_rng(0)
    num_polygons = 0
    for _ in range(200):
        mask = rng.random(rng.integers(1, 12, 2)) < rng.choice([0.3, 0.6, 0.95])
        polygons = mask_to_polygons(mask)
        if polygons is not None:
            num_polygons += 1
            assert iou(decode(polygons, mask.shape), mask) >= 0.98
    assert num_polygons > 70
    y, x = np.mgrid[:200, :200] + 0.5
    disk = (x - 100) ** 2 + (y - 100) ** 2 < 90**2
    (polygon,) = mask_to_polygons(disk)
    assert 8 <= len(polygon) // 2 < 100 and iou(decode([polygon], disk.shape), disk) >= 0.98


def test_a_hole_is_no_polygon():
    mask = np.ones((9, 9), bool)
    mask[4, 4] = False
    assert mask_to_polygons(mask) is None and mask_to_polygons(mask & False) is None
    probs = torch.full((28, 28), 0.9)
    probs[10:18, 10:18] = 0.1
    made = make({"student": probs}, mask_format="polygon")
    assert isinstance(made["segmentation"], dict)
    assert not decode(made["segmentation"])[19, 24] and decode(made["segmentation"])[7, 12]
