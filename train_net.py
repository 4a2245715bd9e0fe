#!/usr/bin/env python
"""
Train or evaluate a model of TeacherStudentMask.

All flags and KEY VALUE overrides are Detectron2's. DATASETS.TRAIN and DATASETS.TEST name COCO jsons
by their paths, or registered datasets. These are looked for under $DETECTRON2_DATASETS (default:
./datasets), COCO in Detectron2's layout.

  train:     train_net.py --num-gpus 8 --config-file configs/coco/teacher_student.yaml
  your data: train_net.py --config-file configs/custom/....yaml DATASETS.TRAIN "('my.json',)"
  on a CPU:  train_net.py --config-file configs/shapes/....yaml MODEL.DEVICE cpu
  go on:     train_net.py --resume --config-file ...
  evaluate:  train_net.py --eval-only --config-file ... MODEL.WEIGHTS model.pth
  the teacher, on ground-truth boxes:  ... --eval-only ... TEST.MASK_HEAD teacher TEST.GT_BOXES True

OUTPUT_DIR then holds config.yaml, categories.json (the classes), log.txt, metrics.json,
checkpoints, TensorBoard events and results.json.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.checks.mask_sources import is_from_model
from teacher_student_mask.class_splits import AUTO
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.data import check_datasets, register_json_datasets, settle_classes
from teacher_student_mask.engine import (
    Trainer,
    check_device_of_processes,
    check_mixed_precision,
    check_output_dir,
    checked_loading,
    explain_write_errors,
    make_deterministic,
    write_class_names,
)
from teacher_student_mask.weights_file import check_pickled_files

logger = logging.getLogger("teacher_student_mask.train_net")


class InputError(ValueError):
    """Config, data or weights cannot be used; the sentence says which and what would be right."""


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Before training begins, what is wrong with the input needs a sentence and no traceback."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def setup(args) -> CfgNode:
    """Build the config from the command line and start logging."""
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        merge_config_file(cfg, args.config_file)
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError) as error:  # of an unknown key, or one without a value
        raise ValueError(f"--config-file {args.config_file}, {args.opts}: {error}") from error
    check_pickled_files(cfg)
    from_scratch = not cfg.MODEL.WEIGHTS and not args.eval_only
    if from_scratch and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        # Frozen statistics of nothing: activations grow with each block until the loss is NaN.
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if not args.eval_only:
        check_mixed_precision(cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)
        check_device_of_processes(cfg.MODEL.DEVICE)
    if cfg.DETERMINISTIC:
        make_deterministic(cfg.SEED, cfg.CUDNN_BENCHMARK)
    check_output_dir(cfg.OUTPUT_DIR)
    setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="teacher_student_mask"
    )
    register_json_datasets(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    # Before the config is saved, so that nothing needs the training data after the training.
    is_asked = not args.eval_only or cfg.TEST.SEEN_CLASSES in ("", AUTO)
    cfg = settle_classes(cfg, needs_seen_classes=is_asked)
    cfg.freeze()
    default_setup(cfg, args)
    if from_scratch:
        logger.warning(
            "MODEL.WEIGHTS is empty: training from scratch, with MODEL.RESNETS.NORM "
            f"{cfg.MODEL.RESNETS.NORM!r}, MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}."
        )
    return cfg


def main(args) -> dict | None:
    """Train, or only evaluate."""
    with input_errors():
        cfg = setup(args)
        check_annotations_of(cfg, args.eval_only)
        if cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS and not args.eval_only:
            check_external_masks_of(cfg)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        with checked_loading(cfg, checkpointer, args.resume):
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    with explain_write_errors(cfg.OUTPUT_DIR):
        write_class_names(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def check_annotations_of(cfg: CfgNode, eval_only: bool) -> None:
    """Stop at errors of the datasets' annotations before anything is built."""
    is_rcnn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "GrabCutRCNN")
    check_datasets(
        () if eval_only else cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        cfg.DATASETS.SEEN_CLASSES,
        num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None,
        reads_masks=cfg.MODEL.MASK_ON,
        # With box supervision boxes teach them, too, and with this key masks of models.
        needs_masks=not (
            cfg.MODEL.BOX_SUPERVISION.NAME or cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS
        ),
    )


def check_external_masks_of(cfg: CfgNode) -> None:
    """Stop where a model's masks are to be learned and there are none: the baseline would train."""
    names = tuple(cfg.DATASETS.TRAIN)
    if not any(_has_external_mask(image) for name in names for image in DatasetCatalog.get(name)):
        raise ValueError(
            "MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS is True, but the datasets of "
            f"DATASETS.TRAIN, {', '.join(names)}, have no mask with 'mask_source' 'model': write a "
            "json that has them, with tools/grabcut_masks.py for instance, and give its path as "
            "DATASETS.TRAIN."
        )


def _has_external_mask(image: dict) -> bool:
    return any(
        is_from_model(x) and x.get("segmentation") and not x.get("iscrowd", 0)
        for x in image.get("annotations", ())
    )


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    print("Command Line Args:", args)
    try:
        # With launch's timeout of 30 minutes: the first process evaluates while the others wait.
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except InputError as error:
        sys.exit(f"error: {error}")
