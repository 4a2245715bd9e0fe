"""From a config and weights to a model that is known to fit, or to a sentence that says why not."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_data import complete
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from malice import write_checkpoint, write_pickle, yaml_of
from saved_model import TEACHER_STUDENT, save_model
from torch import nn

import teacher_student_mask
import train_net
from teacher_student_mask import add_teacher_student_mask_config, trained_model
from teacher_student_mask.data import dataset_classes
from teacher_student_mask.errors import InputError
from teacher_student_mask.run_folder import find_model, write_class_names
from teacher_student_mask.trained_model import (
    find_test_dataset,
    load_model,
    read_config,
    safe_loading,
)

ZOO = "ImageNetPretrained/MSRA/R-50.pkl"
URL = "https://dl.fbaipublicfiles.com/detectron2/"


@pytest.fixture
def save(tiny_cfg, tmp_path):
    """Save a model; returns the paths of config and weights."""

    def _save(opts=TEACHER_STUDENT, change=None, dataset=None):
        return save_model(tiny_cfg(opts=opts, dataset=dataset), tmp_path / "model", change)

    return _save


def test_masks_for_given_boxes_are_those_of_the_detections_in_them(save, tiny_coco):
    # Detectron2's own inference goes from the same boxes to masks.
    config, weights = save([*TEACHER_STUDENT, "INPUT.MIN_SIZE_TEST", 70], dataset=tiny_coco)
    trained = load_model(config, weights=weights, score_threshold=0.0)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    found = trained.predict(image)
    names = [trained.class_names[k] for k in found.pred_classes]
    drawn = trained.masks_for(image, found.pred_boxes.tensor, names)
    assert torch.allclose(drawn.pred_boxes.tensor, found.pred_boxes.tensor, atol=1e-3)
    assert torch.equal(drawn.pred_classes, found.pred_classes) and len(drawn) > 3
    assert (drawn.pred_masks == found.pred_masks).float().mean() > 0.999
    assert len(trained.predict(image, threshold=float(found.scores.median()))) < len(found)
    detections = trained.to_supervision(drawn)
    assert list(detections["class_name"]) == names
    assert np.array_equal(detections.mask, drawn.pred_masks.numpy())
    assert len(trained.masks_for(image, [], [])) == 0
    for boxes, classes, sentence in (
        ([[0, 0, 5, 5]], ["cats"], r"'cats' \(nearest: cat"),
        ([[0, 0, 5, 5]], ["cat", "cat"], "1 boxes and 2 classes"),
        ([[80, 0, 90, 5]], ["cat"], "has no area in the 80x60 image"),
        ([[5, 5, 1, 9]], ["cat"], "has no area"),
    ):
        with pytest.raises(InputError, match=sentence):
            trained.masks_for(image, boxes, classes)


def test_what_is_missing_or_wrong_is_named(save, tmp_path):
    config, weights = save()
    for options, words in (
        ({}, "MODEL.WEIGHTS is empty; give the checkpoint of a trained model"),
        ({"weights": str(tmp_path / "no.pth")}, "no.pth do not exist; give the path of a check"),
        ({"opts": ["MODEL.NOTHING", 1]}, "changes 'MODEL.NOTHING 1' are wrong: .*MODEL.NOTHING"),
        ({"heads": ["stundent"], "weights": weights}, "No such head.*has: student, teacher"),
    ):
        with pytest.raises(InputError, match=words):
            load_model(config, **options)


def test_a_folder_is_a_model(save, tmp_path):
    """The best weights, else the final ones, else the last checkpoint, else those of an export."""
    config, _ = save()
    folder = Path(config).parent
    assert teacher_student_mask.load(folder).cfg.MODEL.WEIGHTS == str(folder / "model.pth")
    with pytest.raises(InputError, match="other.pth do not exist"):  # changes win
        load_model(folder, opts=["MODEL.WEIGHTS", "other.pth"])
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    for name in ("model_0000009.pth", "model_final.pth", "model_best.pth"):
        (folder / name).touch()
        assert find_model(folder) == (config, str(folder / name))
    assert find_model(config) == (config, None)
    for path in folder.glob("*.pth"):
        path.unlink()
    for model, words in (
        (folder, "has config.yaml, but none of model_best.pth, model_final.pth, model_0000009.p"),
        (tmp_path, "has no config.yaml. The folder of a training holds config.yaml and model_f"),
        (tmp_path / "trian", "trian is not a folder"),
    ):
        with pytest.raises(InputError, match=words):
            load_model(model)


def test_a_baseline_has_the_student_alone(save):
    config, weights = save(["MODEL.ROI_HEADS.NAME", "PartiallySupervisedROIHeads"])
    assert load_model(config, weights=weights).heads == ("student",)
    with pytest.raises(InputError, match="'teacher'.*has: student"):
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
        with pytest.raises(InputError, match="model.pth were refused, .*cannot be read"):
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


def test_models_of_another_kind_are_refused(save):
    config, weights = save()
    for opts in (
        ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
        ["MODEL.MASK_ON", False, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
    ):
        with pytest.raises(InputError, match="needed is a GeneralizedRCNN with MODEL.MASK_ON True"):
            load_model(config, weights=weights, opts=opts)


# ---- classes and datasets ----


def test_the_classes_come_with_the_weights(save, tiny_coco, log):
    config, weights = save([*TEACHER_STUDENT, "DATASETS.TRAIN", (), "DATASETS.TEST", ("gone",)])
    trained = load_model(config, weights=weights)
    assert trained.class_names == ["class 0", "class 1", "class 2"]
    assert trained.category_ids == [0, 1, 2] and "3 classes without names" in log.text

    write_class_names(Path(weights).parent, *dataset_classes(tiny_coco.name))
    trained = load_model(config, weights=weights)
    assert (trained.class_names, trained.category_ids) == (["ant", "cat", "ship"], [3, 17, 90])


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
        ):
            with pytest.raises(InputError, match=words):
                find_test_dataset(tiny_cfg(dataset=tiny_coco, opts=change))
        Path(tiny_coco.json_file).unlink()
        with pytest.raises(InputError, match="needed is the path of a COCO json"):
            find_test_dataset(cfg)
    finally:
        DatasetCatalog.remove("no_json")
        MetadataCatalog.remove("no_json")


# ---- configs of a stranger ----


@pytest.fixture
def write(tmp_path):
    """Return ``write(name, text)``: the path of a file."""

    def _write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def test_values_and_bases_are_those_of_detectron2(write):
    write("base.yaml", "SEED: 3\nSOLVER: {MAX_ITER: 5, STEPS: [3, 4]}\n")
    write("other.yaml", "SEED: 4\n")  # of a list, later ones win
    path = write("leaf.yaml", "_BASE_: [base.yaml, other.yaml]\nSOLVER: {MAX_ITER: 6}\n")
    expected = get_cfg()
    add_teacher_student_mask_config(expected)
    expected.merge_from_file(path)
    assert read_config(path) == expected
    assert (expected.SEED, expected.SOLVER.MAX_ITER, expected.SOLVER.STEPS) == (4, 6, (3, 4))


@pytest.mark.parametrize("base", [None, "_BASE_: evil.yaml", "_BASE_: [plain.yaml, evil.yaml]"])
def test_tags_of_python_are_refused_and_not_run(write, tmp_path, base):
    trace = tmp_path / "trace"
    evil = write("evil.yaml", f"SEED: 1\nOUTPUT_DIR: {yaml_of(trace)}\n")
    write("plain.yaml", "SEED: 2\n")
    path = write("leaf.yaml", f"{base}\n") if base else evil
    with pytest.raises(InputError) as error:
        read_config(path)
    message = str(error.value)
    assert f"The config {path} cannot be read, and nothing of it was run: " in message
    assert "python/object/apply:os.mkdir" in message and f'"{evil}", line 2' in message
    assert not trace.exists()
    yaml.unsafe_load(Path(evil).read_text())
    assert trace.exists()  # the file does what it is said to do


@pytest.mark.parametrize("base", ["http://{}", "[plain.yaml, 'https://{}']"])
def test_a_base_is_never_downloaded(write, tmp_path, monkeypatch, base):
    # It would be kept beside the downloads of weights, where the name of the host does not count.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    write("plain.yaml", "SEED: 2\n")
    with pytest.raises(InputError, match="a base must be a file on this machine"):
        read_config(write("a.yaml", f"_BASE_: {base.format(f'127.0.0.1:9/detectron2/{ZOO}')}\n"))
    assert not (tmp_path / "cache").exists()


def test_trust_is_taken_from_the_command_line_alone(write, log):
    path = write("a.yaml", "MODEL: {TRUST_PICKLED_WEIGHTS: True, WEIGHTS: x.pkl}\n")
    with pytest.raises(InputError, match="x.pkl' were refused"):
        read_config(path)
    assert read_config(path, weights="x.pth").MODEL.TRUST_PICKLED_WEIGHTS is False
    assert "MODEL.TRUST_PICKLED_WEIGHTS of" in log.text and "is ignored" in log.text
    cfg = read_config(path, ["MODEL.TRUST_PICKLED_WEIGHTS", True])
    assert cfg.MODEL.TRUST_PICKLED_WEIGHTS is True


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1, 2\n", "cannot be read, .*line 2"),
        ("", "a.yaml"),
        ("- a\n", "a.yaml"),
        ("_BASE_: a.yaml\n", "cannot be read.*recursion"),
        ("_BASE_: none.yaml\n", "cannot be read.*: .*none.yaml"),
        ("SEED: text\n", "cannot be read.*: .*SEED"),
        ("NOTHING: 1\n", "cannot be read.*: .*NOTHING"),
    ],
)
def test_a_file_that_is_no_config_is_named(write, text, words):
    with pytest.raises(InputError, match=words):
        read_config(write("a.yaml", text))


# ---- weights of a stranger ----


def check(weights, trust=False):
    read_config("", ["MODEL.WEIGHTS", weights, "MODEL.TRUST_PICKLED_WEIGHTS", trust])


@pytest.mark.parametrize(
    "weights",
    ["", "model_final.pth", "https://example.org/model.pth", f"detectron2://{ZOO}", URL + ZOO],
)
def test_allowed_without_being_asked_for(weights):
    check(weights)


@pytest.mark.parametrize(
    "weights",
    [
        "model.pkl",
        "/some where/model.pkl",
        "https://example.org/R-50.pkl",
        "http://dl.fbaipublicfiles.com/detectron2/R-50.pkl",
        "https://dl.fbaipublicfiles.com/others/R-50.pkl",
        "https://dl.fbaipublicfiles.com.example.org/detectron2/R-50.pkl",
        # Releases of Detectron2 differ in what they leave out before they look at the suffix.
        "model.pkl?matching_heuristics=True",
        "https://example.org/model.pkl#.pth",
        "https://example.org/model.pth?name=.pkl",
        "model.p\nkl",
        " detectron2://R-50.pkl",
    ],
)
def test_pickles_of_others_need_the_opt_in(weights):
    with pytest.raises(InputError) as error:
        check(weights)
    message = str(error.value)
    assert repr(weights) in message and "a pickle can run any code when it is read" in message
    assert "MODEL.TRUST_PICKLED_WEIGHTS True" in message
    check(weights, trust=True)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "weights",
    ["detectron2://../../x.pkl", URL + "../../x.pkl", "https://example.org/a/../../../x.pth"],
)
def test_urls_cannot_leave_the_folder_of_downloads(weights, trust):
    with pytest.raises(InputError, match="a URL with '..' leaves its folder"):
        check(weights, trust)


def test_precomputed_proposals_are_pickles():
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", ("boxes.bin",)]
    with pytest.raises(InputError, match="MODEL.LOAD_PROPOSALS is True: a pickle can run"):
        read_config("", opts)
    read_config("", [*opts, "MODEL.TRUST_PICKLED_WEIGHTS", True])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))


def load(weights, trust=False):
    model = Net()
    with safe_loading(model, str(weights), trust):
        DetectionCheckpointer(model).load(str(weights))
    return model.a.tolist()


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["model.pth", "model"])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, name, is_zip):
    path, trace = tmp_path / name, tmp_path / "trace"
    write_checkpoint(path, trace, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert f"{path} were refused, and nothing of them was run: " in message
    assert "weights_only" not in message and not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does what it is said to do


@pytest.mark.parametrize("name, protocol", [("model.pth", 0), ("model.pth", 4), ("model.pkl", 2)])
def test_a_pickle_is_refused_under_any_name(tmp_path, name, protocol):
    write_pickle(tmp_path / name, tmp_path / "trace", protocol)
    with pytest.raises(InputError):
        load(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_archives_of_torchscript_are_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "model.pth"))
    with pytest.raises(InputError, match="more than tensors and plain values"):
        load(tmp_path / "model.pth")


def test_plain_tensors_and_trusted_pickles_are_read(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.tensor([1.0, 2.0])}}, tmp_path / "model.pth")
    assert load(tmp_path / "model.pth") == [1, 2]
    content = {"model": {"a": np.array([3.0, 4.0], np.float32)}, "__author__": "zoo"}
    # As it lies in the folder of downloads: nothing is asked of a network.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    path = tmp_path / "detectron2/nobody/x.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(content))
    assert load(path, trust=True) == [3, 4]
    assert load("detectron2://nobody/x.pkl") == load(URL + "nobody/x.pkl") == [3, 4]


# ---- what they can do to a training; commands load models with load_model ----


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
@pytest.mark.parametrize("resume", [False, True])
def test_training_refuses_weights(tiny_cfg, make_tiny_coco, tmp_path, name, flags, resume):
    config = tmp_path / "config.yaml"
    config.write_text(tiny_cfg(dataset=make_tiny_coco(complete)).dump())
    output, trace = tmp_path / "output", tmp_path / "trace"
    output.mkdir()
    (write_pickle if name == "model.pkl" else write_checkpoint)(output / name, trace)
    if resume:
        (output / "last_checkpoint").write_text(name)
    more = ["--resume"] if resume else []
    opts = [] if resume else ["MODEL.WEIGHTS", output / name]
    arguments = [str(x) for x in (*more, *flags, "--config-file", config, *opts)]
    with pytest.raises(InputError, match="were refused"):
        train_net.main(default_argument_parser().parse_args(arguments))
    assert not trace.exists()
