"""From a config and weights to a model that is known to fit, or to a sentence that says why not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask import trained_model
from teacher_student_mask.errors import InputError
from teacher_student_mask.trained_model import (
    find_test_dataset,
    load_config,
    load_model,
    read_class_names,
    write_class_names,
)


@pytest.fixture
def save(tiny_cfg, tmp_path):
    """Save a model; returns the paths of config and weights."""

    def _save(opts=TEACHER_STUDENT, change=None, dataset=None):
        return save_model(tiny_cfg(opts=opts, dataset=dataset), tmp_path / "model", change)

    return _save


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_predictions_are_those_of_default_predictor(save, tiny_coco, image_format):
    opts = [*TEACHER_STUDENT, "INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", 70]
    config, weights = save(opts, dataset=tiny_coco)
    trained = load_model(config, weights=weights, score_threshold=0.0)
    assert not trained.model.training and trained.heads == ("student", "teacher")
    assert (trained.class_names, trained.category_ids) == (["ant", "cat", "ship"], [3, 17, 90])
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    found, expected = trained.predict(image), DefaultPredictor(trained.cfg)(image)["instances"]
    assert found.image_size == (60, 80) and len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, expected.pred_masks)


def test_config_weights_and_changes(save, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, weights = save()
    opts = ["INPUT.MIN_SIZE_TEST", 70, "MODEL.DEVICE", "cuda:1"]
    cfg = load_config(config, opts, weights=weights)
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.DEVICE) == (weights, 70, "cpu")
    assert "MODEL.DEVICE is cuda:1, but there is no GPU" in log.text
    assert load_config(config, ["MODEL.WEIGHTS", weights]).MODEL.WEIGHTS == weights


def test_what_is_missing_or_wrong_is_named(save, tmp_path):
    config, weights = save()
    for options, words in (
        ({}, "MODEL.WEIGHTS is empty; give the checkpoint of a trained model"),
        ({"weights": str(tmp_path / "no.pth")}, "no.pth do not exist; give the checkpoint"),
        ({"opts": ["MODEL.NOTHING", 1]}, "changes 'MODEL.NOTHING 1' are wrong: .*MODEL.NOTHING"),
        ({"score_threshold": 1.5}, "score threshold is 1.5; it must be in"),
        ({"heads": ["stundent"], "weights": weights}, "heads is .*has: student, teacher"),
        ({"heads": [], "weights": weights}, "heads is .*has: student, teacher"),
    ):
        with pytest.raises(InputError, match=words):
            load_model(config, **options)
    with pytest.raises(InputError, match="no.yaml cannot be read"):
        load_config(str(tmp_path / "no.yaml"))
    with open(config, "a", encoding="utf-8") as f:
        f.write("NOTHING: 1\n")
    with pytest.raises(InputError, match="config.yaml cannot be read: .*NOTHING"):
        load_config(config)


def test_weights_of_the_run_are_hinted_at(save, tmp_path):
    config, _ = save()
    (tmp_path / "output").mkdir()  # OUTPUT_DIR
    (tmp_path / "output" / "model_final.pth").touch()
    with pytest.raises(InputError, match="There is .*output/model_final.pth"):
        load_model(config)


def test_a_baseline_has_the_student_alone(save):
    config, weights = save(["MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads"])
    assert load_model(config, weights=weights).heads == ("student",)
    with pytest.raises(InputError, match="'teacher'.*'PartiallySupervisedROIHeads' has: student"):
        load_model(config, weights=weights, heads=["teacher"])


@pytest.mark.parametrize(
    "head, other", [("teacher_mask_head", "student"), ("mask_head", "teacher")]
)
def test_only_a_head_that_is_not_used_may_be_missing(save, head, other):
    """Detectron2's checkpointer warns, and the head would run with random numbers."""
    name = f"roi_heads.{head}.mask_fcn1.weight"
    config, weights = save(change=lambda state: state.pop(name))
    with pytest.raises(InputError, match=f"lacks 1 parameters .*: {name}. Give .*same training"):
        load_model(config, weights=weights)
    assert load_model(config, weights=weights, heads=[other]).heads == (other,)


