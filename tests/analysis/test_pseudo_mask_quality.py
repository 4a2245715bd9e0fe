"""IoU of pseudo masks with the truth, worked out by hand on a grid of 4 x 4 cells."""

import json

import pytest
import torch
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask.analysis.pseudo_mask_quality import measure_pseudo_masks
from teacher_student_mask.modeling import PseudoMaskGenerator
from teacher_student_mask.trained_model import load_model

ANT, CAT = 3, 17
METHODS = ("none", "threshold", "interact", "box_fit")


@pytest.fixture
def load(tiny_cfg, tmp_path):
    """
    Return ``load(dataset, opts=(), heads=None)``: a teacher-student model for a dataset.

    All ROIs have the probabilities of ``heads``, (teacher, student), if they are given.
    """

    def _load(dataset, opts=(), heads=None):
        cfg = tiny_cfg(opts=[*TEACHER_STUDENT, *opts], dataset=dataset)
        config, weights = save_model(cfg, tmp_path / "model")
        trained = load_model(config, weights=weights)
        if heads is not None:
            teacher, student = (torch.tensor(x).logit() for x in heads)
            # Only the channel of the object's class, a cat's, counts.
            student_logits = torch.full((3, *student.shape), 7.0)
            student_logits[1] = student
            trained.model.roi_heads.teacher_mask_head = FixedHead(teacher[None])
            trained.model.roi_heads.mask_head = FixedHead(student_logits)
        return trained

    return _load


class FixedHead(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def layers(self, features):
        return self.logits.expand(len(features), *self.logits.shape[-3:])


@pytest.fixture
def seen_methods(monkeypatch):
    """The pseudo masks that are made during the test: {method: [one tensor an image]}."""
    made = {}
    call = PseudoMaskGenerator.__call__

    def record(self, *args):
        masks = call(self, *args)
        made.setdefault(self.method, []).append(masks.clone())
        return masks

    monkeypatch.setattr(PseudoMaskGenerator, "__call__", record)
    return made


def rectangle(x, y, w, h):
    return [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]


def annotation(number, image_id, category_id, box, mask, **fields):
    segmentation = None if mask is None else [rectangle(*mask)]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [float(v) for v in box],
        "area": 1.0,
        "iscrowd": 0,
        "segmentation": segmentation,
        **fields,
    }


def one_cat(data):
    """A cat (unseen) of 4 x 4 cells of 8 pixels, its left half set; an ant covers the top row."""
    data["annotations"] = [
        annotation(1, 7, CAT, [8, 8, 32, 32], [8, 8, 16, 32]),
        annotation(2, 7, ANT, [8, 8, 32, 8], [8, 8, 32, 8]),
    ]


# By column; all rows are equal. Fits the box at 0.2, for which alone the last column is needed.
TEACHER = [[0.9, 0.6, 0.4, 0.22]] * 4
STUDENT = [[0.9, 0.3, 0.7, 0.2]] * 4


