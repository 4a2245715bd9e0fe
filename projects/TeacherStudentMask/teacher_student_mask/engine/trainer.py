"""The trainer of train_net.py."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data import TeacherStudentDatasetMapper, build_train_loader, resolve_auto_settings
from ..evaluation import PartiallySupervisedCOCOEvaluator, results_table
from ..modeling import GTBoxInference
from ..weights_file import safe_loading, weights_to_load
from .atomic_files import AtomicPathManager, open_atomically
from .finite_loss import FiniteLoss
from .output_folder import check_last_checkpoint, tidy_output_dir
from .pseudo_mask_watch import PseudoMaskWatch
from .random_state import SeedEveryIteration
from .unseen_mask_guard import UnseenMaskGuard

logger = logging.getLogger(__name__)

__all__ = ["Trainer", "checked_loading"]


class Trainer(DefaultTrainer):
    """
    Detectron2's trainer with this project's mapper, evaluator and safeguards.

    With SEED of 0 or more, data and random numbers follow from the seed, the rank and the iteration
    alone, and ``--resume`` goes on as if the run had not been interrupted. Checkpoints appear when
    they are complete, hold finite numbers, and are read without running what is in them.
    """

    def __init__(self, cfg: CfgNode):
        if comm.is_main_process():
            tidy_output_dir(cfg.OUTPUT_DIR)
        # Detectron2's scaling, which is the next to come, then has nothing left to do.
        super().__init__(self.auto_scale_workers(resolve_auto_settings(cfg), comm.get_world_size()))
        self.checkpointer.path_manager = AtomicPathManager(self.checkpointer.path_manager)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """
        As the parent's; ``MODEL.ROI_MASK_PRIOR.CONTRAST.EPOCH_ITERS`` is scaled like ``MAX_ITER``.

        It is the length of an epoch, so it follows the schedule. Warm-ups of this project, in
        ``MODEL.PSEUDO_MASK`` and ``MODEL.BOX_SUPERVISION``, are numbers of steps and stay.

        Args:
            cfg: not changed.
            num_workers: processes of this training.

        Returns:
            ``cfg`` itself if there is nothing to scale, else a copy, frozen if ``cfg`` is.
        """
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        is_frozen = scaled.is_frozen()
        scaled.defrost()
        settings = scaled.MODEL.ROI_MASK_PRIOR.CONTRAST
        iters = settings.EPOCH_ITERS * cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers
        # Up: an epoch never has no iteration, and a wrong number stays wrong.
        settings.EPOCH_ITERS = math.ceil(iters)
        if is_frozen:
            scaled.freeze()
        return scaled

    def build_hooks(self) -> list[HookBase | None]:
        timer, *others = super().build_hooks()
        self.finite_loss = FiniteLoss()
        seeding = SeedEveryIteration(self.cfg.SEED) if self.cfg.SEED >= 0 else None
        guard = UnseenMaskGuard(self.cfg)
        return [seeding, timer, self.finite_loss, guard, PseudoMaskWatch(), *others]

    def run_step(self) -> None:
        with self.finite_loss.explain():
            super().run_step()

    def resume_or_load(self, resume: bool = True) -> None:
        with checked_loading(self.cfg, self.checkpointer, resume):
            super().resume_or_load(resume)

    def state_dict(self) -> dict:
        state = super().state_dict()
        if "_trainer" not in state:  # Detectron2 0.6 forgets the optimizer's momentum
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = TeacherStudentDatasetMapper(cfg, True)
        if cfg.SEED < 0:
            return build_detection_train_loader(cfg, mapper=mapper)
        return build_train_loader(cfg, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = TeacherStudentDatasetMapper(cfg, False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        return PartiallySupervisedCOCOEvaluator(
            dataset_name,
            seen_classes=cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES,
            output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
            overlap_threshold=cfg.TEST.OVERLAP_THRESHOLD,
            overlap_bin_edges=cfg.TEST.OVERLAP_BINS,
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> OrderedDict:
        if cfg.TEST.GT_BOXES:
            model = GTBoxInference(model)
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            _report(cfg, results)
        return results


@contextmanager
def checked_loading(
    cfg: CfgNode, checkpointer: DetectionCheckpointer, resume: bool
) -> Iterator[None]:
    """
    Around ``resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)``, of a trainer or a checkpointer.

    Raises:
        ValueError: what would be read could run code, or is damaged.
        FileNotFoundError: the last checkpoint of the run is not there.
    """
    weights = weights_to_load(checkpointer, cfg.MODEL.WEIGHTS, resume)
    with safe_loading(weights, cfg.MODEL.TRUST_PICKLED_WEIGHTS):
        if resume:
            check_last_checkpoint(checkpointer)
        yield


def _report(cfg: CfgNode, results: dict) -> None:
    """Write the results of the last evaluation to results.json and log them as a table."""
    with open_atomically(os.path.join(cfg.OUTPUT_DIR, "results.json")) as f:
        json.dump(results, f, indent=2)
    boxes = "ground-truth boxes" if cfg.TEST.GT_BOXES else "detected boxes"
    logger.info(
        f"Results ({cfg.TEST.MASK_HEAD} mask head, {boxes}; unseen classes in bold):\n"
        + results_table(results)
    )
