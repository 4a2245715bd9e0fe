"""Which objects are pictured, and that a picture shows what it says."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from report_example import example_analysis, make_files, run

from teacher_student_mask.analysis.pictures import (
    PIXEL_COLORS,
    draw_objects,
    models_to_picture,
    select_objects,
)


@pytest.fixture
def analysis(tmp_path):
    return run(make_files(tmp_path))


def pixels_of(picture):
    data = base64.b64decode(picture.source.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_of_two_models_the_largest_differences_of_unseen_objects_come_first(analysis):
    rows = select_objects(list(analysis.objects.values()), 100)
    # Objects 3, 9, 15 are the swollen kites; 1, 4, 7, ... the dogs.
    ids = analysis.objects["exact"].annotation_ids[rows].tolist()
    assert ids[:3] == [3, 9, 15] and ids[-6:] == [1, 4, 7, 10, 13, 16] and len(ids) == 18
    assert select_objects(list(analysis.objects.values()), 2).tolist() == rows[:2].tolist()


def test_of_one_model_objects_with_false_positives(analysis):
    rows = select_objects([analysis.objects["swollen"]], 100)
    assert analysis.objects["swollen"].annotation_ids[rows].tolist() == [3, 9, 15]
    assert select_objects([analysis.objects["exact"]], 100).tolist() == []


def test_models_with_masks_on_the_same_boxes_are_compared(tmp_path):
    files = make_files(tmp_path)
    boxes = {"c": files["exact"]}
    assert models_to_picture(run(files, gt_box_results=boxes)) == ["exact", "swollen"]
    one = run(files, results={"a": files["exact"]}, gt_box_results=boxes)
    assert models_to_picture(one) == ["a"]


@pytest.mark.parametrize("image_root", [None, "images"])
def test_pixels_have_the_colours_of_what_they_are(analysis, tmp_path, image_root):
    root = image_root and str(tmp_path)
    (picture,), problems = draw_objects(analysis, ["exact", "swollen"], root, 1)
    assert not problems
    assert (picture.annotation_id, picture.class_name, picture.is_unseen) == (3, "kite", True)
    assert picture.overlap == 0.5 and picture.ious == (1, pytest.approx(2 / 3))
    pixels = pixels_of(picture)
    assert pixels.shape == (picture.height, picture.width, 3)
    panels = np.split(pixels[:, : 3 * (pixels.shape[1] // 3)], 3, axis=1)

    def has(panel, kind):
        # Blended with grey, so the order of the channels stays.
        color = np.array([int(PIXEL_COLORS[kind][i : i + 2], 16) for i in (1, 3, 5)])
        shift = panel.mean(axis=2, keepdims=True) - color.mean()
        return (np.abs(panel - color - shift).max(axis=2) < 60).mean() > 0.05

    assert [has(x, "correct") for x in panels] == [True] * 3
    assert [has(x, "seen") for x in panels] == [False, False, True]


@pytest.mark.parametrize(
    "file_name, why",
    [
        ("../truth.png", "outside of the folder"),
        ("/etc/hostname", "outside of the folder"),
        ("no.png", "missing"),
        ("truth.json", "unreadable"),
        ("small.png", "of another size than the annotations say"),
    ],
)
def test_images_that_cannot_be_used_are_grey(tmp_path, file_name, why):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    analysis = example_analysis(tmp_path)
    for image in analysis.coco.imgs.values():
        image["file_name"] = file_name
    pictures, problems = draw_objects(analysis, ["exact"], str(tmp_path), 5)
    assert pictures == [] and problems == {}
    pictures, problems = draw_objects(analysis, ["exact", "swollen"], str(tmp_path), 5)
    assert problems == {why: 5} and len(pictures) == 5
