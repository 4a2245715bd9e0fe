"""
Give a mask to every object of a COCO json that has a box only.

A trained model draws the mask on the object's own box and class, so nothing has to be detected.
Masks that humans made, crowds and everything else keep their values. Each new mask has a score, the
agreement of teacher and student where the model has both, and "mask_source": "model";
docs/COMPLETE.md says what exactly these mean.

examples:
  with a model that was trained here, and a list of what people should look at first:
    tsmask complete output/train --annotations data/train.json --image-root data/images \\
        --output output/train_completed.json --rank output/look_at_first.csv

  GrabCut's masks for the baseline Mask GrabCut, of a json without masks of unseen classes:
    tsmask complete --grabcut --annotations output/stripped.json --image-root data/images \\
        --output output/train_grabcut.json
"""

import argparse
import dataclasses
import shlex

from .main import add_model_arguments, choose_model

__all__ = ["add_arguments", "add_data_arguments", "run", "run_with"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and the options."""
    add = parser.add_argument
    add_model_arguments(parser)
    text = "without a model, from boxes and colours; without score and agreement"
    add("--grabcut", action="store_true", help=text)
    text = "both: of the mean of the two heads' probabilities (default: both, if there are two)"
    add("--masks-of", choices=("student", "teacher", "both"), help=text)
    add_data_arguments(parser)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those that hold whatever makes the masks."""
    add = parser.add_argument
    add("--annotations", required=True, metavar="IN.json", help="COCO's format; not changed")
    add("--image-root", required=True, metavar="DIR", help="folder of the images")
    add("--output", required=True, metavar="OUT.json", help="see --force")
    text = "of the new masks; one with a hole is an RLE in any case (default: %(default)s)"
    formats = ("rle", "polygon")
    add("--format", dest="mask_format", choices=formats, default="rle", help=text)
    text = "list the objects, those in need of a human first"
    add("--rank", dest="ranking", metavar="CSV", help=text)
    text = "also write the outcome as YOLO's labels"
    add("--yolo", metavar="DIR", help=text)
    text = 'make masks with "mask_source": "model" anew; they are kept otherwise'
    add("--redo-model-masks", action="store_true", help=text)
    text = "leave the objects of images that are missing or broken as they are"
    add("--skip-broken-images", action="store_true", help=text)
    add("--resume", action="store_true", help="go on with what an interrupted run has finished")
    add("--force", action="store_true", help="replace files that exist, and begin anew")
    text = "processes: one a GPU, or on the CPU (default: 1)"
    add("--num-gpus", dest="num_processes", type=int, default=1, metavar="N", help=text)


def run(args: argparse.Namespace) -> None:
    """Complete, and print a table and the next command."""
    if args.model or not args.grabcut:
        args.model = choose_model(args)
    run_with(args)


def run_with(args: argparse.Namespace) -> None:
    """Complete by the arguments that have the name of a field of ``CompletionSettings``."""
    from ..completion import CompletionSettings, complete

    names = {x.name for x in dataclasses.fields(CompletionSettings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    print(complete(**{"model": None, **given}))
    print(f"Written: {args.output}")
    words = ["tsmask", "train", args.output, "--image-root", args.image_root]
    print(f"Train with it: {shlex.join(words)}")
