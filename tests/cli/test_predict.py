"""tsmask predict with a tiny untrained model, against DefaultPredictor and pycocotools."""

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import supervision as sv
from detectron2.engine import DefaultPredictor
from PIL import Image
from pycocotools.coco import COCO
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask.cli.main import main
from teacher_student_mask.trained_model import load_config

IDS, NAMES = [3, 17, 90], ["ant", "cat", "ship"]


@pytest.fixture
def model(tiny_cfg, tmp_path, monkeypatch):
    """Config and weights of a teacher and student that find four objects in any image."""
    monkeypatch.chdir(tmp_path)
    opts = ["TEST.DETECTIONS_PER_IMAGE", 4, "DATASETS.TEST", (), "DATASETS.TRAIN", ()]
    opts += ["INPUT.FORMAT", "RGB"]  # tests/test_exporters.py has a model for BGR
    config, weights = save_model(tiny_cfg(opts=[*TEACHER_STUDENT, *opts]), tmp_path / "model")
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    (tmp_path / "model" / "categories.json").write_text(json.dumps(categories))
    return config, weights


@pytest.fixture
def run(model):
    """Run the command in tmp_path; the results go to "out"."""
    config, weights = model

    def _run(*arguments, threshold=0.0):
        options = ["--config-file", config, "--weights", weights, "--output-dir", "out"]
        options += ["--score-threshold", threshold]
        return main(["predict", *map(str, [*arguments, *options])])

    return _run


def write_image(path, height, width, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape)
    Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8)).save(path)
    return path


def write_video(path, num_frames=3):
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 64, 80, 3)).astype(np.uint8)
    with sv.VideoSink(str(path), sv.VideoInfo(80, 64, 10)) as sink:
        for frame in frames:
            sink.write_frame(frame)


def load_images():
    return json.loads(Path("out/images.json").read_text())["images"]


def test_results_are_those_of_default_predictor(run, model):
    sizes = [(40, 60), (97, 33), (130, 64)]
    paths = [Path("wide.png"), Path("gray.png"), Path("tall.bmp")]
    for path, size, mode in zip(paths, sizes, ("RGB", "L", "RGB")):
        write_image(path, *size, mode)
    assert run(*paths) == 0

    cfg = load_config(model[0], weights=model[1])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.DATASETS.TEST = ("shapes_val",)  # DefaultPredictor wants one
    predictor = DefaultPredictor(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO("out/images.json")
        results = coco.loadRes("out/coco_instances_results.json")
    assert {i: x["name"] for i, x in coco.cats.items()} == dict(zip(IDS, NAMES))
    for image_id, (path, size) in enumerate(zip(paths, sizes), start=1):
        image = coco.imgs[image_id]
        assert (image["file_name"], image["height"], image["width"]) == (str(path), *size)
        expected = predictor(cv2.imread(str(path)))["instances"]
        found = results.imgToAnns[image_id]
        assert len(found) == len(expected) == 4
        for k, result in enumerate(found):
            x0, y0, x1, y1 = expected.pred_boxes.tensor[k].tolist()
            assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4)
            assert result["score"] == pytest.approx(expected.scores[k].item())
            assert result["category_id"] == IDS[expected.pred_classes[k]]
            mask = mask_util.decode(result["segmentation"]).astype(bool)
            assert (mask == expected.pred_masks[k].numpy()).all()


def test_a_folder_and_a_config_name_the_same_model(run, model, capsys):
    write_image(Path("a.png"), 40, 60), write_image(Path("b.png"), 40, 60)
    output, found = ["--output-dir", "out", "--score-threshold", "0"], []
    files = ["--config-file", model[0], "--weights", model[1]]
    for words in (["model", "a.png", *output, "b.png"], ["a.png", "b.png", *files, *output]):
        assert main(["predict", *words]) == 0
        found.append(json.loads(Path("out/coco_instances_results.json").read_text()))
    assert found[0] == found[1] and len(found[0]) == 8
    assert main(["predict", "a.png", *output]) == 1
    assert "name one model: MODEL, the folder of a training" in capsys.readouterr().err


def test_every_file_has_one_overlay_and_overlays_are_no_inputs(run):
    names = ["in/a.png", "in/sub/a.jpg", "in/sub/a.webp", "b/a.png", "in/x\ny.png", "in/~.png"]
    for seed, name in enumerate(names):
        write_image(Path(name), 40, 60, seed=seed)
    Path("in/notes.txt").write_text("left out")
    write_image(Path("in/.ipynb_checkpoints/a-checkpoint.png"), 40, 60)
    Path("in/._a.png").write_bytes(b"of macOS")
    for more in ([], ["."]):
        assert run("in", "b/*", "in/a.png", *more) == 0
        assert sorted(x["file_name"] for x in load_images()) == sorted(names)
        overlays = {f"overlays/{x.name}" for x in Path("out/overlays").iterdir()}
        assert {x["overlay"] for x in load_images()} == overlays and len(overlays) == 6
    assert load_images()[0]["overlay"] == "overlays/0001_a.jpg"
    picture = cv2.imread("out/overlays/0001_a.jpg")
    assert picture.shape == (7 * 40, 7 * 60, 3)  # enlarged


def test_broken_files_do_not_stop_the_others(run, capsys):
    for name in "abz":
        write_image(Path(f"in/{name}.png"), 40, 60)
    write_image(Path("in/deep.png"), 40, 60, "I;16")
    Path("in/b.png").write_bytes(Path("in/b.png").read_bytes()[:900])
    Path("in/c.jpg").write_bytes(b"no image")
    Path("in/d.mp4").write_bytes(b"no video")
    assert run("in") == 1
    assert [Path(x["file_name"]).name for x in load_images()] == ["a.png", "z.png"]
    errors = capsys.readouterr().err.rpartition("4 of 6 inputs failed:")[2]
    assert all(f"in/{name}" in errors for name in ("b.png", "c.jpg", "d.mp4", "deep.png"))
    assert "8 bits" in errors


def test_video(run):
    write_video("v.avi")
    assert run("v.avi") == 0
    assert [x["frame"] for x in load_images()] == [0, 1, 2]
    info = sv.VideoInfo.from_video_path("out/overlays/0001_v.mp4")
    assert (info.total_frames, info.fps) == (3, 10)
    assert info.resolution_wh == (5 * 80, 5 * 64)  # enlarged


def test_what_is_wrong_is_one_sentence(run, capsys):
    assert run("none*.png") == 1
    words = "error: 'none*.png' has no image and no video; images end in .bmp"
    assert words in capsys.readouterr().err
    assert not Path("out").exists()
