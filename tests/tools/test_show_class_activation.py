"""The pictures of class activation maps, with a tiny untrained OPMask."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from tiny_model import TINY_MODEL

import show_class_activation
from show_class_activation import ClassActivation, draw
from teacher_student_mask import add_teacher_student_mask_config

ROOT = Path(__file__).resolve().parents[2]


def make_model(folder, config):
    """Write config and weights of a model that finds five objects in any image, all by chance."""
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(ROOT / config))
    cfg.merge_from_list(
        TINY_MODEL
        + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.NORM", ""]
        + ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        + ["DATASETS.TEST", (), "DATASETS.TRAIN", ()]
    )
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opmask")
    cfg = make_model(folder, "configs/shapes/opmask.yaml")
    cfg.OUTPUT_DIR = str(folder)
    return cfg


@pytest.fixture
def image(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    return image


def run(cfg, folder, *arguments):
    options = ["--config-file", f"{cfg.OUTPUT_DIR}/config.yaml", "--output-dir", folder / "out"]
    return show_class_activation.main([str(x) for x in [*options, *arguments]])


def test_maps_are_those_of_the_predicted_class_at_the_detected_box(cfg, image):
    cfg = cfg.clone()
    cfg.MODEL.ROI_MASK_PRIOR.REPOOL = True
    predictor = DefaultPredictor(cfg)
    expected = predictor(image)["instances"]
    instances, maps = ClassActivation(predictor)(image)
    assert len(instances) == 5 and maps.shape == (5, 7, 7)
    assert instances.scores.tolist() == sorted(expected.scores.tolist(), reverse=True)
    assert torch.allclose(instances.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
    # Eq. (9), by hand: the classifier's row of the class in each cell, then min-max of the ROI.
    model = predictor.model
    resized = predictor.aug.get_transform(image).apply_image(image)
    inputs = [{"image": torch.as_tensor(resized.transpose(2, 0, 1).astype("float32"))}]
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        scale = torch.tensor([resized.shape[1] / 128, resized.shape[0] / 96] * 2)
        boxes = Boxes(instances.pred_boxes.tensor * scale)
        heads = model.roi_heads
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], [boxes])
        cells = heads.box_head(pooled).numpy()
    weight = heads.box_predictor.cls_score.weight.detach().numpy()
    for cell, label, found in zip(cells, instances.pred_classes.tolist(), maps):
        cam = sum(weight[label, c] * cell[c] for c in range(len(cell)))
        want = (cam - cam.min()) / (cam.max() - cam.min() + 1e-4)
        np.testing.assert_allclose(found, want, atol=2e-3)


def test_a_row_for_each_object_that_covers_a_pixel(cfg, image):
    cfg = cfg.clone()
    cfg.MODEL.ROI_MASK_PRIOR.REPOOL = True
    instances, maps = ClassActivation(DefaultPredictor(cfg))(image)
    names = [f"name {k}" for k in range(8)]
    instances.pred_boxes.tensor[:2] = torch.tensor([[3.0, 5, 33, 55], [7, 7, 7.2, 20]])
    figure = draw(image, instances, maps, names)
    assert len(figure.axes) == 4 * 4
    first = figure.axes[0]
    label = int(instances.pred_classes[0])
    assert first.get_ylabel() == f"name {label} {100 * instances.scores[0]:.0f}%"
    # RGB, of the box.
    assert np.array_equal(first.images[0].get_array(), image[5:55, 3:33, ::-1])
    assert np.array_equal(figure.axes[1].images[0].get_array(), maps[0])
    assert draw(image, instances[1:2], maps[1:2], names) is None


def test_pictures_are_written(cfg, tmp_path, image, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    inputs = ["--score-threshold", 0, "--max-objects", 2, tmp_path / "a.png"]
    assert run(cfg, tmp_path, *inputs) == 0
    assert "1 pictures of 1 images" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "out" / "a.png")).shape[0] > 200
    assert run(cfg, tmp_path, *inputs, tmp_path / "broken.png") == 1
    assert "broken.png" in capsys.readouterr().err
    (tmp_path / "out" / "a.png").unlink()
    assert run(cfg, tmp_path, "--score-threshold", 1, tmp_path / "a.png") == 0
    assert not (tmp_path / "out" / "a.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["a.png", "--max-objects", "0"], "--max-objects must be at least 1, got 0"),
        (["none.png"], "matches no file"),
        (["clip.mp4"], "Give images; these are videos"),
        (["a.png", "--score-threshold", "2"], "--score-threshold must be in [0, 1]"),
        (["a.png", "--weights", "none.pth"], "none.pth do not exist"),
    ],
)
def test_usage_errors(cfg, tmp_path, image, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(SystemExit) as error:
        run(cfg, tmp_path, *arguments)
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_model_without_class_activation_is_refused(tmp_path, image, capsys):
    cfg = make_model(tmp_path, "configs/shapes/mask_rcnn.yaml")
    cfg.OUTPUT_DIR = str(tmp_path)
    with pytest.raises(SystemExit):
        run(cfg, tmp_path, tmp_path / "a.png")
    assert "its mask heads use no class activation map" in " ".join(capsys.readouterr().err.split())
