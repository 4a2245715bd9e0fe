"""The programs, given files of a stranger: refused with a sentence, nothing is run or written."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from malice import write_checkpoint, write_pickle, yaml_of
from tiny_model import TINY_MODEL

import analyze
import convert_weights
import export_student
import predict
import show_class_activation
import sweep
import train_net
from sweeps import configs as sweep_configs
from sweeps.runs import plan_runs
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file

ROOT = Path(__file__).resolve().parents[1]
REFUSED = "were refused"


def give_all_objects_a_mask(data):
    # Without it train_net.py refuses the dataset first.
    for x in data["annotations"]:
        left, top, width, height = x["bbox"]
        if not x.get("segmentation"):
            x["segmentation"] = [[left, top, left + width, top, left, top + height]]


@pytest.fixture
def config(make_tiny_coco, tmp_path):
    """Path of the config of a tiny OPMask, which every program takes."""
    tiny_coco = make_tiny_coco(give_all_objects_a_mask)
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    merge_config_file(cfg, str(ROOT / "configs/shapes/opmask.yaml"))
    cfg.merge_from_list(
        TINY_MODEL
        + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.NORM", ""]
        + ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "OUTPUT_DIR", str(tmp_path / "output")]
        + ["DATASETS.TRAIN", (tiny_coco.name,), "DATASETS.TEST", (tiny_coco.name,)]
        + ["DATASETS.SEEN_CLASSES", tiny_coco.seen_classes]
    )
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def write_weights(path, trace):
    (write_pickle if path.suffix == ".pkl" else write_checkpoint)(path, trace)
    return path


def train(config, *flags, opts=()):
    arguments = [*flags, "--config-file", config, *opts]
    train_net.main(default_argument_parser().parse_args([str(x) for x in arguments]))


def run_tool(program, config, weights, *inputs):
    options = ["--config-file", config, "--weights", weights, "--output-dir", config.parent / "out"]
    return code_of(program, [*inputs, *options])


def code_of(program, arguments):
    try:
        return program.main([str(x) for x in arguments])
    except SystemExit as exit:
        return exit.code


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_training_program_refuses_weights(config, tmp_path, name, flags):
    weights = write_weights(tmp_path / name, tmp_path / "trace")
    with pytest.raises(ValueError, match=REFUSED):
        train(config, *flags, opts=["MODEL.WEIGHTS", weights])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_training_program_refuses_the_checkpoint_to_resume(config, tmp_path, name, flags):
    output = tmp_path / "output"
    output.mkdir()
    write_weights(output / name, tmp_path / "trace")
    (output / "last_checkpoint").write_text(name)
    with pytest.raises(ValueError, match=REFUSED):
        train(config, "--resume", *flags)
    assert not (tmp_path / "trace").exists()


def test_training_program_refuses_proposals(config, tmp_path):
    write_pickle(tmp_path / "boxes.bin", tmp_path / "trace")
    opts = ["MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN"]
    with pytest.raises(ValueError, match="are pickles"):
        train(config, opts=[*opts, f"('{tmp_path / 'boxes.bin'}',)"])
    assert not (tmp_path / "trace").exists()


def test_training_program_takes_what_is_trusted(config, tmp_path):
    write_weights(tmp_path / "model.pkl", tmp_path / "trace")
    # It is opened now; what it does is its own.
    opts = ["MODEL.WEIGHTS", tmp_path / "model.pkl", "MODEL.TRUST_PICKLED_WEIGHTS", True]
    with pytest.raises(Exception):  # noqa: B017 - there are no weights in it.
        train(config, "--eval-only", opts=opts)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
@pytest.mark.parametrize("program", [predict, show_class_activation, export_student])
def test_programs_refuse_weights(config, tmp_path, capsys, program, name):
    weights = write_weights(tmp_path / name, tmp_path / "trace")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    inputs = [] if program is export_student else [tmp_path / "a.png"]
    assert run_tool(program, config, weights, *inputs) == 2
    assert REFUSED in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "trace").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_analysis_refuses_weights(config, tmp_path, capsys, name):
    weights = write_weights(tmp_path / name, tmp_path / "trace")
    assert run_tool(analyze, config, weights) == 2
    assert REFUSED in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("is_base", [False, True])
def test_every_program_refuses_code_in_a_config(config, tmp_path, capsys, is_base):
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"{config.read_text()}\nOUTPUT_DIR_: {yaml_of(tmp_path / 'trace')}\n")
    path = evil
    if is_base:
        path = tmp_path / "leaf.yaml"
        path.write_text("_BASE_: evil.yaml\n")
    with pytest.raises(ValueError, match="was refused and nothing of it was run"):
        train(path)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    for program, arguments in (
        (predict, [tmp_path / "a.png", "--config-file", path, "--weights", "x.pth"]),
        (show_class_activation, [tmp_path / "a.png", "--config-file", path]),
        (export_student, ["--config-file", path, "--weights", "x.pth"]),
        (analyze, ["--config-file", path, "--weights", "x.pth"]),
        (sweep, ["--configs", path]),
    ):
        assert code_of(program, [*arguments, "--output-dir", tmp_path / "out"]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert "was refused and nothing of it was run" in message
    assert not (tmp_path / "trace").exists()


# ---- names ----


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_overlays_stay_in_the_output_folder(config, tmp_path):
    names = ["..png", "...png", "a\nb.png", "..%2f..%2fevil.png", "~.png"]
    state = train_net.Trainer.build_model(train_net.setup(parsed(config))).state_dict()
    torch.save({"model": state}, tmp_path / "model.pth")
    inputs = tmp_path / "inputs" / "sub"
    inputs.mkdir(parents=True)
    for name in names:
        png = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1]
        (inputs / name).write_bytes(png.tobytes())
    before = tree(tmp_path)
    assert run_tool(predict, config, tmp_path / "model.pth", tmp_path / "inputs") == 0
    new = {x for x in tree(tmp_path) - before if not x.startswith("output")}
    assert all(x == "out" or x.startswith("out/") for x in new)
    overlays = {x for x in new if x.startswith("out/overlays/sub/")}
    assert overlays == {f"out/overlays/sub/{name}" for name in names}


def parsed(config):
    return default_argument_parser().parse_args(["--config-file", str(config)])


@pytest.mark.parametrize(
    "text, name",
    [
        ("..", "__"),
        (".", "_"),
        ("...", "___"),
        ("", ""),
        ("a/../b", "a_.._b"),
        ("a\nb", "a_b"),
        ("R_50-FPN.1x", "R_50-FPN.1x"),
    ],
)
def test_names_of_sweep_folders_are_one_folder(text, name):
    assert sweep_configs.folder_name(text) == name


def test_runs_of_a_sweep_stay_below_their_config(config, tmp_path):
    odd = tmp_path / "folder" / "...yaml"
    odd.parent.mkdir()
    odd.write_text(config.read_text())
    seen = tmp_path / "...txt"
    seen.write_text("ant\nship\n")
    arguments = ["--configs", odd, "--seen-sets", seen, "--output-dir", tmp_path / "out"]
    _, args = sweep.parse_args([str(x) for x in arguments])
    args.num_gpus = 0
    (run,) = plan_runs(args)
    assert run.name == "folder/__/__/seed_1"
    assert run.training.folder == tmp_path / "out" / "runs" / run.name


# ---- conversion ----


def test_converted_weights_are_plain_and_the_same(tmp_path, capsys):
    weights = {"a": np.arange(3.0, dtype=np.float32), "a_momentum": np.ones(3, np.float32)}
    zoo = {"model": weights, "__author__": "zoo", "matching_heuristics": True, "notes": [1]}
    for name, content, author in (
        ("zoo", zoo, "zoo"),
        ("detector", {"blobs": weights, "cfg": "x"}, "Caffe2"),
        ("imagenet", weights, "Caffe2"),
    ):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
        arguments = ["--input", tmp_path / f"{name}.pkl", "--output", tmp_path / f"{name}.pth"]
        assert convert_weights.main([str(x) for x in arguments]) == 0
        data = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert data["model"]["a"].tolist() == [0, 1, 2] and list(data["model"]) == ["a"]
        assert (data["__author__"], data["matching_heuristics"]) == (author, True)
        assert set(data) == {"model", "__author__", "matching_heuristics"}
    assert "Left out: notes" in capsys.readouterr().out


def test_conversion_keeps_the_tensors_of_a_checkpoint(tmp_path):
    content = {"model": {"a": torch.ones(2)}, "iteration": np.float64(3)}
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "old.pth", weights_only=True)
    arguments = ["--input", tmp_path / "old.pth", "--output", tmp_path / "new.pth"]
    assert convert_weights.main([str(x) for x in arguments]) == 0
    assert torch.load(tmp_path / "new.pth", weights_only=True)["model"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "EOFError"),
        (pickle.dumps({"model": {"a": "text"}, "__author__": "x"}), "'a' is a str, neither a"),
        (pickle.dumps([1]), "holds no dictionary of tensors"),
        (pickle.dumps({"a": np.array([None])}), "'a': "),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, capsys, content, words):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(SystemExit):
        convert_weights.main(["--input", f"{tmp_path}/a.pkl", "--output", f"{tmp_path}/a.pth"])
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.pth").exists()


def test_conversion_replaces_no_file(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": np.ones(1)}))
    (tmp_path / "a.pth").write_text(json.dumps("mine"))
    with pytest.raises(SystemExit):
        convert_weights.main(["--input", f"{tmp_path}/a.pkl", "--output", f"{tmp_path}/a.pth"])
    assert (tmp_path / "a.pth").read_text() == '"mine"'
