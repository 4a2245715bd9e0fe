"""The program behind ``train_net.py`` and ``tsmask train``: train, or evaluate a trained model."""

from __future__ import annotations

import argparse
import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..class_splits import AUTO
from ..data import check_datasets, register_json_datasets, resolve_auto_settings
from ..errors import InputError
from ..trained_model import load_weights, read_config, write_class_names
from ..untrusted_files import check_pickles
from .trainer import Trainer

__all__ = ["launch_training", "main", "setup"]

logger = logging.getLogger(__name__)


def launch_training(args: argparse.Namespace) -> None:
    """
    Run :func:`main` in as many processes as ``args`` say.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.
    """
    # With launch's timeout of 30 minutes: the first process evaluates while the others wait.
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def main(args: argparse.Namespace) -> dict | None:
    """
    Train, or only evaluate, in this process.

    Args:
        args: of :func:`detectron2.engine.default_argument_parser`.

    Returns:
        The results of the last evaluation, where there was one.

    Raises:
        InputError: config, data or weights cannot be used.
    """
    try:
        cfg = setup(args)
        _check_data(cfg, args.eval_only)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        has_checkpoint = args.resume and checkpointer.has_checkpoint()
        weights = checkpointer.get_checkpoint_file() if has_checkpoint else cfg.MODEL.WEIGHTS
        load_weights(model, cfg, weights=weights, heads=[cfg.TEST.MASK_HEAD])
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    write_class_names(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def setup(args: argparse.Namespace) -> CfgNode:
    """
    Build the config from the command line and start logging.

    Args:
        args: as for :func:`main`.

    Returns:
        The config, frozen, in which "auto" and NUM_CLASSES 0 have become what the data say.

    Raises:
        ValueError: a key, a value, or what it names is wrong.
    """
    cfg = read_config(args.config_file, args.opts)
    check_pickles(cfg)
    from_scratch = not cfg.MODEL.WEIGHTS and not args.eval_only
    if from_scratch and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        # Frozen statistics of nothing: activations grow with each block until the loss is NaN.
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    is_special = cfg.SOLVER.AMP.ENABLED or comm.get_world_size() > 1
    if cfg.MODEL.DEVICE == "cpu" and is_special and not args.eval_only:
        raise InputError(
            "MODEL.DEVICE is 'cpu', where Detectron2's trainer runs in one process (--num-gpus 1) "
            "and without mixed precision (SOLVER.AMP.ENABLED False)."
        )
    if cfg.DETERMINISTIC:
        _make_deterministic(cfg)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written to: {error}") from error
    setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="teacher_student_mask"
    )
    register_json_datasets(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    # Before the config is saved, so that nothing needs the training data after the training.
    is_asked = not args.eval_only or cfg.TEST.SEEN_CLASSES in ("", AUTO)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=is_asked)
    cfg.freeze()
    default_setup(cfg, args)
    if from_scratch:
        logger.warning(
            "MODEL.WEIGHTS is empty: training from scratch, with MODEL.RESNETS.NORM "
            f"{cfg.MODEL.RESNETS.NORM!r}, MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}."
        )
    return cfg


def _make_deterministic(cfg: CfgNode) -> None:
    """Let PyTorch use deterministic algorithms only, from now on; seeds are default_setup's."""
    if cfg.SEED < 0 or cfg.CUDNN_BENCHMARK:
        raise InputError(
            "DETERMINISTIC True needs SEED of 0 or more and CUDNN_BENCHMARK False, got "
            f"{cfg.SEED} and {cfg.CUDNN_BENCHMARK}."
        )
    # cuBLAS needs it for a fixed order of sums; it must be set before the first use of a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _check_data(cfg: CfgNode, eval_only: bool) -> None:
    """Stop at errors of the datasets' annotations before anything is built."""
    is_rcnn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "GrabCutRCNN")
    learns_model_masks = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS
    check_datasets(
        () if eval_only else cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        cfg.DATASETS.SEEN_CLASSES,
        num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None,
        reads_masks=cfg.MODEL.MASK_ON,
        # With box supervision boxes teach them, too, and with this key masks of models.
        needs_masks=not (cfg.MODEL.BOX_SUPERVISION.NAME or learns_model_masks),
    )
    if learns_model_masks and not eval_only:
        images = (image for name in cfg.DATASETS.TRAIN for image in DatasetCatalog.get(name))
        if not any(
            x.get("mask_source") == "model" and x.get("segmentation") and not x.get("iscrowd", 0)
            for image in images
            for x in image.get("annotations", ())
        ):
            raise InputError(
                "MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS is True, but DATASETS.TRAIN "
                f"{tuple(cfg.DATASETS.TRAIN)} has no mask with 'mask_source' 'model'; write a json "
                "that has them, with tsmask complete --grabcut for instance."
            )
