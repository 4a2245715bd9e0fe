"""tsmask import masks: pictures of masks become masks of a COCO json."""

import json
import re

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from teacher_student_mask.cli.main import main

# Image 5 is street.jpg of 6x4 pixels; 17 has no mask, 18 one of a model, 19 one of a human.
DISK = [[1, 1, 4, 1, 4, 3, 1, 3]]
COCO = {
    "images": [
        {"id": i, "file_name": name, "width": 6, "height": 4}
        for i, name in ((5, "a/street.jpg"), (6, "18.jpg"), (7, "a/b.jpg"), (8, "c/b.jpg"))
    ],
    "categories": [{"id": 2, "name": "car"}],
    "annotations": [
        {"id": i, "image_id": 5, "category_id": 2, "bbox": [0, 0, 5, 4], "iscrowd": 0, **more}
        for i, more in (
            (17, {}),
            (18, {"segmentation": DISK, "mask_source": "model", "score": 0.5}),
            (19, {"segmentation": DISK}),
        )
    ],
}


@pytest.fixture
def run(tmp_path, capsys):
    """Return ``run(pictures, *options)``: the status, what was printed, {id: annotation}."""
    (tmp_path / "in.json").write_text(json.dumps(COCO))

    def run(pictures, *options):
        for name, pixels in pictures.items():
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "masks" / name)
        command = ["import", "masks", "in.json", "--masks", "masks", "--output", "out.json"]
        paths = [str(tmp_path / x) if x.endswith(".json") or x == "masks" else x for x in command]
        paths[1] = "masks"
        status = main([*paths, *options])
        written = tmp_path / "out.json"
        rows = json.loads(written.read_text())["annotations"] if written.exists() else []
        return status, "".join(capsys.readouterr()), {x["id"]: x for x in rows}

    return run


def pixels_of(annotation):
    return mask_util.decode(annotation["segmentation"]).astype(bool)


def test_pictures_of_objects_and_of_images_become_human_masks(run):
    of_object = np.zeros((4, 6), np.uint8)
    of_object[1:3, 2:5] = 255
    of_image = np.zeros((4, 6), np.uint16)
    of_image[0, :3] = 18
    status, printed, rows = run({"17.png": of_object, "street.png": of_image})
    assert status == 0 and "2 masks were read" in printed
    assert np.array_equal(pixels_of(rows[17]), of_object > 0) and rows[17]["area"] == 6
    assert np.array_equal(pixels_of(rows[18]), of_image == 18)
    assert not {"mask_source", "score"} & set(rows[18])  # corrected by a human
    assert rows[19] == COCO["annotations"][2]
    assert all(rows[i]["bbox"] == [0, 0, 5, 4] for i in rows)


def test_a_json_with_errors_is_refused(run, tmp_path):
    flat = {**COCO["annotations"][0], "segmentation": [1, 1, 4, 1, 4, 3]}
    (tmp_path / "in.json").write_text(json.dumps({**COCO, "annotations": [flat]}))
    status, printed, _ = run({"17.png": np.ones((4, 6), np.uint8)})
    assert status == 1 and "'segmentation' is [1, 1, 4" in printed


def test_what_a_human_has_drawn_is_replaced_on_request_alone(run):
    picture = {"19.png": np.ones((4, 6), np.uint8)}
    status, printed, rows = run(picture)
    assert status == 1 and "a human has drawn a mask of annotation 19; see --replace" in printed
    assert rows == {}
    status, printed, rows = run(picture, "--replace")
    assert status == 0 and "1 masks of humans were replaced" in printed
    assert pixels_of(rows[19]).all()


@pytest.mark.parametrize(
    "name, pixels, sentence",
    [
        ("20.png", np.ones((4, 6), np.uint8), "named after no annotation id and no image"),
        ("18.png", np.ones((4, 6), np.uint8), "the id of an annotation and the name of an image"),
        ("b.png", np.ones((4, 6), np.uint8), "have this name: a/b.jpg, c/b.jpg"),
        ("17.png", np.ones((6, 4), np.uint8), r"shape \(6, 4\); allowed: \(4, 6\)"),
        ("17.png", np.ones((4, 6, 3), np.uint8), "one channel"),
        ("17.png", np.zeros((4, 6), np.uint8), "has no pixel of an annotation 17"),
        ("street.png", np.full((4, 6), 3, np.uint8), "annotation 3 of this image"),
    ],
)
def test_pictures_that_do_not_fit_are_named(run, name, pixels, sentence):
    status, printed, rows = run({name: pixels})
    assert status == 1 and rows == {}
    assert re.search(sentence, printed) and name in printed
