"""Teacher, student and ground truth side by side."""

import json
import types

import cv2
import numpy as np
import pytest
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from saved_model import TEACHER_STUDENT, save_model

import predict
from inference.annotated_images import AnnotatedImages
from inference.compare import BothHeads, Comparison, GroundTruth, draw_objects
from inference.media import Source, SourceError

GAP, HEADER = 6, 30


def test_each_head_gives_what_it_gives_with_test_mask_head(tiny_cfg, tmp_path):
    limits = ["TEST.DETECTIONS_PER_IMAGE", 4, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg = tiny_cfg(opts=[*limits, *TEACHER_STUDENT])
    _, cfg.MODEL.WEIGHTS = save_model(cfg, tmp_path / "model")
    one = DefaultPredictor(cfg)
    both, heads = BothHeads(one), one.model.roi_heads
    assert both.has_teacher
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    for chosen in ("teacher", "student"):
        heads.test_mask_head = chosen  # as TEST.MASK_HEAD sets it
        expected = one(image)["instances"]
        outputs = both(image)
        assert heads.test_mask_head == chosen
        for key in (chosen, "instances"):
            assert (outputs[key].pred_masks == expected.pred_masks).all()
        assert (outputs["teacher"].pred_masks != outputs["student"].pred_masks).any()
        boxes = [outputs[x].pred_boxes.tensor for x in ("teacher", "student")]
        assert len(boxes[0]) == 4 and (boxes[0] == boxes[1]).all()


def test_a_model_without_a_teacher_runs_once(log):
    calls = []

    def predictor(image):
        calls.append(image)
        return {"instances": "found"}

    predictor.model = types.SimpleNamespace(roi_heads={})
    both = BothHeads(predictor)
    assert both("image") == {"instances": "found"} and calls == ["image"]
    assert "dict has no teacher" in log.text


def found(size, *boxes):
    instances = Instances(size)
    instances.pred_boxes = Boxes(np.array(boxes, np.float32).reshape(-1, 4))
    instances.pred_classes = np.zeros(len(boxes), int)
    instances.scores = np.full(len(boxes), 0.9)
    return instances


def panels(picture, number):
    width = (picture.shape[1] + GAP) // number
    assert picture.shape[1] == number * width - GAP
    assert (picture[HEADER:, width - GAP : width] == 255).all()
    return [picture[HEADER:, k * width : (k + 1) * width - GAP] for k in range(number)]


def test_panels_stand_in_their_order(tmp_path):
    image = np.full((410, 300, 3), 90, np.uint8)
    outputs = {"teacher": found((410, 300), [20, 20, 100, 100]), "student": found((410, 300))}
    outputs["instances"] = outputs["student"]
    draw = Comparison(["ant"], None)
    picture = draw(Source(tmp_path / "x.png", tmp_path), image, outputs)
    plain, teacher, student = panels(picture, 3)
    assert (plain == 90).all() and (student == 90).all()
    # The box of the teacher alone is drawn.
    assert (teacher != 90).any() and (teacher[:, 200:] == 90).all()
    # Titles are written on white.
    assert (picture[:HEADER] < 100).any() and (picture[0] == 255).all()
    outputs = {"instances": outputs["teacher"]}
    one, model = panels(draw(Source(tmp_path / "x.png", tmp_path), image, outputs), 2)
    assert (model == teacher).all() and (one == 90).all()


def test_videos_keep_their_size(tmp_path):
    image = np.full((64, 80, 3), 90, np.uint8)
    picture = Comparison(["ant"], None)(
        Source(tmp_path / "x.mp4", tmp_path), image, {"instances": found((64, 80))}
    )
    assert [x.shape for x in panels(picture, 2)] == [(64, 80, 3)] * 2


def test_ground_truth_shows_a_dashed_box_where_there_is_no_mask(tiny_coco):
    annotated = AnnotatedImages(tiny_coco.json_file)
    objects = annotated.objects_of([7])[7]
    grey = np.full((64, 64, 3), 128, np.uint8)
    for k, is_filled in ((0, True), (1, True), (2, True), (3, False), (4, False), (5, False)):
        one = objects[k]
        picture = draw_objects(grey, [one], annotated.names, ["ship", "cat", "ant"])
        assert picture.shape == (448, 448, 3)
        x, y, w, h = (round(7 * v) for v in one.box)
        middle = picture[y + 2 * h // 3, x + w // 3 : x + w // 2]
        assert (middle != 128).any() == is_filled
        # The right side of the box: in one piece, or with gaps.
        side = (picture[y + 20 : y + h - 20, x + w] != 128).any(axis=1)
        assert side.any() and side.all() == is_filled
    assert (draw_objects(grey, [], annotated.names, []) == 128).all()


def test_ground_truth_is_found_by_the_end_of_the_path(tmp_path):
    names = ["a.png", "sub/a.png", "other/b.png"]
    data = {
        "images": [
            {"id": i, "file_name": name, "height": 20, "width": 30} for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [i, 0, 5, 5], "iscrowd": 0}
            for i in range(3)
        ],
        "categories": [{"id": 1, "name": "ant"}],
    }
    (tmp_path / "some.json").write_text(json.dumps(data))
    truth = GroundTruth(str(tmp_path / "some.json"))

    def left(path):
        objects = truth.objects_of(tmp_path / path, (20, 30))
        return None if objects is None else objects[0].box[0]

    assert [left("a.png"), left("sub/a.png"), left("x/sub/a.png"), left("sup/a.png")] == [
        0,
        1,
        1,
        0,
    ]
    assert left("b.png") is None and left("c.png") is None
    with pytest.raises(SourceError, match=r"\(21, 30\), but .*some.json says \(20, 30\)"):
        truth.objects_of(tmp_path / "a.png", (21, 30))


def test_program(tiny_cfg, tiny_coco, tmp_path, capsys, monkeypatch):
    opts = [*TEACHER_STUDENT, "TEST.DETECTIONS_PER_IMAGE", 2]
    config, weights = save_model(tiny_cfg(opts=opts, dataset=tiny_coco), tmp_path / "model")
    cv2.imwrite(str(tmp_path / "strange.png"), np.zeros((40, 60, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    images = [f"{tiny_coco.image_root}/{name}.png" for name in ("mixed", "empty")]
    arguments = ["--config-file", config, "--weights", weights, "--output-dir", "out"]
    arguments += ["--score-threshold", "0", "--compare", "--annotations", tiny_coco.json_file]
    assert predict.main([*arguments, *images, "strange.png"]) == 0
    assert f"1 images are not in {tiny_coco.json_file}" in capsys.readouterr().out
    pictures = {x: cv2.imread(f"out/overlays/{x}.png") for x in ("mixed", "empty", "strange")}
    image, teacher, student, truth = panels(pictures["empty"], 4)
    assert (image == truth).all() and (teacher != image).any() and (student != image).any()
    image, teacher, student, truth = panels(pictures["mixed"], 4)
    assert (truth != image).any()
    image, *_, truth = panels(pictures["strange"], 4)
    assert (truth == image).all()
    results = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert len(results) == 6  # once, not once a head
