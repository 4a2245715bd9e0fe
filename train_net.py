#!/usr/bin/env python
"""
Train or evaluate a model of TeacherStudentMask.

All flags and KEY VALUE overrides are Detectron2's. Datasets are looked for under
$DETECTRON2_DATASETS (default: ./datasets), COCO in Detectron2's layout.

  train:     train_net.py --num-gpus 8 --config-file configs/voc2nonvoc/....yaml
  on a CPU:  train_net.py --config-file configs/shapes/....yaml MODEL.DEVICE cpu
  go on:     train_net.py --resume --config-file ...
  evaluate:  train_net.py --eval-only --config-file ... MODEL.WEIGHTS model.pth
  the teacher, on ground-truth boxes:  ... --eval-only ... TEST.MASK_HEAD teacher TEST.GT_BOXES True

OUTPUT_DIR then holds config.yaml, log.txt, metrics.json, checkpoints, TensorBoard events and
results.json.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from teacher_student_mask import (
    GTBoxInference,
    PartiallySupervisedCOCOEvaluator,
    TeacherStudentDatasetMapper,
    add_teacher_student_mask_config,
)
from teacher_student_mask.evaluation import results_table

logger = logging.getLogger("teacher_student_mask.train_net")


class Trainer(DefaultTrainer):
    """Detectron2's trainer with this project's mapper and evaluator."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, mapper=TeacherStudentDatasetMapper(cfg, True))

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
            report(cfg, results)
        return results


def setup(args) -> CfgNode:
    """Build the config from the command line and start logging."""
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    from_scratch = not cfg.MODEL.WEIGHTS and not args.eval_only
    if from_scratch and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        # Frozen statistics of nothing: activations grow with each block until the loss is NaN.
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(
        output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="teacher_student_mask"
    )
    if from_scratch:
        logger.warning(
            "MODEL.WEIGHTS is empty: training from scratch, with MODEL.RESNETS.NORM "
            f"{cfg.MODEL.RESNETS.NORM!r}, MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT}."
        )
    return cfg


def main(args) -> dict | None:
    """Train, or only evaluate."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def report(cfg: CfgNode, results: dict) -> None:
    """Write the results of the last evaluation to results.json and log them as a table."""
    with open(os.path.join(cfg.OUTPUT_DIR, "results.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=2)
    boxes = "ground-truth boxes" if cfg.TEST.GT_BOXES else "detected boxes"
    logger.info(
        f"Results ({cfg.TEST.MASK_HEAD} mask head, {boxes}; unseen classes in bold):\n"
        + results_table(results)
    )


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args()
    print("Command Line Args:", args)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
