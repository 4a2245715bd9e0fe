"""
Train a model on your data, or by a config. Two forms:

  tsmask train DATA                    your photographs; everything is chosen for you
  tsmask train --config-file YAML ...  Detectron2's command line, for studies, COCO and clusters

DATA is a COCO json in which every object has a box and any of them a mask; a folder with train.json
and perhaps val.json; a folder of Roboflow's COCO export; or the data.yaml of a YOLO dataset. Model,
schedule and validation images are chosen and printed, with the expected time, before the training
begins. It ends with the quality of boxes and masks, and the next commands. The folder of the run is
a model for tsmask predict, complete, export, analyze and app.

  tsmask train photos/ --time 30m             as many iterations as half an hour allows
  tsmask train data.yaml --model small --opts INPUT.RANDOM_FLIP none
  tsmask train output/train                   go on with a run that was interrupted

With a config, DATASETS.TRAIN and DATASETS.TEST name COCO jsons by their paths, or registered
datasets. These are looked for under $DETECTRON2_DATASETS (default: ./datasets).

  tsmask train --num-gpus 8 --config-file configs/coco/....yaml OUTPUT_DIR output/ts
  tsmask train --resume --config-file ...
  tsmask train --eval-only --config-file output/ts/config.yaml MODEL.WEIGHTS model.pth
  the teacher, on ground-truth boxes:  ... --eval-only ... TEST.MASK_HEAD teacher TEST.GT_BOXES True

OUTPUT_DIR then holds config.yaml, categories.json (the classes), log.txt, metrics.json,
checkpoints, TensorBoard events and results.json; an evaluation writes to the folder inference in
it. Classes are matched by name: the test json may have other ids, and some of the classes.
"""

import argparse
import re

from ..errors import InputError

__all__ = ["add_arguments", "run"]

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of training on own data, and of detectron2.engine.default_argument_parser."""
    parser.usage = (
        "tsmask train DATA [options]\n"
        "       tsmask train --config-file YAML [options] [KEY VALUE ...]"
    )
    parser.add_argument("words", nargs="*", metavar="DATA", help="or KEY VALUE ... of the config")
    group = parser.add_argument_group("with DATA")
    add = group.add_argument
    add("--model", metavar="NAME", help="nano (CPU), small or base (GPU); default: by the device")
    length = group.add_mutually_exclusive_group().add_argument
    length("--time", type=_duration, metavar="30m", help="what training may take: 90s, 30m, 2h")
    length("--epochs", type=float, metavar="N", help="passes over the images")
    text = "stop when validation AP has not risen for N evaluations (there are 5)"
    add("--early-stop", type=int, metavar="N", help=text)
    add("--image-root", metavar="DIR", help="of the images, if they are not beside the json")
    text = "of the run (default: output/train, output/train2, ...)"
    add("--output-dir", metavar="DIR", help=text)
    add("--seed", type=int, help="default: 1")
    text = "changes to the config; everything after --opts belongs to it"
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help=text)
    add = parser.add_argument_group("with a config").add_argument
    add("--config-file", default="", metavar="YAML", help="path of the config")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--num-gpus", type=int, default=1, help="GPUs on each machine (default: %(default)s)")
    add("--num-machines", type=int, default=1, help="default: %(default)s")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")


def run(args: argparse.Namespace) -> None:
    """Train on DATA, or train or evaluate by a config, in one process for each GPU."""
    if args.config_file:
        names = ("model", "time", "epochs", "early_stop", "image_root", "output_dir", "seed")
        if any(vars(args)[x] is not None for x in names):
            options = ", ".join(f"--{x.replace('_', '-')}" for x in names)
            raise InputError(
                f"{options} go with DATA; --config-file takes KEY VALUE, such as SEED 1."
            )
        return _run_config(args)
    is_for_config = args.eval_only or args.resume or args.num_gpus > 1 or args.num_machines > 1
    if len(args.words) != 1 or is_for_config:
        raise InputError("give DATA, one path, or --config-file; see tsmask train --help.")
    from ..training import train

    train(
        args.words[0],
        args.output_dir,
        model=args.model,
        time_limit=args.time,
        epochs=args.epochs,
        image_root=args.image_root,
        seed=args.seed,
        early_stop=args.early_stop,
        opts=args.opts,
    )


def _run_config(args: argparse.Namespace) -> None:
    import torch
    from detectron2.engine import launch

    from ..engine import main

    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise InputError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()}; one "
            "process, on the CPU where there is no GPU, is --num-gpus 1."
        )
    args.opts = args.words + args.opts

    # With launch's timeout of 30 minutes: the first process evaluates while the others wait.
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _duration(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number and s, m or h, as in 30m")
    return float(found[1]) * _SECONDS[found[2]]