@pytest.mark.parametrize("side", [64, 128])
def test_iou_of_each_method_by_hand(make_tiny_coco, load, side):
    opts = ["INPUT.MIN_SIZE_TEST", side]
    trained = load(make_tiny_coco(one_cat), opts, heads=(TEACHER, STUDENT))
    result = measure_pseudo_masks(trained, methods=METHODS)
    assert result["num_objects"] == 1
    assert result["mask_side"] == 4
    ious = {method: values["mask_iou"] for method, values in result["methods"].items()}
    assert list(ious) == list(METHODS)
    assert ious == pytest.approx(
        {
            # Row 0 is cleared, but belongs to the truth: 2 cells. The other three rows have
            # minima 0.9 + 0.6 and maxima 1 + 1 + 0.4 + 0.22.
            "none": 3 * 1.5 / (2 + 3 * 2.62),
            # Columns 0 and 1 of three rows, of a truth of 8 cells.
            "threshold": 6 / 8,
            # Means 0.9, 0.45, 0.55, 0.21: columns 0 and 2.
            "interact": 3 / (8 + 3),
            # All columns of three rows.
            "box_fit": 6 / (12 + 2),
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("balance, iou", [("none", 3 / 8), ("share", 6 / 8)])
def test_interact_is_balanced_as_in_training(make_tiny_coco, load, balance, iou):
    # Column 1 has the mean 0.475; as the student's second highest it is shifted above 0.5.
    heads = TEACHER, [[0.4, 0.35, 0.2, 0.1]] * 4
    opts = ["MODEL.PSEUDO_MASK.INTERACT_BALANCE", balance]
    trained = load(make_tiny_coco(one_cat), opts, heads=heads)
    result = measure_pseudo_masks(trained, methods=["interact"])
    assert result["methods"]["interact"]["mask_iou"] == pytest.approx(iou)


def test_scrambled_unseen_masks_change_the_iou_but_no_pseudo_mask(
    make_tiny_coco, load, seen_methods
):
    def scramble(data):
        for x in data["annotations"]:
            if x["category_id"] == CAT:
                left, top, w, h = x["bbox"]
                x["segmentation"] = [rectangle(left + w / 2, top, w / 2, h / 3)]

    results, made = [], []
    for change in (None, scramble):
        seen_methods.clear()
        results.append(measure_pseudo_masks(load(make_tiny_coco(change)), methods=METHODS))
        made.append(dict(seen_methods))
    assert made[0].keys() == made[1].keys() == set(METHODS)
    for method in METHODS:
        # Images 2 and 7 have unseen objects.
        assert [len(x) for x in made[0][method]] == [2, 1]
        assert all(torch.equal(a, b) for a, b in zip(made[0][method], made[1][method]))
        before, after = (x["methods"][method]["mask_iou"] for x in results)
        assert abs(before - after) > 0.01


def three_cats(data):
    """Cats with O = 0, 0.25 and 0.5, and an image with nothing but an ant."""
    data["annotations"] = [
        annotation(1, 7, CAT, [8, 8, 32, 32], [8, 8, 32, 32]),
        annotation(2, 7, ANT, [8, 8, 32, 8], [8, 8, 32, 8]),
        annotation(3, 2, CAT, [0, 0, 16, 16], [0, 0, 8, 16]),
        annotation(4, 2, CAT, [40, 0, 32, 32], [40, 0, 32, 32]),
        annotation(5, 2, ANT, [40, 0, 32, 16], [40, 0, 32, 16]),
        annotation(6, 30, ANT, [8, 8, 32, 8], [8, 8, 32, 8]),
        annotation(7, 30, CAT, [8, 8, 32, 8], [8, 8, 32, 8], iscrowd=1),
    ]


def test_objects_fall_into_bins_by_their_overlap(make_tiny_coco, load):
    trained = load(make_tiny_coco(three_cats), heads=([[0.9] * 4] * 4, STUDENT))
    bins = [0, 0.25, 0.3, 1]
    result = measure_pseudo_masks(trained, methods=["threshold"], overlap_bins=bins)
    assert result["num_objects"] == 3
    # All cells but those of the ant: 0.5 of the truth or as much of the pseudo mask.
    assert result["methods"]["threshold"] == {
        "mask_iou": pytest.approx((0.5 + 0.75 + 0.5) / 3),
        "overlap_bins": [
            {"low": 0.0, "high": 0.0, "num_gt": 1, "mask_iou": 0.5},
            {"low": 0.0, "high": 0.25, "num_gt": 1, "mask_iou": 0.75},
            {"low": 0.25, "high": 0.3, "num_gt": 0, "mask_iou": None},
            {"low": 0.3, "high": 1.0, "num_gt": 1, "mask_iou": 0.5},
        ],
    }
    assert json.loads(json.dumps(result)) == result


def test_objects_that_cannot_be_measured_are_counted(make_tiny_coco, load, log):
    def change(data):
        by_id = {x["id"]: x for x in data["annotations"]}
        by_id[108]["bbox"] = [64.0, 10.0, 5.0, 5.0]  # outside its image
        by_id[109]["segmentation"] = {"size": [64, 80], "counts": [64 * 80]}
        by_id[110]["segmentation"] = None

    result = measure_pseudo_masks(load(make_tiny_coco(change)), methods=["none"])
    assert (result["num_objects"], result["mask_side"]) == (0, None)
    assert result["methods"]["none"]["mask_iou"] is None
    assert "the pseudo masks of 3 unseen objects are not measured" in log.text
