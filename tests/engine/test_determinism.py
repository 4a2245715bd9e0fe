"""DETERMINISTIC: with one SEED two trainings are equal bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_train_net
import torch

from teacher_student_mask.engine import make_deterministic

run_tiny = test_train_net.run  # the fixture

REPOSITORY = Path(__file__).resolve().parents[2]
# No evaluation: it draws nothing, and takes most of the time.
SHORT = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()"]
SHORT += ["DETERMINISTIC", True]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """PyTorch's settings, as they were before, after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def record_of(output):
    """All weights after the last iteration, and the losses that were logged."""
    weights = torch.load(output / "model_final.pth", weights_only=False)["model"]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    losses = [{k: v for k, v in x.items() if "loss" in k} for x in lines]
    assert losses and all("total_loss" in x and "loss_mask" in x for x in losses)
    shutil.rmtree(output)
    return weights, losses


def differences(record, other):
    """Names of the tensors that are not equal bit for bit, and "losses"."""
    (weights, losses), (other_weights, other_losses) = record, other
    assert weights.keys() == other_weights.keys()
    names = {name for name in weights if not torch.equal(weights[name], other_weights[name])}
    return names | ({"losses"} if losses != other_losses else set())


@pytest.mark.slow
def test_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(run_tiny):
    def record(seed):
        return record_of(run_tiny(opts=[*SHORT, "SEED", seed, "DATALOADER.NUM_WORKERS", 0]))

    first = record(7)
    torch.rand(3)  # what was drawn before plays no part
    assert differences(first, record(7)) == set()
    found = differences(first, record(8))
    assert {"losses", "roi_heads.mask_head.predictor.weight"} <= found
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
def test_another_process_with_workers_gives_the_same(run_tiny, tmp_path):
    """Another order of Python's sets and another start of the process change nothing."""
    opts = [*SHORT, "SEED", 7, "DATALOADER.NUM_WORKERS", 2]
    output = tmp_path / "output"
    name = next(path.stem for path in tmp_path.glob("tiny_coco_*.json"))
    # The dataset is known to this process alone.
    program = (
        "import sys, train_net\n"
        "from detectron2.engine import default_argument_parser\n"
        "from teacher_student_mask import register_partial_coco\n"
        "register_partial_coco(*sys.argv[1:4])\n"
        "train_net.main(default_argument_parser().parse_args(sys.argv[4:]))\n"
    )
    arguments = [name, tmp_path / f"{name}.json", tmp_path / name]
    arguments += ["--config-file", tmp_path / "tiny.yaml", "OUTPUT_DIR", output, *opts]
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        capture_output=True,
        timeout=900,
    )
    record = record_of(output)
    assert differences(record, record_of(run_tiny(opts=opts))) == set()


def test_settings():
    make_deterministic(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_was_chosen_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_form_stops():
    make_deterministic(0)
    values = torch.zeros(2)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        values.put_(torch.tensor([0, 0]), torch.ones(2))


def test_a_seed_is_needed(run_tiny, tmp_path):
    with pytest.raises(ValueError, match="DETERMINISTIC True needs SEED of 0 or more, got -1"):
        run_tiny(opts=["DETERMINISTIC", True, "SEED", -1])
    assert not (tmp_path / "output").exists()
    assert not torch.are_deterministic_algorithms_enabled()


def test_choosing_by_speed_contradicts():
    with pytest.raises(ValueError, match="needs CUDNN_BENCHMARK False, got True"):
        make_deterministic(0, cudnn_benchmark=True)
    assert not torch.are_deterministic_algorithms_enabled()
