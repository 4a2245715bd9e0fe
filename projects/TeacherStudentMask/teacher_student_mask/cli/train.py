"""
Train a model, or evaluate one. All flags and KEY VALUE overrides are Detectron2's.

DATASETS.TRAIN and DATASETS.TEST name COCO jsons by their paths, or registered datasets. These are
looked for under $DETECTRON2_DATASETS (default: ./datasets), COCO in Detectron2's layout.

  train:     tsmask train --num-gpus 8 --config-file configs/coco/....yaml
  your data: tsmask train --config-file configs/custom/....yaml DATASETS.TRAIN "('my.json',)"
  go on:     tsmask train --resume --config-file ...
  evaluate:  tsmask train --eval-only --config-file output/mine/config.yaml MODEL.WEIGHTS model.pth
  the teacher, on ground-truth boxes:  ... --eval-only ... TEST.MASK_HEAD teacher TEST.GT_BOXES True

OUTPUT_DIR then holds config.yaml, categories.json (the classes), log.txt, metrics.json,
checkpoints, TensorBoard events and results.json; an evaluation writes to the folder inference in
it. Classes are matched by name: the test json may have other ids, and some of the classes.
"""

from __future__ import annotations

import argparse

from ..errors import InputError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of detectron2.engine.default_argument_parser."""
    add = parser.add_argument
    add("--config-file", default="", metavar="YAML", help="path of the config")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--num-gpus", type=int, default=1, help="GPUs on each machine (default: %(default)s)")
    add("--num-machines", type=int, default=1, help="default: %(default)s")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="changes to the config")


def run(args: argparse.Namespace) -> None:
    """Train or evaluate, in one process for each GPU."""
    import torch
    from detectron2.engine import launch

    from ..engine import main

    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise InputError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()}; one "
            "process, on the CPU where there is no GPU, is --num-gpus 1."
        )

    # With launch's timeout of 30 minutes: the first process evaluates while the others wait.
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
