"""The trainer, and the program behind train_net.py and ``tsmask train``."""

import argparse
import json
import logging
import math
import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..class_splits import AUTO, match_classes, resolve_seen_classes
from ..coco_json import open_atomically
from ..data import (
    TeacherStudentDatasetMapper,
    build_train_loader,
    check_datasets,
    dataset_classes,
    resolve_auto_settings,
)
from ..data.datasets import answer_of_main_process, makes_masks, training_classes
from ..errors import InputError
from ..evaluation import PartiallySupervisedCOCOEvaluator, results_table
from ..modeling import GTBoxInference
from ..run_folder import check_is_new, last_checkpoint, read_class_names, write_class_names
from ..trained_model import (
    check_weights,
    choose_device,
    find_model_classes,
    load_weights,
    read_config,
    refuse_missing,
    safe_loading,
)
from .hooks import FiniteLoss, PseudoMaskWatch, SeedEveryIteration, UnseenMaskGuard

logger = logging.getLogger(__name__)

__all__ = ["Trainer", "main", "setup"]


class Trainer(DefaultTrainer):
    """
    Detectron2's trainer with this project's mapper, evaluator and safeguards.

    With SEED of 0 or more, data and random numbers follow from the seed, the rank and the iteration
    alone, and ``--resume`` goes on as if the run had not been interrupted. Checkpoints appear when
    they are complete, and are read without running what is in them.
    """

    def __init__(self, cfg: CfgNode):
        cfg = resolve_auto_settings(cfg)
        # Detectron2's scaling, which is the next to come, then has nothing left to do.
        scaled = self.auto_scale_workers(cfg, comm.get_world_size())
        if scaled is not cfg:
            scaled = scaled.clone()
            scaled.defrost()
            # What counts iterations follows the schedule: the learning rate's warm-up is longer,
            # too, and the gate must not open in the middle of it.
            factor = cfg.SOLVER.REFERENCE_WORLD_SIZE / comm.get_world_size()
            for node, key in (
                (scaled.MODEL.ROI_MASK_PRIOR.CONTRAST, "EPOCH_ITERS"),
                (scaled.MODEL.PSEUDO_MASK, "WARMUP_ITERS"),
                (scaled.MODEL.BOX_SUPERVISION, "WARMUP_ITERS"),
            ):
                # Up: an epoch has at least one iteration.
                node[key] = math.ceil(node[key] * factor)
            scaled.freeze()
        super().__init__(scaled)
        self.checkpointer.path_manager = _AtomicPathManager(self.checkpointer.path_manager)

    def build_hooks(self) -> list[HookBase | None]:
        timer, *others = super().build_hooks()
        self.finite_loss = FiniteLoss()
        seeding = SeedEveryIteration(self.cfg.SEED) if self.cfg.SEED >= 0 else None
        names = training_classes(self.cfg.DATASETS.TRAIN)
        guard = UnseenMaskGuard(resolve_seen_classes(self.cfg.DATASETS.SEEN_CLASSES, names), names)
        return [seeding, timer, self.finite_loss, guard, PseudoMaskWatch(), *others]

    def run_step(self) -> None:
        try:
            super().run_step()
        except FloatingPointError as error:  # of FiniteLoss, or of Detectron2's RPN
            raise self.finite_loss.explain(error) from error

    def resume_or_load(self, resume: bool = True) -> None:
        weights, model = self.cfg.MODEL.WEIGHTS, self.checkpointer.model
        is_resumed = resume and self.checkpointer.has_checkpoint()
        if is_resumed:
            weights = self.checkpointer.get_checkpoint_file()
        is_trusted = self.cfg.MODEL.TRUST_PICKLED_WEIGHTS
        with safe_loading(model, weights, is_trusted) as missing:
            super().resume_or_load(resume)
        if is_resumed or len(missing) == len(list(model.parameters())):
            refuse_missing(weights, missing)
        # Not before: a training that cannot begin leaves the files of an earlier one alone.
        if comm.is_main_process():
            write_class_names(self.cfg.OUTPUT_DIR, *dataset_classes(self.cfg.DATASETS.TRAIN[0]))

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
        names, _ = dataset_classes(dataset_name)
        model_ids = match_classes(names, cls._class_names(cfg), dataset_name) if names else None
        mapper = TeacherStudentDatasetMapper(cfg, False, model_class_ids=model_ids)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        # COCO's 100, also with the 150 of the paper's configs; whoever asks for more means more.
        max_dets = cfg.TEST.DETECTIONS_PER_IMAGE if cfg.TEST.DETECTIONS_PER_IMAGE > 150 else 100
        return PartiallySupervisedCOCOEvaluator(
            dataset_name,
            None if makes_masks(cfg) else ("bbox",),
            seen_classes=cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES,
            class_names=cls._class_names(cfg),
            output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"),
            max_dets_per_image=max_dets,
            overlap_threshold=cfg.TEST.OVERLAP_THRESHOLD,
            overlap_bin_edges=cfg.TEST.OVERLAP_BINS,
            with_yardsticks=cfg.TEST.GT_BOXES,
        )

    @staticmethod
    def _class_names(cfg: CfgNode) -> list[str]:
        # OUTPUT_DIR first: a training may begin with the weights of one on other classes.
        files = [os.path.join(cfg.OUTPUT_DIR, "config.yaml"), cfg.MODEL.WEIGHTS]
        return answer_of_main_process(lambda: find_model_classes(cfg, files)[0])

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


