"""The trainer: Detectron2's, with this project's data, evaluator and safeguards."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..data import TeacherStudentDatasetMapper, build_train_loader, resolve_auto_settings
from ..evaluation import PartiallySupervisedCOCOEvaluator, results_table
from ..modeling import GTBoxInference
from ..untrusted_files import safe_loading
from .hooks import FiniteLoss, PseudoMaskWatch, SeedEveryIteration, UnseenMaskGuard

logger = logging.getLogger(__name__)

__all__ = ["Trainer", "open_atomically"]


class Trainer(DefaultTrainer):
    """
    Detectron2's trainer with this project's mapper, evaluator and safeguards.

    With SEED of 0 or more, data and random numbers follow from the seed, the rank and the iteration
    alone, and ``--resume`` goes on as if the run had not been interrupted. Checkpoints appear when
    they are complete, hold finite numbers, and are read without running what is in them.
    """

    def __init__(self, cfg: CfgNode):
        self._has_failed = False
        # Detectron2's scaling, which is the next to come, then has nothing left to do.
        super().__init__(self.auto_scale_workers(resolve_auto_settings(cfg), comm.get_world_size()))
        self.checkpointer.path_manager = _AtomicPathManager(self.checkpointer.path_manager)

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
        # Up: an epoch has at least one iteration.
        settings.EPOCH_ITERS = math.ceil(
            settings.EPOCH_ITERS * cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers
        )
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
        try:
            with self.finite_loss.explain():
                super().run_step()
        except BaseException:
            self._has_failed = True
            raise

    def after_train(self) -> None:
        # Detectron2 takes a failure in the last iteration for the end of training: it would
        # evaluate, and on several ranks wait for those that never come.
        if not (self._has_failed and self.iter + 1 >= self.max_iter):
            super().after_train()

    def resume_or_load(self, resume: bool = True) -> None:
        weights = self.cfg.MODEL.WEIGHTS
        if resume and self.checkpointer.has_checkpoint():
            weights = self.checkpointer.get_checkpoint_file()
        with safe_loading(weights, self.cfg.MODEL.TRUST_PICKLED_WEIGHTS):
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
        """As the parent's; the main process also writes results.json and logs a table."""
        if cfg.TEST.GT_BOXES:
            model = GTBoxInference(model)
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            with open_atomically(os.path.join(cfg.OUTPUT_DIR, "results.json")) as f:
                json.dump(results, f, indent=2)
            boxes = "ground-truth boxes" if cfg.TEST.GT_BOXES else "detected boxes"
            logger.info(
                f"Results ({cfg.TEST.MASK_HEAD} mask head, {boxes}; unseen classes in bold):\n"
                + results_table(results)
            )
        return results


@contextlib.contextmanager
def open_atomically(path: str, mode: str = "w") -> Iterator[IO]:
    """
    Write a local file that takes its name, and the place of an older one, once it is complete.

    Args:
        path: the file. Until it is complete it is written beside it, as ``path`` + ".partial".
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


class _AtomicPathManager:
    """For ``Checkpointer.path_manager``: Detectron2's, but local files are written atomically."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if mode in ("w", "wb") and "://" not in path:
            return open_atomically(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
