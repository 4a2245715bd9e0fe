"""Trainings killed at any moment end with the weights of one that was not interrupted."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_data import complete
from detectron2.engine import default_argument_parser

import train_net
from teacher_student_mask.errors import InputError

MAX_ITER = 36
NUM_KILLS = 10


# Bottleneck blocks can be narrow: checkpoints of 3 MB, where the tiny ResNet-18 has 90.
NARROW = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16]
NARROW += ["MODEL.RESNETS.WIDTH_PER_GROUP", 4]


@pytest.fixture
def dataset(make_tiny_coco):
    """The tiny dataset with a mask on every object, as mask AP needs it."""

    return make_tiny_coco(complete)


@pytest.fixture
def config_file(tmp_path, tiny_cfg, dataset):
    cfg = tiny_cfg(dataset=dataset, opts=NARROW)
    cfg.MODEL.ROI_HEADS.NAME = "TeacherStudentROIHeads"
    cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS = 10
    cfg.SEED = 3
    cfg.SOLVER.MAX_ITER = MAX_ITER
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.SOLVER.STEPS = (15, 30)
    cfg.TEST.EVAL_PERIOD = 4
    path = tmp_path / "tiny.yaml"
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def run_in_children(tmp_path, dataset, config_file):
    """Return ``run(output, runs)``: tests/interrupted_runs.py; gives its results and its log."""
    program = Path(__file__).with_name("interrupted_runs.py")

    def run(output, runs):
        plan = {
            "config_file": str(config_file),
            "dataset": [dataset.name, dataset.json_file, dataset.image_root],
            "output": str(output),
            "runs": runs,
        }
        plan_file, result_file = tmp_path / "plan.json", tmp_path / "result.json"
        plan_file.write_text(json.dumps(plan))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(program), str(plan_file), str(result_file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        log = Path(f"{output}.log")
        said = done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
        assert done.returncode == 0, said
        return json.loads(result_file.read_text()), said

    return run


def kills(seed):
    """10 moments: during start-up, a step, the writing of a checkpoint, an evaluation."""
    rng = random.Random(seed)
    moments = []
    for event, count, longest_delay, number in [
        ("start", 1, 1.0, 2),
        ("step", 4, 0.05, 3),
        ("checkpoint", 2, 0.1, 3),
        ("evaluation", 1, 0.1, 2),
    ]:
        for _ in range(number):
            moment = {"event": event, "count": rng.randint(1, count)}
            moments.append({**moment, "delay": rng.uniform(0, longest_delay)})
    rng.shuffle(moments)
    assert len(moments) == NUM_KILLS
    return moments


def assert_equal(first, second, where=""):
    """Of two checkpoints, bit for bit."""
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, (a, b) in enumerate(zip(first, second)):
            assert_equal(a, b, f"{where}/{i}")
    else:
        assert first == second, where


def load(output):
    return torch.load(output / "model_final.pth", weights_only=False)


def run_up_to(whole, folder, name):
    """What a run that was interrupted after a checkpoint has left, made of an uninterrupted one."""
    folder.mkdir()
    shutil.copy(whole / name, folder)
    (folder / "last_checkpoint").write_text(name)
    return folder


@pytest.fixture
def train(tmp_path, config_file):
    """Return ``train(name, *flags, **opts)``: six iterations in this process; gives the folder."""

    def run(name, *flags, opts=()):
        output = tmp_path / name
        arguments = [*flags, "--config-file", str(config_file), "OUTPUT_DIR", str(output)]
        arguments += ["SOLVER.MAX_ITER", 6, "DATASETS.TEST", "()"]
        arguments += ["MODEL.PSEUDO_MASK.WARMUP_ITERS", 1]
        arguments += ["SOLVER.STEPS", (3,), "DATALOADER.NUM_WORKERS", 0, *opts]
        train_net.main(default_argument_parser().parse_args(list(map(str, arguments))))
        return output

    return run


def test_resumed_run_ends_as_the_uninterrupted_one(train, tmp_path):
    whole = train("whole")
    killed = run_up_to(whole, tmp_path / "killed", "model_0000001.pth")
    (killed / "model_final.pth.partial").write_text("half")
    assert_equal(load(whole), load(train("killed", "--resume")))
    assert not list(killed.glob("*.partial"))


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_resume_without_the_last_checkpoint_stops(train, tmp_path, flags):
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(InputError, match="model_0000001.pth do not exist"):
        train("killed", "--resume", *flags)
    (killed / "model_0000001.pth").write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="model_0000001.pth were refused, .* cannot be read"):
        train("killed", "--resume", *flags)


@pytest.mark.slow
def test_kills_do_not_change_a_bit(run_in_children, tmp_path):
    """
    The runs are forked children of one process (see tests/interrupted_runs.py), half of them with
    two DataLoader workers; the uninterrupted run has none.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (result,), said = run_in_children(
        whole, [{"opts": ["DATALOADER.NUM_WORKERS", 0], "kill": None}]
    )
    assert result["status"] == 0, said
    moments = kills(seed=0)
    runs = [
        {"opts": ["DATALOADER.NUM_WORKERS", 2 * (i % 2)], "kill": moment}
        for i, moment in enumerate(moments)
    ]
    *results, last = run_in_children(
        killed, [*runs, {"opts": ["DATALOADER.NUM_WORKERS", 2], "kill": None}]
    )[0]
    assert [result["status"] for result in results] == [-9] * NUM_KILLS
    # Each kill met what it was to meet, and those in the middle of a file left only a part of it.
    for moment, result in zip(moments, results):
        assert result["events"].count(moment["event"]) == moment["count"]
        assert len(result["partial"]) == 1 or moment["event"] != "checkpoint"
    assert last["status"] == 0 and not last["partial"]
    assert last["checkpoints"] == sorted(path.name for path in whole.glob("*.pth"))
    assert_equal(load(whole), load(killed))
    for name in ("results.json", "metrics.json"):
        lines = (killed / name).read_text().splitlines()
        assert json.loads(lines[-1] if name == "metrics.json" else "".join(lines))
    assert (whole / "results.json").read_text() == (killed / "results.json").read_text()
    log = (killed / "log.txt").read_text()
    assert f"Starting training from iteration {MAX_ITER}" not in log  # no kill came too late