def main(
    args: argparse.Namespace, trainer_class: type[Trainer] = Trainer, is_quiet: bool = False
) -> dict | None:
    """
    Train, or only evaluate, in this process; return the results of the last evaluation.

    Nothing in ``OUTPUT_DIR`` is overwritten before the model is built and loaded; an evaluation
    writes to the folder "inference" in it alone.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.
        trainer_class: what trains and evaluates.
        is_quiet: the console has only the warnings of this project, and errors; the log file is the
            caller's affair.

    Raises:
        InputError: config, data or weights cannot be used, or ``OUTPUT_DIR`` holds another run.
    """
    cfg = setup(args, is_quiet)
    classes = _check_data(cfg, args)
    if args.eval_only:
        model = trainer_class.build_model(cfg)
        load_weights(model, cfg, heads=[cfg.TEST.MASK_HEAD])
        _write_config(cfg)
        if comm.is_main_process():
            write_class_names(cfg.OUTPUT_DIR, *classes)  # where Trainer.test looks for them
        comm.synchronize()
        evaluators = [
            trainer_class.build_evaluator(cfg, x, cfg.OUTPUT_DIR) for x in cfg.DATASETS.TEST
        ]
        return trainer_class.test(cfg, model, evaluators)
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=args.resume)

    def is_done() -> bool:
        # Whether the evaluation that ends a training, after its last checkpoint, has ended, too.
        results, last = Path(cfg.OUTPUT_DIR, "results.json"), Path(last_checkpoint(cfg.OUTPUT_DIR))
        return results.is_file() and results.stat().st_mtime >= last.stat().st_mtime

    if trainer.start_iter >= trainer.max_iter and answer_of_main_process(is_done):
        logger.info(
            f"The training in {cfg.OUTPUT_DIR} has reached SOLVER.MAX_ITER {trainer.max_iter}, and "
            "its results.json stays as it is; a larger MAX_ITER goes on."
        )
        return None
    _write_config(cfg)
    return trainer.train()


