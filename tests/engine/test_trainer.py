"""What the trainer changes in the config for another number of processes."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.engine import Trainer

REPOSITORY = Path(__file__).resolve().parents[2]


def load(name):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / "configs" / name))
    return cfg


# 7330 iterations at 8 processes are 117,280 images, 2 of each process at a time.
@pytest.mark.parametrize("workers, expected", [(1, 58640), (3, 19547), (8, 7330), (16, 3665)])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_epoch_of_the_contrastive_loss_follows_the_schedule(workers, expected, is_frozen):
    """On one GPU the ramp once ended at epoch 0.5 in the place of 4."""
    cfg = load("coco/contrastmask.yaml")
    if is_frozen:
        cfg.freeze()
    before = cfg.clone()
    scaled = Trainer.auto_scale_workers(cfg, workers)
    epoch = scaled.MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS
    assert epoch == expected
    assert scaled.SOLVER.MAX_ITER / epoch == pytest.approx(12, rel=1e-4)
    assert scaled.SOLVER.IMS_PER_BATCH * epoch == pytest.approx(117280, rel=1e-4)
    assert cfg == before and scaled.is_frozen() == is_frozen
    # All else is Detectron2's scaling; the warm-ups of this project stay.
    others = DefaultTrainer.auto_scale_workers(before, workers).clone()
    others.defrost()
    others.MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS = expected
    assert others == scaled
    assert scaled.MODEL.PSEUDO_MASK.WARMUP_ITERS == 1000
    assert scaled.MODEL.BOX_SUPERVISION.WARMUP_ITERS == 10000


def test_numbers_stand_as_they_are_without_a_reference():
    cfg = load("shapes/contrastmask.yaml")
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    assert Trainer.auto_scale_workers(cfg, 4) is cfg
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 4
    assert Trainer.auto_scale_workers(cfg, 4) is cfg


@pytest.mark.parametrize("epoch_iters, expected", [(1, 1), (0, 0)])
def test_an_epoch_keeps_an_iteration_and_a_wrong_number_stays_wrong(epoch_iters, expected):
    cfg = load("coco/contrastmask.yaml")
    cfg.MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS = epoch_iters
    scaled = Trainer.auto_scale_workers(cfg, 64)
    assert scaled.MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS == expected


def test_the_trainer_builds_its_model_for_the_scaled_epoch(tiny_cfg, tiny_coco):
    opts = ["MODEL.ROI_BOX_HEAD.NAME", "FeatureMapBoxHead"]
    opts += ["MODEL.ROI_BOX_HEAD.CONV_WIDTHS", [8], "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]
    opts += ["MODEL.ROI_MASK_PRIOR.NAME", "ContrastivePrior", "SOLVER.MAX_ITER", 1200]
    opts += ["MODEL.ROI_MASK_PRIOR.CONTRAST.CONV_DIM", 8, "SOLVER.IMS_PER_BATCH", 16]
    opts += ["MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS", 100, "SOLVER.REFERENCE_WORLD_SIZE", 8]
    trainer = Trainer(tiny_cfg(opts=opts, dataset=tiny_coco))
    assert trainer.max_iter == 9600 and trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    assert trainer.model.roi_heads.mask_prior.epoch_iters == 800
