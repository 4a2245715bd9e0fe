"""The trainer: its config, checkpoints that appear when they are complete, equal repetitions."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import test_train_net
import torch

from teacher_student_mask.coco_json import open_atomically
from teacher_student_mask.engine import Trainer, setup

run_tiny = test_train_net.run  # the fixture

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_random_timm_backbone_is_not_frozen(tiny_coco, tmp_path):
    opts = ["DATASETS.TRAIN", repr((tiny_coco.json_file,)), "DATASETS.TEST", "()"]
    opts += ["MODEL.TIMM.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path / "out")]
    config = REPOSITORY / "configs/custom/photos_cpu.yaml"
    args = Namespace(config_file=str(config), opts=opts, resume=False, eval_only=False)
    timm = setup(args).MODEL.TIMM
    assert (timm.FREEZE_AT, timm.FREEZE_NORM) == (0, False)


# ---- other numbers of processes ----


def test_epochs_and_warm_ups_follow_the_number_of_processes(tiny_cfg, tiny_coco):
    """
    On one GPU the ramp of the contrastive loss once ended at epoch 0.5 in the place of 4, and the
    gate opened in the warm-up of the learning rate.
    """
    opts = ["MODEL.ROI_BOX_HEAD.NAME", "FeatureMapBoxHead"]
    opts += ["MODEL.ROI_BOX_HEAD.CONV_WIDTHS", [8], "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]
    opts += ["MODEL.ROI_MASK_PRIOR.NAME", "ContrastivePrior", "SOLVER.MAX_ITER", 1200]
    opts += ["MODEL.ROI_MASK_PRIOR.CONTRAST.CONV_DIM", 8, "SOLVER.IMS_PER_BATCH", 16]
    opts += ["MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS", 100]
    opts += ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads", "MODEL.PSEUDO_MASK.WARMUP_ITERS", 30]
    opts += ["MODEL.BOX_SUPERVISION.NAME", "boxinst", "MODEL.BOX_SUPERVISION.WARMUP_ITERS", 70]
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", 8]
    trainer = Trainer(tiny_cfg(opts=opts, dataset=tiny_coco))
    assert trainer.max_iter == 9600 and trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    heads = trainer.model.roi_heads
    assert heads.mask_prior.epoch_iters == 800
    assert heads.warmup_iters == 240
    assert heads.box_supervision.warmup_iters == 560


# ---- files ----


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "results.json"
    for content in ("old", "new ä"):
        with open_atomically(str(path)) as file:
            file.write(content)
            file.flush()
            assert path.exists() == (content != "old")
    with pytest.raises(KeyError), open_atomically(str(path), "wb") as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "new ä"


def test_checkpoints_are_those_of_detectron2(tiny_cfg, tiny_coco, monkeypatch):
    cfg = tiny_cfg(dataset=tiny_coco)
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    trainer.iter = 3
    trainer.checkpointer.save("model_0")

    def checkpoints():
        return {x for x in os.listdir(cfg.OUTPUT_DIR) if x.endswith((".pth", "checkpoint"))}

    assert checkpoints() == {"last_checkpoint", "model_0.pth"}
    before = Path(cfg.OUTPUT_DIR, "model_0.pth").read_bytes()

    def fail(data, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    for name in ("model_1", "model_0"):
        with pytest.raises(OSError, match="No space left"):
            trainer.checkpointer.save(name)
    assert checkpoints() == {"last_checkpoint", "model_0.pth"}
    assert Path(cfg.OUTPUT_DIR, "model_0.pth").read_bytes() == before
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    for a, b in zip(trainer.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


# ---- DETERMINISTIC: with one SEED two trainings are equal bit for bit ----

# No evaluation: it draws nothing, and takes most of the time.
SHORT = ["SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 4, "DATASETS.TEST", "()"]
SHORT += ["DETERMINISTIC", True]


@pytest.fixture
def settings(monkeypatch):
    """PyTorch's settings, as they were before, after the test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", cudnn.deterministic)
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.slow
def test_runs_of_one_seed_are_equal(run_tiny, settings):
    weights = []
    for seed in (7, 7, 8):
        output = run_tiny(opts=[*SHORT, "SEED", seed, "DATALOADER.NUM_WORKERS", 0])
        weights.append(torch.load(output / "model_final.pth", weights_only=True)["model"])
        shutil.rmtree(output)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    first, again, other = weights
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert not all(torch.equal(x, other[name]) for name, x in first.items())


@pytest.mark.parametrize("opts", [["SEED", -1], ["SEED", 1, "CUDNN_BENCHMARK", True]])
def test_deterministic_needs_a_seed_and_no_choice_by_speed(run_tiny, tmp_path, opts):
    with pytest.raises(ValueError, match="needs SEED of 0 or more, and CUDNN_BENCHMARK False"):
        run_tiny(opts=["DETERMINISTIC", True, *opts])
    assert not (tmp_path / "output").exists()
    assert not torch.are_deterministic_algorithms_enabled()
