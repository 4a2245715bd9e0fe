"""Eq. (1) on drawn rectangles, and on COCO against an independent implementation."""

import contextlib
import io
import logging
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from teacher_student_mask.class_splits import resolve_seen_classes
from teacher_student_mask.evaluation import compute_overlaps

HEIGHT, WIDTH = 20, 24


def make_coco(annotations, num_images=1):
    """Annotations may omit id (numbered from 1), image_id, category_id and iscrowd."""
    defaults = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i + 1, "height": HEIGHT, "width": WIDTH} for i in range(num_images)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [{**defaults, "id": i, **x} for i, x in enumerate(annotations, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def rectangle_mask(x, y, w, h):
    """RLE of the whole pixels of a box."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_util.encode(mask)


def rectangle(x, y, w, h, **fields):
    return {"bbox": [x, y, w, h], "segmentation": rectangle_mask(x, y, w, h), **fields}


def overlaps_of(*annotations):
    return list(compute_overlaps(make_coco(annotations)).values())


BOX = rectangle(0, 0, 10, 10)


@pytest.mark.parametrize(
    "others, expected",
    [
        ([], 0),
        ([rectangle(10, 0, 4, 4)], 0),
        ([rectangle(2, 0, 4, 5)], 0.2),
        ([rectangle(0, 0, 20, 20)], 1),
        # The largest single object, not the union.
        ([rectangle(0, 0, 10, 3), rectangle(0, 5, 10, 4)], 0.4),
        ([{"bbox": [2, 0, 6, 5], "segmentation": [[2, 0, 8, 0, 8, 5, 2, 5]]}], 0.3),
        ([{"bbox": [2, 0, 6, 5], "segmentation": [[2, 0, 8, 0, 8, 5, 2, 5], [0, 0, 9, 9]]}], 0.3),
    ],
)
def test_overlap_is_the_share_of_the_box_that_one_other_mask_covers(others, expected):
    assert overlaps_of(BOX, *others)[0] == expected


def test_shares_of_pixels_and_parts_outside_the_image_count_and_crowds_do_not():
    box = {**rectangle(0, 0, 4, 5), "bbox": [0.25, -1, 10, 10.5]}  # 3.75 x 5 pixels are covered
    beside, empty = rectangle(0, 0, 4, 5), {**BOX, "bbox": [3, 3, 0, 5]}
    crowd = rectangle(0, 0, 20, 20, iscrowd=1)
    assert overlaps_of(box, beside, crowd) == [pytest.approx(3.75 * 5 / 105), 1]
    assert overlaps_of(empty, beside) == [0, 1]


@pytest.mark.parametrize("segmentation", ["missing", None, [], [[]], [[1, 2, 3, 4]], {}])
def test_objects_without_a_mask_cover_nothing(segmentation, caplog):
    box_only = {"bbox": [0, 0, 10, 10]}
    if segmentation != "missing":
        box_only["segmentation"] = segmentation
    with caplog.at_level(logging.WARNING, logger="teacher_student_mask"):
        assert overlaps_of(rectangle(0, 0, 10, 5), box_only) == [0.0, 0.5]
    assert "1 have no mask" in caplog.text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("instances_val2017.json", (619, 179, 332, 119)),
        ("instances_train2017.json", (731, 172, 367, 128)),
    ],
)
def test_counts_on_coco(name, expected):
    """The expected counts come from an independent implementation, run on a part of COCO."""
    root = os.environ.get("DETECTRON2_DATASETS", "")
    path = os.path.join(root, "coco", "annotations", name)
    if not root or not os.path.isfile(path):
        pytest.skip("DETECTRON2_DATASETS is not set to a folder with COCO's annotations")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
    if len(coco.imgs) > 100:
        pytest.skip("the counts are those of a part of COCO, this is all of it")
    classes = [coco.cats[i]["name"] for i in sorted(coco.cats)]
    voc = {classes[i] for i in resolve_seen_classes("voc", classes)}
    overlaps = compute_overlaps(coco)
    is_unseen = {x: coco.cats[coco.anns[x]["category_id"]]["name"] not in voc for x in overlaps}
    actual = (
        len(overlaps),
        sum(x >= 0.3 for x in overlaps.values()),
        sum(is_unseen.values()),
        sum(x >= 0.3 and is_unseen[i] for i, x in overlaps.items()),
    )
    assert actual == expected