def setup(args: argparse.Namespace, is_quiet: bool = False) -> CfgNode:
    """
    Build the config from the command line of :func:`main`, and start logging.

    Returns:
        The config, frozen, in which "auto" and NUM_CLASSES 0 have become what the data say. For an
        evaluation OUTPUT_DIR is the folder "inference" in the one given.

    Raises:
        InputError: a key, a value, or what it names is wrong.
    """
    cfg = read_config(args.config_file, args.opts)
    if cfg.DETERMINISTIC:
        if cfg.SEED < 0 or cfg.CUDNN_BENCHMARK:
            raise InputError("DETERMINISTIC needs SEED of 0 or more, and CUDNN_BENCHMARK False.")
        # cuBLAS needs it for a fixed order of sums; it must be set before the first use of a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    # Before the first file is written.
    if not (args.eval_only or args.resume):
        answer_of_main_process(lambda: check_is_new(cfg.OUTPUT_DIR))
    last = last_checkpoint(cfg.OUTPUT_DIR) if args.resume else ""
    check_weights(last or cfg.MODEL.WEIGHTS, cfg.MODEL.TRUST_PICKLED_WEIGHTS)
    if args.eval_only:
        cfg.MODEL.WEIGHTS = last or cfg.MODEL.WEIGHTS
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "inference")
    folder = None if is_quiet else cfg.OUTPUT_DIR
    for name in ("fvcore", "detectron2", "teacher_student_mask"):
        for handler in setup_logger(folder, comm.get_rank(), name=name).handlers:
            # Detectron2's handlers of files are of the same class.
            if is_quiet and getattr(handler, "stream", None) is sys.stdout:
                is_ours = name == "teacher_student_mask"
                handler.setLevel(logging.WARNING if is_ours else logging.ERROR)
    choose_device(cfg)
    is_timm = "timm" in cfg.MODEL.BACKBONE.NAME
    if not (cfg.MODEL.WEIGHTS or is_timm and cfg.MODEL.TIMM.WEIGHTS or args.eval_only):
        # Frozen statistics of nothing: activations grow with each block until the loss is NaN.
        if is_timm:
            changes = ["MODEL.TIMM.FREEZE_NORM", False, "MODEL.TIMM.FREEZE_AT", 0]
        elif cfg.MODEL.RESNETS.NORM == "FrozenBN":
            changes = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
        else:
            changes = []
        cfg.merge_from_list(changes)
        logger.warning(
            "MODEL.WEIGHTS is empty: training from scratch, with the changes "
            f"{' '.join(map(str, changes)) or 'none'}."
        )
    # Before the config is saved, so that nothing needs the training data after the training.
    is_asked = not args.eval_only or cfg.TEST.SEEN_CLASSES in ("", AUTO)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=is_asked)
    cfg.freeze()
    # As Detectron2's default_setup, which would write config.yaml at this moment.
    logger.info(f"Environment:\n{collect_env_info()}\nCommand line: {args}\nConfig:\n{cfg.dump()}")
    logger.info(f"{'Evaluation' if args.eval_only else 'Training'} writes to {cfg.OUTPUT_DIR}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return cfg


def _write_config(cfg: CfgNode) -> None:
    if comm.is_main_process():
        with open_atomically(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
            file.write(cfg.dump())


def _check_data(cfg: CfgNode, args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Stop at errors of the datasets; return names and category ids of the model's classes."""
    is_rcnn = issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), GeneralizedRCNN)
    earlier = read_class_names(cfg.OUTPUT_DIR) if args.resume and not args.eval_only else None
    # Of a run that goes on the names are compared, below.
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn and earlier is None else None
    check_datasets(cfg, num_classes, is_training=not args.eval_only)
    if args.eval_only:
        files = [cfg.MODEL.WEIGHTS, args.config_file]
        names, ids = answer_of_main_process(lambda: find_model_classes(cfg, files))
    else:
        training_classes(cfg.DATASETS.TRAIN)
        names, ids = dataset_classes(cfg.DATASETS.TRAIN[0])
        if earlier is not None and names != earlier[0]:
            raise InputError(
                f"--resume: DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has the classes "
                f"{', '.join(names[:50])}, but the run in {cfg.OUTPUT_DIR} was trained on "
                f"{', '.join(earlier[0][:50])}; name another OUTPUT_DIR to train on these."
            )
    for dataset in cfg.DATASETS.TEST:
        match_classes(dataset_classes(dataset)[0], names, dataset)
    return names, ids


class _AtomicPathManager:
    """For ``Checkpointer.path_manager``: Detectron2's, but local files are written atomically."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r"):
        if mode in ("w", "wb"):
            return open_atomically(path, mode)
        return self._path_manager.open(path, mode)
