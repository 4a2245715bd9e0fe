"""What each object's mask is like, and that a picture of it shows what it says."""

import base64
import io

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO
from report_example import example_analysis, make_files, run

from teacher_student_mask.analysis.objects import (
    PIXEL_COLORS,
    draw_objects,
    extreme_objects,
    measure_objects,
    select_objects,
)

HEIGHT, WIDTH = 20, 30


def rectangle(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask_util.encode(mask)


def make_coco(*objects):
    """Objects are (image id, category id, box), the mask being the box; ids count from 1."""
    coco = COCO()
    images = sorted({image_id for image_id, *_ in objects} | {1})
    coco.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
        "categories": [{"id": 1, "name": "seen"}, {"id": 2, "name": "unseen"}],
        "annotations": [
            {
                "id": k + 1,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(map(float, box)),
                "area": float(box[2] * box[3]),
                "iscrowd": int(bool(crowd)),
                "segmentation": rectangle(*box),
            }
            for k, (image_id, category_id, box, *crowd) in enumerate(objects)
        ],
    }
    coco.createIndex()
    return coco


def detection(category_id, box, score=0.9, mask=None, image_id=1):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(map(float, box)),
        "score": score,
        "segmentation": rectangle(*(mask or box)),
    }


def measure(coco, detections, **kwargs):
    overlaps = {x["id"]: 0.25 for x in coco.dataset["annotations"] if not x["iscrowd"]}
    return measure_objects(coco, detections, overlaps, {2}, **kwargs)


def test_one_object_by_hand():
    coco = make_coco((1, 2, (2, 2, 10, 10)), (1, 1, (12, 2, 4, 10)), (1, 2, (2, 12, 10, 4)))
    # 14 x 12 pixels: 100 right, 40 on the seen object, 20 on the unseen one, 8 on nothing.
    table = measure(coco, [detection(2, (2, 2, 10, 10), mask=(2, 2, 14, 12))])
    assert table.annotation_ids.tolist() == [1, 2, 3]
    assert table.is_unseen.tolist() == [True, False, True]
    assert table.is_matched.tolist() == [True, False, False]
    assert table.false_positives.tolist() == [[8, 40, 20], [0, 0, 0], [0, 0, 0]]
    assert table.ious[0] == pytest.approx(100 / 168)
    assert np.isnan(table.ious[1:]).all() and np.isnan(table.scores[1:]).all()
    assert table.scores[0] == 0.9
    assert table.rles[0] is not None and table.rles[1:] == [None, None]
    assert np.isnan(table.boundary_ious).all()
    assert table.overlaps.tolist() == [0.25] * 3
    assert table.num_unmatched_detections == 0


def test_crowds_are_no_objects_and_their_pixels_count_apart():
    coco = make_coco((1, 2, (2, 2, 10, 10)), (1, 2, (12, 2, 4, 10), True))
    table = measure(coco, [detection(2, (2, 2, 10, 10), mask=(2, 2, 14, 12))])
    assert table.annotation_ids.tolist() == [1]
    assert table.crowd_pixels.tolist() == [40]
    assert table.false_positives.tolist() == [[28, 0, 0]]
    on_crowd = measure(coco, [detection(2, (12, 2, 4, 10))])
    assert on_crowd.num_unmatched_detections == 1 and not on_crowd.is_matched.any()


def test_low_scores_and_other_classes_take_no_part():
    coco = make_coco((1, 2, (2, 2, 10, 10)))
    low, other = detection(2, (2, 2, 10, 10), score=0.49), detection(1, (2, 2, 10, 10))
    table = measure(coco, [low, other])
    assert not table.is_matched.any() and table.num_unmatched_detections == 1
    assert measure(coco, [low], score_threshold=0.49).is_matched.all()
    assert measure(coco, [low], protocol="gt_boxes").is_matched.all()


def test_the_higher_score_chooses_first_on_detected_boxes():
    coco = make_coco((1, 2, (2, 2, 10, 10)), (1, 2, (5, 2, 10, 10)))
    loose, exact = detection(2, (3, 2, 10, 10), 0.9), detection(2, (2, 2, 10, 10), 0.8)
    table = measure(coco, [exact, loose])
    # The loose one takes object 1, which it fits better than object 2; the exact one is left with
    # object 2, at a box IoU of 7 / 13.
    assert table.scores.tolist() == [0.9, 0.8]
    by_fit = measure(coco, [exact, loose], protocol="gt_boxes")
    assert by_fit.scores.tolist() == [0.8, 0.9]


def test_boundary_iou_is_measured_on_ground_truth_boxes():
    coco = make_coco((1, 2, (2, 2, 10, 10)), (3, 1, (2, 2, 10, 10)))
    results = [detection(2, (2, 2, 10, 10)), detection(1, (2, 2, 10, 10), image_id=3)]
    results[1]["segmentation"] = mask_util.encode(np.zeros((HEIGHT, WIDTH), np.uint8, order="F"))
    table = measure(coco, results, protocol="gt_boxes")
    assert table.boundary_ious.tolist() == [1, 0]
    assert table.ious.tolist() == [1, 0]


def pixels_of(picture):
    data = base64.b64decode(picture["source"].split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def draw_two(analysis, image_root, num_objects):
    tables = [analysis.objects[x] for x in ("exact", "swollen")]
    rows = select_objects(tables, num_objects)
    return draw_objects(analysis.coco, analysis.summary, tables, rows, image_root)


def test_extremes_are_the_lowest_and_highest_iou_and_share_no_object(tmp_path):
    tables = [run(make_files(tmp_path)).objects[x] for x in ("swollen", "exact")]
    worst, best = extreme_objects(tables, 4)
    # Three kites of 2 / 3; all others are exact.
    assert tables[0].ious[worst] == pytest.approx([2 / 3] * 3 + [1])
    assert tables[0].ious[best].tolist() == [1] * 4 and not set(worst) & set(best)
    assert [len(x) for x in extreme_objects(tables, 15)] == [15, 3]


def test_pixels_have_the_colours_of_what_they_are(tmp_path):
    (picture,) = draw_two(run(make_files(tmp_path)), str(tmp_path), 1)
    names = ("annotation_id", "class_name", "is_unseen", "overlap")
    assert [picture[name] for name in names] == [3, "kite", True, 0.5]
    assert picture["ious"] == [1, pytest.approx(2 / 3)]
    pixels = pixels_of(picture)
    assert pixels.shape == (picture["height"], picture["width"], 3)
    panels = np.split(pixels[:, : 3 * (pixels.shape[1] // 3)], 3, axis=1)

    def has(panel, kind):
        # Blended with grey, so the order of the channels stays.
        color = np.array([int(PIXEL_COLORS[kind][i : i + 2], 16) for i in (1, 3, 5)])
        shift = panel.mean(axis=2, keepdims=True) - color.mean()
        return (np.abs(panel - color - shift).max(axis=2) < 60).mean() > 0.05

    assert [has(x, "correct") for x in panels] == [True] * 3
    assert [has(x, "seen") for x in panels] == [False, False, True]


@pytest.mark.parametrize(
    "file_name", ["../truth.png", "/etc/hostname", "no.png", "truth.json", "small.png"]
)
def test_objects_without_a_usable_image_are_left_out(tmp_path, file_name, log):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    images = tmp_path / "images"
    images.mkdir()
    analysis = example_analysis(images)
    for image in analysis.coco.imgs.values():
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / "truth.png")
        image["file_name"] = file_name
    assert draw_two(analysis, str(images), 5) == []
    assert "the images of 5 shown objects" in log.text