def test_parameters_of_another_shape_are_named_and_buffers_may_be_missing(save):
    def change(state):
        state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(2, 32)

    config, weights = save(change=change)
    with pytest.raises(InputError, match="in another shape: roi_heads.box_predictor.cls_score.wei"):
        load_model(config, weights=weights)
    counter = "backbone.bottom_up.stem.conv1.norm.num_batches_tracked"
    config, weights = save(change=lambda state: state.pop(counter))
    load_model(config, weights=weights)


def test_a_file_that_is_no_checkpoint_is_named(save):
    config, weights = save()
    for content in (b"", b"not a checkpoint", Path(weights).read_bytes()[:5000]):
        Path(weights).write_bytes(content)
        with pytest.raises(InputError, match="model.pth cannot be read as a checkpoint: "):
            load_model(config, weights=weights)


def test_inference_needs_nothing_that_makes_pseudo_masks(save, monkeypatch):
    """ "crf" may ask for pydensecrf, which need not be installed where the model runs."""
    config, weights = save()
    built = []
    monkeypatch.setattr(
        trained_model, "build_model", lambda cfg: built.append(cfg) or build_model(cfg)
    )
    trained = load_model(config, weights=weights, opts=["MODEL.PSEUDO_MASK.METHOD", "crf"])
    assert trained.cfg.MODEL.PSEUDO_MASK.METHOD == "crf"
    assert built[0].MODEL.PSEUDO_MASK.METHOD == "none"


@pytest.mark.parametrize(
    "opts, named",
    [
        (["MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "MASK_ON is False"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "'ProposalNetwork'"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "with an RPN"),
    ],
)
def test_models_of_another_kind_are_refused(save, opts, named):
    config, weights = save()
    with pytest.raises(InputError, match=named):
        load_model(config, weights=weights, opts=opts)


# ---- classes and datasets ----


def test_the_classes_come_with_the_weights(save, tiny_cfg, tiny_coco, log):
    config, weights = save([*TEACHER_STUDENT, "DATASETS.TRAIN", (), "DATASETS.TEST", ("gone",)])
    trained = load_model(config, weights=weights)
    assert trained.class_names == ["class 0", "class 1", "class 2"]
    assert trained.category_ids == [0, 1, 2] and "The classes have no names" in log.text

    cfg = tiny_cfg(dataset=tiny_coco)
    cfg.OUTPUT_DIR = str(Path(weights).parent)
    write_class_names(cfg)
    trained = load_model(config, weights=weights)
    assert (trained.class_names, trained.category_ids) == (["ant", "cat", "ship"], [3, 17, 90])


def test_what_is_no_list_of_classes_is_named(tmp_path):
    assert read_class_names(tmp_path) is None
    for content in ("{", "1", '[{"id": "1", "name": "cat"}]', '{"id": 1}'):
        (tmp_path / "categories.json").write_text(content)
        with pytest.raises(InputError, match="categories.json"):
            read_class_names(tmp_path)
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 4, "name": "cat"}]))
    assert read_class_names(tmp_path) == [{"id": 4, "name": "cat"}]


def test_the_test_dataset(tiny_cfg, tiny_coco):
    assert not MetadataCatalog.get(tiny_coco.name).get("thing_classes")  # never loaded
    cfg = tiny_cfg(dataset=tiny_coco)
    assert find_test_dataset(cfg) == (tiny_coco.json_file, tiny_coco.image_root)
    DatasetCatalog.register("no_json", lambda: [])
    try:
        for change, words in (
            (["DATASETS.TEST", ()], "names ''; needed is the path of a COCO json"),
            (["DATASETS.TEST", ("none",)], "names 'none'; needed"),
            (["DATASETS.TEST", ("no_json",)], "names 'no_json'; needed"),
            (["MODEL.ROI_HEADS.NUM_CLASSES", 8], "has 3 classes, but MODEL.ROI_HEADS.NUM_CLASSES"),
        ):
            with pytest.raises(InputError, match=words):
                find_test_dataset(tiny_cfg(dataset=tiny_coco, opts=change))
        Path(tiny_coco.json_file).unlink()
        with pytest.raises(InputError, match=f"{tiny_coco.json_file} .*do not exist"):
            find_test_dataset(cfg)
    finally:
        DatasetCatalog.remove("no_json")
        MetadataCatalog.remove("no_json")
