"""The exported student is a Detectron2 model that finds the same, in a process without ours."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from tiny_model import TINY_MODEL

import export_student
from teacher_student_mask import add_teacher_student_mask_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import numpy as np
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

cfg = get_cfg()
cfg.merge_from_file("exported/config.yaml")
instances = DefaultPredictor(cfg)(np.load("image.npy"))["instances"]
assert "teacher_student_mask" not in sys.modules
np.savez("found.npz", boxes=instances.pred_boxes.tensor.numpy(), scores=instances.scores.numpy(),
         classes=instances.pred_classes.numpy(), masks=instances.pred_masks.numpy())
"""


@pytest.fixture
def make_model(tmp_path):
    """Return ``make(config, *opts)``: its config, with weights, in tmp_path."""

    def make(config, *opts):
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        cfg.merge_from_file(str(ROOT / "configs/shapes" / config))
        cfg.merge_from_list(
            TINY_MODEL
            + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
            + ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
            + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts]
        )
        torch.manual_seed(0)
        model = build_model(cfg)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_head.predictor.weight"):
                torch.nn.init.normal_(parameter, std=1.0)
        torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        (tmp_path / "config.yaml").write_text(cfg.dump())
        return cfg

    return make


def export(folder, *arguments):
    options = ["--config-file", folder / "config.yaml", "--output-dir", folder / "exported"]
    return export_student.main([str(x) for x in [*options, *arguments]])


@pytest.mark.parametrize("config", ["teacher_student_shapes.yaml", "mask_rcnn_shapes.yaml"])
def test_it_finds_the_same_without_this_project(make_model, tmp_path, monkeypatch, capsys, config):
    cfg = make_model(config)
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    expected = DefaultPredictor(cfg)(image)["instances"]
    assert len(expected) == 5
    monkeypatch.chdir(tmp_path)
    assert export_student.main(["--config-file", "config.yaml", "--output-dir", "exported"]) == 0
    assert "The same 15 objects on 3 random images" in capsys.readouterr().out

    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = np.load("found.npz")
    assert np.array_equal(found["boxes"], expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found["classes"], expected.pred_classes.numpy())
    assert np.array_equal(found["scores"], expected.scores.numpy())
    masks = expected.pred_masks.numpy()
    assert 0 < masks.mean() < 1 and (found["masks"] == masks).mean() > 0.9999


def test_what_is_written_is_detectron2s(make_model, tmp_path):
    cfg = make_model("teacher_student_shapes.yaml")
    assert export(tmp_path) == 0
    folder = tmp_path / "exported"
    weights = torch.load(folder / "model.pth", weights_only=True)["model"]
    before = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    assert set(before) - set(weights) == {x for x in before if "teacher" in x}
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    # Detectron2's own keys alone, and only those that are not its defaults.
    content = yaml.safe_load((folder / "config.yaml").read_text())
    assert content["VERSION"] == 2 and content["MODEL"]["ROI_HEADS"]["NAME"] == "StandardROIHeads"
    assert "TEACHER_MASK_HEAD" not in content["MODEL"]
    assert "PRE_NMS_TOPK_TEST" in content["MODEL"]["RPN"]
    assert "META_ARCHITECTURE" not in content["MODEL"]
    names = json.loads((folder / "classes.json").read_text())
    assert len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES


@pytest.mark.parametrize(
    "config, opts, words",
    [
        ("opmask_shapes.yaml", ["MODEL.ROI_BOX_HEAD.NORM", ""], "ROI_MASK_PRIOR.NAME is 'ClassAct"),
        (
            "mask_rcnn_shapes.yaml",
            ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvMultiUpsampleHead"]
            + ["MODEL.ROI_MASK_HEAD.NUM_DECONV", 2],
            "MODEL.ROI_MASK_HEAD.NUM_DECONV is 2",
        ),
        (
            "mask_rcnn_shapes.yaml",
            ["MODEL.ROI_MASK_HEAD.NAME", "HourglassMaskHead", "MODEL.ROI_MASK_HEAD.HOURGLASS", 20],
            "MODEL.ROI_MASK_HEAD.NAME is 'HourglassMaskHead', a class of teacher_student_mask",
        ),
        (
            "mask_rcnn_shapes.yaml",
            ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
            "MODEL.ROI_HEADS.NAME is 'StandardROIHeads'; what can be exported",
        ),
    ],
)
def test_what_detectron2_does_not_have_is_named(make_model, tmp_path, capsys, config, opts, words):
    make_model(config, *opts)
    with pytest.raises(SystemExit) as error:
        export(tmp_path)
    assert error.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "exported").exists()


def test_a_model_that_finds_something_else_is_not_written(
    make_model, tmp_path, capsys, monkeypatch
):
    make_model("teacher_student_shapes.yaml")
    plain_model = export_student.plain_model

    def changed(*args):
        model = plain_model(*args)
        model.roi_heads.mask_head.predictor.bias.data += 0.1
        return model

    monkeypatch.setattr(export_student, "plain_model", changed)
    with pytest.raises(SystemExit):
        export(tmp_path)
    assert "The plain model finds something else" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_our_mask_head_with_one_deconvolution_is_detectron2s(make_model, tmp_path):
    make_model("mask_rcnn_shapes.yaml", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvMultiUpsampleHead")
    assert export(tmp_path) == 0
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "exported/config.yaml"))
    assert cfg.MODEL.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead"


def test_missing_weights_are_named(make_model, tmp_path, capsys):
    make_model("mask_rcnn_shapes.yaml")
    with pytest.raises(SystemExit):
        export(tmp_path, "--weights", tmp_path / "none.pth")
    assert "none.pth do not exist" in " ".join(capsys.readouterr().err.split())
