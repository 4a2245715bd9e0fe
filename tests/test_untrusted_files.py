"""Configs and weights of a stranger: what could run code is refused, and nothing is run."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from malice import write_checkpoint, write_pickle, yaml_of
from torch import nn

import train_net
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.cli.main import main
from teacher_student_mask.errors import InputError
from teacher_student_mask.trained_model import read_config
from teacher_student_mask.untrusted_files import check_pickles, safe_loading

ZOO = "ImageNetPretrained/MSRA/R-50.pkl"
URL = "https://dl.fbaipublicfiles.com/detectron2/"


# ---- configs ----


@pytest.fixture
def write(tmp_path):
    """Return ``write(name, text)``: the path of a file."""

    def _write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write


def test_values_and_bases_are_those_of_detectron2(write):
    write("base.yaml", "SEED: 3\nSOLVER: {MAX_ITER: 5, STEPS: [3, 4]}\n")
    path = write("leaf.yaml", "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6}\n")
    expected = get_cfg()
    add_teacher_student_mask_config(expected)
    expected.merge_from_file(path)
    assert read_config(path) == expected
    assert (expected.SEED, expected.SOLVER.MAX_ITER, expected.SOLVER.STEPS) == (3, 6, (3, 4))


@pytest.mark.parametrize("base", [None, "_BASE_: evil.yaml", "_BASE_: [plain.yaml, evil.yaml]"])
def test_tags_of_python_are_refused_and_not_run(write, tmp_path, base):
    trace = tmp_path / "trace"
    evil = write("evil.yaml", f"SEED: 1\nOUTPUT_DIR: {yaml_of(trace)}\n")
    write("plain.yaml", "SEED: 2\n")
    path = write("leaf.yaml", f"{base}\n") if base else evil
    with pytest.raises(InputError) as error:
        read_config(path)
    message = str(error.value)
    assert f"The config {path} was refused and nothing of it was run: {evil}, line 2: " in message
    assert "python/object/apply:os.mkdir" in message
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
    cfg = read_config(path)
    assert cfg.MODEL.TRUST_PICKLED_WEIGHTS is False and cfg.MODEL.WEIGHTS == "x.pkl"
    assert "MODEL.TRUST_PICKLED_WEIGHTS of" in log.text and "is ignored" in log.text
    cfg = read_config(path, ["MODEL.TRUST_PICKLED_WEIGHTS", True])
    assert cfg.MODEL.TRUST_PICKLED_WEIGHTS is True


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [1, 2\n", "cannot be read: .*line"),
        ("", "a.yaml"),
        ("- a\n", "a.yaml"),
        ("_BASE_: a.yaml\n", "its _BASE_ leads back to itself"),
        ("_BASE_: none.yaml\n", "cannot be read: .*none.yaml"),
        ("SEED: text\n", "cannot be read: .*SEED"),
    ],
)
def test_a_file_that_is_no_config_is_named(write, text, words):
    with pytest.raises(InputError, match=words):
        read_config(write("a.yaml", text))


# ---- weights ----


def check(weights, trust=False):
    check_pickles(read_config("", ["MODEL.WEIGHTS", weights, "MODEL.TRUST_PICKLED_WEIGHTS", trust]))


@pytest.mark.parametrize(
    "weights",
    ["", "model_final.pth", "https://example.org/model.pth", "folder.pkl/model.pth", "model.pyth"]
    + [f"detectron2://{ZOO}", URL + ZOO, "catalog://ImageNetPretrained/MSRA/R-50"],
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
    with pytest.raises(InputError, match="a URL with '..' could name a file outside"):
        check(weights, trust)


def test_the_switch_of_pytorch_is_known(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(InputError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has them unpickled"):
        check("model.pth")
    check("model.pth", trust=True)


def test_precomputed_proposals_are_pickles():
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", ("boxes.bin",)]
    with pytest.raises(InputError, match="the proposals boxes.bin are pickles"):
        check_pickles(read_config("", opts))
    check_pickles(read_config("", [*opts, "MODEL.TRUST_PICKLED_WEIGHTS", True]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))


def load(weights, trust=False):
    model = Net()
    with safe_loading(str(weights), trust):
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
    assert f"{path} were refused and nothing of them was run: they ask for posix.mkdir" in message
    assert "weights_only" not in message and not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does what it is said to do


@pytest.mark.parametrize("name, protocol", [("model.pth", 0), ("model.pth", 4), ("model.pkl", 2)])
def test_a_pickle_is_refused_under_any_name(tmp_path, name, protocol):
    write_pickle(tmp_path / name, tmp_path / "trace", protocol)
    with pytest.raises(InputError):
        load(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_archives_of_torchscript_are_refused_and_other_errors_stay(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "model.pth"))
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        load(tmp_path / "model.pth")
    with pytest.raises(RuntimeError, match="^of the model$"), safe_loading(""):
        raise RuntimeError("of the model")


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


# ---- programs: all others load models in the same way, see test_security.py ----


@pytest.fixture
def config(tiny_cfg, make_tiny_coco, tmp_path):
    """Path of the config of a tiny model."""

    def give_all_objects_a_mask(data):
        for x in data["annotations"]:
            left, top, width, height = x["bbox"]
            if not x.get("segmentation"):
                x["segmentation"] = [[left, top, left + width, top, left, top + height]]

    (tmp_path / "config.yaml").write_text(
        tiny_cfg(dataset=make_tiny_coco(give_all_objects_a_mask)).dump()
    )
    return tmp_path / "config.yaml"


def train(config, *flags, opts=()):
    arguments = [*flags, "--config-file", config, *opts]
    train_net.main(default_argument_parser().parse_args([str(x) for x in arguments]))


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
@pytest.mark.parametrize("resume", [False, True])
def test_training_refuses_weights(config, tmp_path, name, flags, resume):
    output, trace = tmp_path / "output", tmp_path / "trace"
    output.mkdir()
    (write_pickle if name == "model.pkl" else write_checkpoint)(output / name, trace)
    (output / "last_checkpoint").write_text(name)
    with pytest.raises(InputError, match="were refused"):
        if resume:
            train(config, "--resume", *flags)
        else:
            train(config, *flags, opts=["MODEL.WEIGHTS", output / name])
    assert not trace.exists()


def test_training_takes_what_is_trusted(config, tmp_path):
    write_pickle(tmp_path / "model.pkl", tmp_path / "trace")
    # It is opened now; what it does is its own.
    opts = ["MODEL.WEIGHTS", tmp_path / "model.pkl", "MODEL.TRUST_PICKLED_WEIGHTS", True]
    with pytest.raises(Exception):  # noqa: B017 - there are no weights in it.
        train(config, "--eval-only", opts=opts)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "evil.yaml"])
def test_a_command_refuses_weights_and_configs(config, tmp_path, capsys, name):
    path, trace = tmp_path / name, tmp_path / "trace"
    if name == "evil.yaml":
        path.write_text(f"{config.read_text()}\nOUTPUT_DIR_: {yaml_of(trace)}\n")
        options = ["--config-file", path]
    else:
        (write_pickle if name == "model.pkl" else write_checkpoint)(path, trace)
        options = ["--config-file", config, "--weights", path]
    (tmp_path / "a.png").touch()
    arguments = ["predict", tmp_path / "a.png", *options, "--output-dir", tmp_path / "out"]
    assert main([str(x) for x in arguments]) == 1
    assert "refused" in capsys.readouterr().err
    assert not trace.exists() and not (tmp_path / "out").exists()
