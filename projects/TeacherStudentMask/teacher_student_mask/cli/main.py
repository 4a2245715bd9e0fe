"""
Entry point of ``tsmask``.

A module of a subcommand has a docstring, which is its description in ``--help``, and the functions
``add_arguments(parser)`` and ``run(args)``, which returns the exit status (None = 0). What takes
long to import, PyTorch above all, is imported in ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..errors import InputError

__all__ = ["COMMANDS", "add_model_arguments", "choose_model", "main"]

# Subcommand -> (module, what it does), in the order in which people need them.
COMMANDS = {
    "check": ("check", "look for what is wrong with a COCO json and its images"),
    "import": ("import_annotations", "turn YOLO, LabelMe, CVAT, VOC or LVIS data into a COCO json"),
    "view": ("view", "draw the annotations of a dataset"),
    "edit": ("edit", "take masks out of a COCO json"),
    "train": ("train", "train a model, or evaluate one"),
    "predict": ("predict", "run a model on images, folders and videos"),
    "complete": ("complete", "give a mask to every object that has a box only"),
    "export": ("export", "make a plain Detectron2, TorchScript or ONNX model"),
    "analyze": ("analyze", "measure models on a dataset, with figures, intervals and a report"),
    "sweep": ("sweep", "train and compare many configs"),
    "app": ("app", "try a model on a page in the browser"),
    "demo": ("demo", "see the whole path on drawn shapes: train, evaluate, report"),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add MODEL, ``--config-file``, ``--weights`` and ``--opts``.

    MODEL is the first positional argument; ``--opts`` takes all words behind it.
    """
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder of a training, such as output/train")
    add("--config-file", metavar="YAML", help="config of a model, in the place of MODEL")
    text = "checkpoint (default: the best or last of MODEL, or MODEL.WEIGHTS of the YAML)"
    add("--weights", metavar="PTH", help=text)
    text = "changes to the config; everything after --opts belongs to it"
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help=text)


def choose_model(args: argparse.Namespace) -> str:
    """The folder or config that :func:`add_model_arguments` names; InputError if not one."""
    if bool(args.model) == bool(args.config_file):
        raise InputError("name one model: MODEL, the folder of a training, or --config-file YAML.")
    return args.model or args.config_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``tsmask`` with the words after it, by default those of this process; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        return _parse_without_command(argv)
    name, *rest = argv
    module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
    parser = argparse.ArgumentParser(
        prog=f"tsmask {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    try:
        return module.run(args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in "tsmask check ... | head"
        return 1


def _parse_without_command(argv: list[str]) -> int:
    from .. import __version__

    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tsmask",
        usage="tsmask COMMAND [options]",
        description="Instance segmentation where only some objects have a mask.",
        epilog=f"commands:\n{commands}\n\ntsmask COMMAND --help explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
        return 0
    parser.parse_args(argv)
    return 0
