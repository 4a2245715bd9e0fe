"""The exported student is a Detectron2 model that finds the same, in a process without ours."""

import contextlib
import functools
import io
import json

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from small_students import run_without, write_small_student

import export_student
from deployment import plain_student

SCRIPT = """
import numpy as np
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

cfg = get_cfg()
cfg.merge_from_file("exported/config.yaml")
instances = DefaultPredictor(cfg)(np.load("image.npy"))["instances"]
np.savez("found.npz", boxes=instances.pred_boxes.tensor.numpy(), scores=instances.scores.numpy(),
         classes=instances.pred_classes.numpy(), masks=instances.pred_masks.numpy())
"""


@pytest.fixture
def make_model(tmp_path):
    """Return ``make(config, *opts)``: its config, with weights, in tmp_path."""
    return functools.partial(write_small_student, tmp_path)


def export(folder, *arguments):
    options = ["--config-file", folder / "config.yaml", "--output-dir", folder / "exported"]
    return export_student.main([str(x) for x in [*options, *arguments]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, opts",
    [
        ("teacher_student.yaml", []),
        ("mask_rcnn.yaml", ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]),
    ],
    ids=["student", "class-agnostic"],
)
def test_it_finds_the_same_without_this_project(
    make_model, tmp_path, monkeypatch, capsys, config, opts
):
    cfg = make_model(config, *opts)
    image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    expected = DefaultPredictor(cfg)(image)["instances"]
    assert len(expected) == 5
    monkeypatch.chdir(tmp_path)
    assert export_student.main(["--config-file", "config.yaml", "--output-dir", "exported"]) == 0
    assert "The same 15 objects on 3 random images" in capsys.readouterr().out

    run_without(["teacher_student_mask"], SCRIPT, tmp_path)
    found = np.load("found.npz")
    assert np.array_equal(found["boxes"], expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found["classes"], expected.pred_classes.numpy())
    assert np.array_equal(found["scores"], expected.scores.numpy())
    masks = expected.pred_masks.numpy()
    assert 0 < masks.mean() < 1 and (found["masks"] == masks).mean() > 0.9999


def test_what_is_written_is_detectron2s(make_model, tmp_path):
    cfg = make_model("teacher_student.yaml")
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
        ("opmask.yaml", ["MODEL.ROI_BOX_HEAD.NORM", ""], "ROI_MASK_PRIOR.NAME is 'ClassAct"),
        (
            "mask_rcnn.yaml",
            ["MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvMultiUpsampleHead"]
            + ["MODEL.ROI_MASK_HEAD.NUM_DECONV", 2],
            "MODEL.ROI_MASK_HEAD.NUM_DECONV is 2",
        ),
        (
            "mask_rcnn.yaml",
            ["MODEL.ROI_MASK_HEAD.NAME", "HourglassMaskHead", "MODEL.ROI_MASK_HEAD.HOURGLASS", 20],
            "MODEL.ROI_MASK_HEAD.NAME is 'HourglassMaskHead', a class of teacher_student_mask",
        ),
        (
            "mask_rcnn.yaml",
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
    make_model("teacher_student.yaml")
    plain_model = plain_student.plain_model

    def changed(*args):
        model = plain_model(*args)
        model.roi_heads.mask_head.predictor.bias.data += 0.1
        return model

    monkeypatch.setattr(plain_student, "plain_model", changed)
    with pytest.raises(SystemExit):
        export(tmp_path)
    assert "The plain model finds something else" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_our_mask_head_with_one_deconvolution_is_detectron2s(make_model, tmp_path):
    make_model("mask_rcnn.yaml", "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvMultiUpsampleHead")
    assert export(tmp_path) == 0
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "exported/config.yaml"))
    assert cfg.MODEL.ROI_MASK_HEAD.NAME == "MaskRCNNConvUpsampleHead"


def test_the_files_of_a_training_are_never_replaced(make_model, tmp_path, capsys):
    """An export into OUTPUT_DIR took the config of the training with it, and the teacher."""
    make_model("teacher_student.yaml")
    config = tmp_path / "config.yaml"
    before = config.read_text()
    with pytest.raises(SystemExit):
        export_student.main(["--config-file", str(config), "--output-dir", str(tmp_path)])
    assert "holds config.yaml, which no export has written" in capsys.readouterr().err
    assert config.read_text() == before and not (tmp_path / "model.pth").exists()
    # An earlier export is replaced.
    assert export(tmp_path) == 0 and export(tmp_path) == 0


def test_the_classes_of_the_training_are_known_without_its_data(make_model, tmp_path, caplog):
    categories = [{"id": 10 * i, "name": f"thing {i}"} for i in range(8)]
    make_model("teacher_student.yaml", "DATASETS.TRAIN", "()", "DATASETS.TEST", "('gone',)")
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    assert export(tmp_path) == 0
    names = json.loads((tmp_path / "exported/classes.json").read_text())
    assert names == [x["name"] for x in categories] and "have no names" not in caplog.text
    # Of another model, or no list of classes: as without it, and it is said why.
    for content, words in ((categories[:3], "no names"), ({}, "categories.json holds {}; allowed")):
        (tmp_path / "categories.json").write_text(json.dumps(content))
        caplog.clear()
        assert export(tmp_path) == 0
        names = json.loads((tmp_path / "exported/classes.json").read_text())
        assert names == [f"class {i}" for i in range(8)] and words in caplog.text


def test_missing_weights_are_named(make_model, tmp_path, capsys):
    make_model("mask_rcnn.yaml")
    with pytest.raises(SystemExit):
        export(tmp_path, "--weights", tmp_path / "none.pth")
    assert "none.pth do not exist" in " ".join(capsys.readouterr().err.split())


def test_a_config_that_evaluates_the_teacher_has_its_student_exported(make_model, tmp_path):
    cfg = make_model("teacher_student.yaml", "TEST.MASK_HEAD", "teacher")
    assert export(tmp_path) == 0
    before = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
    weights = torch.load(tmp_path / "exported/model.pth", weights_only=True)["model"]
    name = "roi_heads.mask_head.predictor.weight"
    assert torch.equal(weights[name], before[name])


def test_what_was_there_stays_if_writing_fails(make_model, tmp_path, monkeypatch):
    make_model("mask_rcnn.yaml")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/model.pth").write_text("earlier")

    @contextlib.contextmanager
    def full_disk(path, mode):
        yield io.BytesIO()
        raise OSError("No space left on device")

    monkeypatch.setattr(export_student, "open_atomically", full_disk)
    with pytest.raises(SystemExit):
        export(tmp_path)
    assert (tmp_path / "exported/model.pth").read_text() == "earlier"
