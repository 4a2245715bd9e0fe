#!/usr/bin/env python
"""
Train or evaluate a model of TeacherStudentMask; ``tsmask train`` is the same.

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

import sys

from detectron2.engine import default_argument_parser

from teacher_student_mask.engine import Trainer, launch_training, main, setup
from teacher_student_mask.errors import InputError

# Your own trainer: subclass Trainer, and in a copy of teacher_student_mask/engine/training.py
# build that one.
__all__ = ["Trainer", "main", "setup"]

if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    print("Command Line Args:", args)
    try:
        launch_training(args)
    except InputError as error:
        sys.exit(f"error: {error}")
