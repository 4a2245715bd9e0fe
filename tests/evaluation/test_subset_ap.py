"""AP of subsets from one matching, and of yardsticks, against pycocotools."""

import contextlib
import copy
import io
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from teacher_student_mask.analysis.measure import resample_images
from teacher_student_mask.evaluation import compare_with_yardsticks, yardstick_results
from teacher_student_mask.evaluation.subset_ap import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    Matches,
    PrecisionOfSubsets,
    Subset,
    find_candidate_pairs,
)

SIZE = (40, 140)


class SubsetCOCOeval(COCOeval):
    """The rule to be met: COCOeval with "ignore" set for the objects outside the subset."""

    def __init__(self, *args, ignored_ids=()):
        super().__init__(*args, "segm")
        self.ignored_ids = set(ignored_ids)

    def _prepare(self):
        super()._prepare()
        for objects in self._gts.values():
            for x in objects:
                x["ignore"] = int(x["iscrowd"] or x["id"] in self.ignored_ids)


def quietly(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


def to_coco(images, annotations, categories):
    coco = COCO()
    coco.dataset = {"info": {}, "images": images, "annotations": annotations}
    coco.dataset["categories"] = [{"id": i, "name": f"class {i}"} for i in categories]
    quietly(coco.createIndex)
    return coco


def rectangle(x, y, w, h):
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[max(y, 0) : y + h, max(x, 0) : x + w] = 1
    return mask_util.encode(mask)


def make_problem(seed, num_images=4, categories=(3, 17, 41)):
    """Crowded images: objects on top of each other, crowds, equal scores, areas of all ranges."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 - i, "height": SIZE[0], "width": SIZE[1]} for i in range(num_images)]
    annotations, detections = [], []
    for image in images[1:]:
        for _ in range(rng.integers(0, 9)):
            w, h = rng.integers(8, 130), rng.integers(8, 40)
            x, y = rng.integers(0, 10), rng.integers(0, 6)
            category_id = int(rng.choice(categories))
            rle = rectangle(x, y, w, h)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": float(mask_util.area(rle)),
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": rle,
                }
            )
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = rng.integers(-4, 5, size=4)
                found = rectangle(x + dx, y + dy, max(w + dw, 2), max(h + dh, 2))
                detections.append(
                    {
                        "image_id": image["id"],
                        "category_id": category_id if rng.random() < 0.9 else 3,
                        # Few values, so that many are equal.
                        "score": float(rng.integers(1, 6)) / 5,
                        "segmentation": found,
                    }
                )
    detections.append(
        {"image_id": 10, "category_id": 17, "score": 0.5, "segmentation": rectangle(0, 0, 9, 9)}
    )
    coco = to_coco(images, annotations, categories)
    return coco, quietly(coco.loadRes, detections)


def pycocotools_ap(coco, found, ignored_ids=()):
    """AP per area, each of shape (IoU thresholds, classes); nan for -1."""
    coco_eval = SubsetCOCOeval(copy.deepcopy(coco), copy.deepcopy(found), ignored_ids=ignored_ids)
    coco_eval.params.maxDets = [100]
    quietly(coco_eval.evaluate)
    quietly(coco_eval.accumulate)
    precision = coco_eval.eval["precision"].mean(axis=1)[..., -1]
    precision[precision < 0] = np.nan
    return {area: precision[:, :, k] for k, area in enumerate(AREA_RANGES)}


def subsets_of(mask):
    return {area: Subset(mask, area) for area in AREA_RANGES}


def pairs_of(coco, found):
    return find_candidate_pairs(coco, found.dataset["annotations"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 0.8, 1.0]))
def test_every_subset_equals_pycocotools_with_ignored_objects(seed, share):
    coco, found = make_problem(seed)
    pairs = pairs_of(coco, found)
    counts = np.random.default_rng(seed).random(len(pairs.gt_ids)) < share
    actual = PrecisionOfSubsets(Matches(pairs), subsets_of(counts))()
    expected = pycocotools_ap(coco, found, pairs.gt_ids[~counts].tolist())
    for area in AREA_RANGES:
        np.testing.assert_allclose(actual[area], expected[area], atol=1e-12, err_msg=area)


def repeat_images(coco, found, weights):
    """The dataset in which each image stands as often as its weight says."""
    images, annotations, detections = [], [], []
    for image_id, weight in zip(sorted(coco.imgs), weights):
        for _ in range(weight):
            number = len(images) + 1
            images.append({**coco.imgs[image_id], "id": number})
            for x in coco.imgToAnns[image_id]:
                annotations.append({**x, "id": len(annotations) + 1, "image_id": number})
            for x in found.imgToAnns[image_id]:
                keep = {k: x[k] for k in ("category_id", "score", "segmentation")}
                detections.append({**keep, "image_id": number})
    repeated = to_coco(images, annotations, sorted(coco.cats))
    return repeated, quietly(repeated.loadRes, detections)


@pytest.mark.parametrize("seed", range(8))
def test_weights_of_images_equal_repeating_them(seed):
    coco, found = make_problem(seed, num_images=6)
    # Equal scores would be ordered differently among the copies.
    rng = np.random.default_rng(seed)
    for x in found.dataset["annotations"]:
        x["score"] = float(rng.random())
    pairs = pairs_of(coco, found)
    weights = next(resample_images(6, 1, seed))[0]
    assert weights.sum() == 6 and weights.max() > 1
    counts = rng.random(len(pairs.gt_ids)) < 0.7
    actual = PrecisionOfSubsets(Matches(pairs), subsets_of(counts))(weights)
    repeated, again = repeat_images(coco, found, weights)
    kept = pairs.gt_ids[counts].tolist()
    kept_copies = [
        x["id"]
        for x in repeated.dataset["annotations"]
        if any(
            x["segmentation"] is coco.anns[i]["segmentation"] and x["bbox"] == coco.anns[i]["bbox"]
            for i in kept
        )
    ]
    ignored = set(repeated.anns) - set(kept_copies)
    expected = pycocotools_ap(repeated, again, ignored)
    for area in AREA_RANGES:
        np.testing.assert_allclose(actual[area], expected[area], atol=1e-12, err_msg=area)


@pytest.mark.parametrize("what", ["no detections", "no objects", "neither"])
def test_nothing_found_is_0_and_no_object_is_nan(what):
    coco, found = make_problem(2)
    detections = [] if what != "no objects" else found.dataset["annotations"]
    if what != "no detections":
        coco = to_coco(list(coco.imgs.values()), [], sorted(coco.cats))
    pairs = find_candidate_pairs(coco, detections)
    evaluate = PrecisionOfSubsets(Matches(pairs), subsets_of(np.ones(len(pairs.gt_ids), bool)))
    ap = evaluate()["all"]
    assert ap.shape == (len(IOU_THRESHOLDS), 3)
    assert (ap == 0).all() if what == "no detections" else np.isnan(ap).all()
    # All weight on one image, which has no object.
    weights = np.array([0, 0, 0, 7])
    assert coco.imgToAnns[10] == []
    assert np.isnan(evaluate(weights)["all"]).all()


# ---- yardsticks ----


def test_shapes_lie_in_the_part_of_the_box_that_is_in_the_image():
    boxes = [[10.0, 5.0, 80.0, 30.0], [-20.0, 10.0, 60.0, 1000.0], [3.0, 3.0, 0.0, 5.0]]
    annotations = [
        {"id": k, "image_id": 1, "category_id": 2, "bbox": box, "iscrowd": k // 4}
        for k, box in enumerate([*boxes, boxes[0]], start=1)
    ]
    coco = to_coco([{"id": 1, "height": SIZE[0], "width": SIZE[1]}], annotations, [2])
    box, ellipse = yardstick_results(coco).values()
    assert [x["area"] for x in box] == [2400, 40 * 30, 0]
    assert [x["bbox"] for x in ellipse] == boxes
    for x, area in zip(ellipse, (2400, 1200)):
        assert x["area"] == pytest.approx(math.pi / 4 * area, rel=0.02)
    assert mask_util.toBbox(ellipse[0]["segmentation"]).tolist() == boxes[0]


def test_sentence_names_the_objects_on_which_a_yardstick_is_as_good():
    def results(*aps):
        tasks = ("segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")
        rows = zip(tasks, aps, (9, 4, 5, 0), strict=True)
        return {task: {"AP": ap, "num_gt": n} for task, ap, n in rows}

    nan = math.nan
    yardsticks = {"filled box": results(20, 30, 10, nan), "ellipse": results(19, 31, 9, nan)}
    assert compare_with_yardsticks(results(21, 32, 11, nan), yardsticks) == ""
    assert compare_with_yardsticks(results(21, 25, 10, nan), yardsticks) == (
        "Mask AP no better than a yardstick: seen classes (25.0, ellipse 31.0), unseen classes "
        "(10.0, filled box 10.0)."
    )
