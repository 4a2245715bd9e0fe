"""What is said of a config, a dataset or a checkpoint that cannot be used."""

from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask.analysis.trained_model import find_test_dataset, load_config, load_model
from teacher_student_mask.modeling import DenseCRF


@pytest.fixture
def save(tiny_cfg, tmp_path):
    """Save a model; returns the paths of config and weights."""

    def _save(opts=TEACHER_STUDENT, change=None):
        return save_model(tiny_cfg(opts=opts), tmp_path / "model", change)

    return _save


def test_config_has_the_weights_and_the_changes(save):
    config, weights = save()
    cfg = load_config(config, weights, ["INPUT.MIN_SIZE_TEST", 70])
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST) == (weights, 70)


def test_without_weights_the_configs_are_taken(save):
    config, weights = save()
    assert load_config(config, None, ["MODEL.WEIGHTS", weights]).MODEL.WEIGHTS == weights
    with pytest.raises(ValueError, match="config.yaml names no MODEL.WEIGHTS; give the checkpoint"):
        load_config(config)


def test_files_that_are_not_there_are_named(save, tmp_path):
    config, _ = save()
    with pytest.raises(ValueError, match="no.yaml does not exist; give the path of a yaml file"):
        load_config(str(tmp_path / "no.yaml"), "model.pth")
    with pytest.raises(ValueError, match="no.pth do not exist; give the checkpoint of a trained"):
        load_config(config, str(tmp_path / "no.pth"))


def test_wrong_keys_are_named(save):
    config, weights = save()
    with pytest.raises(ValueError, match="changes 'MODEL.NOTHING 1' are wrong: .*MODEL.NOTHING"):
        load_config(config, weights, ["MODEL.NOTHING", 1])
    with open(config, "a", encoding="utf-8") as f:
        f.write("NOTHING: 1\n")
    with pytest.raises(ValueError, match="config.yaml cannot be read: .*NOTHING"):
        load_config(config, weights)


