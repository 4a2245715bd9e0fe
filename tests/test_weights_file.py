"""Weights that could run code are refused; Detectron2's own and plain tensors are read."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from malice import write_checkpoint, write_pickle
from torch import nn

from teacher_student_mask.weights_file import (
    check_pickled_files,
    check_weights,
    safe_loading,
    weights_to_load,
)

ZOO = "ImageNetPretrained/MSRA/R-50.pkl"
URL = "https://dl.fbaipublicfiles.com/detectron2/"


@pytest.mark.parametrize(
    "weights",
    [
        "",
        "model_final.pth",
        "/some where/model_final.pth",
        "https://example.org/model.pth",
        "folder.pkl/model.pth",
        "model.pyth",
        f"detectron2://{ZOO}",
        URL + ZOO,
        f"detectron2://{ZOO}?matching_heuristics=True",
        "catalog://ImageNetPretrained/MSRA/R-50",
    ],
)
def test_allowed_without_being_asked_for(weights):
    check_weights(weights)


@pytest.mark.parametrize(
    "weights",
    [
        "model.pkl",
        "../model.pkl",
        "/some where/model.pkl",
        "https://example.org/R-50.pkl",
        "http://dl.fbaipublicfiles.com/detectron2/R-50.pkl",
        "https://dl.fbaipublicfiles.com/others/R-50.pkl",
        "https://dl.fbaipublicfiles.com.example.org/detectron2/R-50.pkl",
        "https://dl.fbaipublicfiles.com@example.org/detectron2/R-50.pkl",
        # Releases of Detectron2 differ in what they leave out before they look at the suffix.
        "model.pkl?matching_heuristics=True",
        "https://example.org/model.pkl#.pth",
        "https://example.org/model.pkl;.pth",
        "https://example.org/model.pth?name=.pkl",
        "model.p\nkl",
        " detectron2://R-50.pkl",
    ],
)
def test_pickles_of_others_need_the_opt_in(weights):
    with pytest.raises(ValueError) as error:
        check_weights(weights)
    message = str(error.value)
    assert repr(weights) in message and "a pickle can run any code when it is read" in message
    assert "MODEL.TRUST_PICKLED_WEIGHTS True" in message and "tools/convert_weights.py" in message
    check_weights(weights, trust_pickled=True)


@pytest.mark.parametrize("trust_pickled", [False, True])
@pytest.mark.parametrize(
    "weights",
    ["detectron2://../../x.pkl", URL + "../../x.pkl", "detectron2://a/.\t./x.pkl"]
    + ["https://example.org/a/../../../x.pth"],
)
def test_urls_cannot_leave_the_folder_of_downloads(weights, trust_pickled):
    with pytest.raises(ValueError, match="a URL with '..' could name a file outside"):
        check_weights(weights, trust_pickled)


def test_old_pytorch_and_its_switch_are_known(monkeypatch):
    check_weights("model.pth")
    with monkeypatch.context() as m:
        m.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        with pytest.raises(ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD has them unpickled"):
            check_weights("model.pth")
        check_weights("model.pth", trust_pickled=True)
    version = torch.torch_version.TorchVersion("2.5.1+cpu")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ValueError, match="PyTorch 2.5.1.* would unpickle them.*; install 2.6"):
        check_weights("model.pth")


def test_precomputed_proposals_are_pickles(tiny_cfg):
    check_pickled_files(tiny_cfg())
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN", ("boxes.bin",)]
    with pytest.raises(ValueError, match="the proposals boxes.bin are pickles"):
        check_pickled_files(tiny_cfg(opts=opts))
    check_pickled_files(tiny_cfg(opts=[*opts, "MODEL.TRUST_PICKLED_WEIGHTS", True]))
    with pytest.raises(ValueError, match="'x.pkl' were refused"):
        check_pickled_files(tiny_cfg(opts=["MODEL.WEIGHTS", "x.pkl"]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))


def load(weights, trust_pickled=False):
    model = Net()
    with safe_loading(str(weights), trust_pickled):
        DetectionCheckpointer(model).load(str(weights))
    return model.a.tolist()


@pytest.mark.parametrize(
    "name, options",
    [
        ("model.pth", {}),
        ("model.pth", {"_use_new_zipfile_serialization": False}),
        ("model.pyth", {}),
        ("model", {}),
    ],
)
def test_checkpoint_that_would_run_code_is_refused(tmp_path, name, options):
    write_checkpoint(tmp_path / name, tmp_path / "trace", **options)
    with pytest.raises(ValueError) as error:
        load(tmp_path / name)
    message = str(error.value)
    assert f"{tmp_path / name} were refused and nothing of them was run" in message
    assert "they ask for posix.mkdir" in message and "tools/convert_weights.py" in message
    assert "weights_only" not in message
    assert not (tmp_path / "trace").exists()
    # The file does what it is said to do.
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_under_the_name_of_a_checkpoint_is_refused(tmp_path, protocol):
    write_pickle(tmp_path / "model.pth", tmp_path / "trace", protocol)
    with pytest.raises(ValueError, match="othing of them was run"):
        load(tmp_path / "model.pth")
    assert not (tmp_path / "trace").exists()


def test_pickle_is_not_opened_without_the_opt_in(tmp_path):
    write_pickle(tmp_path / "model.pkl", tmp_path / "trace")
    with pytest.raises(ValueError, match="TRUST_PICKLED_WEIGHTS"):
        load(tmp_path / "model.pkl")
    assert not (tmp_path / "trace").exists()


def test_archives_of_torchscript_are_refused(tmp_path):
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load(tmp_path / "model.pth")


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="^of the model$"), safe_loading("model.pth"):
        raise RuntimeError("of the model")


def zoo_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": {"a": np.array([3.0, 4.0], np.float32)}, "__author__": "zoo"}
    path.write_bytes(pickle.dumps(content))


def test_plain_tensors_and_trusted_pickles_are_read(tmp_path):
    torch.save({"model": {"a": torch.tensor([1.0, 2.0])}}, tmp_path / "model.pth")
    assert load(tmp_path / "model.pth") == [1, 2]
    zoo_file(tmp_path / "model.pkl")
    assert load(tmp_path / "model.pkl", trust_pickled=True) == [3, 4]


@pytest.mark.parametrize("prefix", ["detectron2://", URL])
def test_download_of_detectron2s_own_is_read(tmp_path, monkeypatch, prefix):
    # As it lies in the folder of downloads: nothing is asked of a network.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    zoo_file(tmp_path / "detectron2/nobody/x.pkl")
    assert load(prefix + "nobody/x.pkl") == [3, 4]


def test_what_is_resumed_is_checked(tmp_path):
    checkpointer = DetectionCheckpointer(Net(), str(tmp_path))
    assert weights_to_load(checkpointer, "a.pth", resume=True) == "a.pth"
    (tmp_path / "last_checkpoint").write_text("model.pkl")
    assert weights_to_load(checkpointer, "a.pth", resume=False) == "a.pth"
    assert weights_to_load(checkpointer, "a.pth", resume=True) == str(tmp_path / "model.pkl")