def test_without_a_gpu_the_cpu_is_taken(save, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, weights = save()
    assert load_config(config, weights, ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE is cuda:1, but there is no GPU" in log.text


def test_dataset_that_was_never_loaded_knows_its_classes(tiny_cfg, tiny_coco):
    assert not MetadataCatalog.get(tiny_coco.name).get("thing_classes")
    dataset = find_test_dataset(tiny_cfg(dataset=tiny_coco))
    assert dataset.name == tiny_coco.name
    assert dataset.annotations == tiny_coco.json_file
    assert dataset.image_root == tiny_coco.image_root
    assert dataset.classes == ["ant", "cat", "ship"]
    assert dataset.category_ids == [3, 17, 90]


def test_config_without_a_test_dataset_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match="DATASETS.TEST is empty; name the dataset"):
        find_test_dataset(tiny_cfg(opts=["DATASETS.TEST", ()]))


def test_dataset_that_is_not_registered_is_refused(tiny_cfg):
    opts = ["DATASETS.TEST", ("no_such_dataset",)]
    with pytest.raises(ValueError, match="'no_such_dataset', which is not registered; register it"):
        find_test_dataset(tiny_cfg(opts=opts))


def test_dataset_without_a_json_is_refused(tiny_cfg):
    DatasetCatalog.register("no_json", lambda: [])
    try:
        with pytest.raises(ValueError, match="'no_json' of DATASETS.TEST has no json_file"):
            find_test_dataset(tiny_cfg(opts=["DATASETS.TEST", ("no_json",)]))
    finally:
        DatasetCatalog.remove("no_json")
        MetadataCatalog.remove("no_json")


def test_annotations_that_are_gone_are_named(tiny_cfg, tiny_coco):
    Path(tiny_coco.json_file).unlink()
    with pytest.raises(ValueError, match=f"{tiny_coco.json_file} .*do not exist"):
        find_test_dataset(tiny_cfg(dataset=tiny_coco))


def test_dataset_with_other_classes_than_the_models_is_refused(tiny_cfg, tiny_coco):
    with pytest.raises(ValueError, match="has 3 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 8"):
        find_test_dataset(tiny_cfg(num_classes=8, dataset=tiny_coco))


def test_heads_that_a_model_has(save):
    config, weights = save()
    model, heads = load_model(load_config(config, weights))
    assert heads == ("student", "teacher")
    assert not model.training
    saved = torch.load(weights)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    for wrong in (["stundent"], []):
        with pytest.raises(ValueError, match="heads is .*has: student, teacher"):
            load_model(load_config(config, weights), wrong)


def test_baseline_has_the_student_alone(save):
    config, weights = save(["MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads"])
    assert load_model(load_config(config, weights))[1] == ("student",)
    with pytest.raises(ValueError, match="'teacher'.*'PartiallySupervisedROIHeads' has: student"):
        load_model(load_config(config, weights), ["teacher"])


def drop(prefix):
    def change(state):
        for name in [x for x in state if x.startswith(prefix)]:
            del state[name]

    return change


def test_checkpoint_without_a_teacher_is_refused_unless_it_is_not_needed(save):
    # Detectron2's checkpointer warns, and the teacher would run with random numbers.
    config, weights = save(change=drop("roi_heads.teacher_mask_head."))
    expected = r"lacks \d+ parameters .*: roi_heads.teacher_mask_head.mask_fcn1.weight, .*training"
    with pytest.raises(ValueError, match=expected + ", or run the head 'student' alone"):
        load_model(load_config(config, weights))
    with pytest.raises(ValueError, match=expected + r"\.$"):
        load_model(load_config(config, weights), ["teacher"])
    assert load_model(load_config(config, weights), ["student"])[1] == ("student",)


def test_hint_at_the_student_stands_only_where_it_helps(save):
    config, weights = save(change=drop("roi_heads."))
    for heads in (None, ["teacher"], ["student"]):
        with pytest.raises(ValueError) as error:
            load_model(load_config(config, weights), heads)
        assert "alone" not in str(error.value)


def test_checkpoint_without_a_student_is_refused_unless_it_is_not_needed(save):
    config, weights = save(change=drop("roi_heads.mask_head.predictor.weight"))
    with pytest.raises(ValueError, match="lacks 1 .*: roi_heads.mask_head.predictor.weight. Give"):
        load_model(load_config(config, weights))
    assert load_model(load_config(config, weights), ["teacher"])[1] == ("teacher",)


def test_parameters_of_another_shape_are_named(save):
    def change(state):
        name = "roi_heads.box_predictor.cls_score.weight"
        state[name] = state[name][:2]

    config, weights = save(change=change)
    with pytest.raises(ValueError, match="in another shape: roi_heads.box_predictor.cls_score.wei"):
        load_model(load_config(config, weights))


def test_buffers_of_old_checkpoints_may_be_missing(save):
    config, weights = save(change=drop("backbone.bottom_up.stem.conv1.norm.num_batches_tracked"))
    load_model(load_config(config, weights))


def test_file_that_is_no_checkpoint_is_named(save):
    config, weights = save()
    for content in (b"", b"not a checkpoint", Path(weights).read_bytes()[:5000]):
        Path(weights).write_bytes(content)
        with pytest.raises(ValueError, match="model.pth cannot be read as a checkpoint: "):
            load_model(load_config(config, weights))


def test_model_trained_with_crf_runs_without_the_package(save, monkeypatch):
    config, weights = save()

    def missing(cfg):
        raise ImportError("no pydensecrf")

    monkeypatch.setattr(DenseCRF, "from_config", missing)
    cfg = load_config(config, weights, ["MODEL.PSEUDO_MASK.METHOD", "crf"])
    assert load_model(cfg)[1] == ("student", "teacher")
    assert cfg.MODEL.PSEUDO_MASK.METHOD == "crf"


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
    with pytest.raises(ValueError, match=named):
        load_model(load_config(config, weights, opts))
