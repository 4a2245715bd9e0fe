"""
Entry point of ``tsmask``.

A module of a subcommand has a docstring, which is its description in ``--help``, and the functions
``add_arguments(parser)`` and ``run(args)``, which returns the exit status (None = 0). What takes
long to import, PyTorch above all, is imported in ``run``.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..trained_model import TrainedModel

__all__ = [
    "COMMANDS",
    "add_model_arguments",
    "choose_model",
    "key_and_value",
    "load_chosen_model",
    "main",
]

# Subcommand -> (module, what it does), in the order in which people need them.
COMMANDS = {
    "check": ("check", "look for what is wrong with a COCO json and its images"),
    "import": (
        "import_annotations",
        "turn YOLO, LabelMe, CVAT, VOC data or masks into a COCO json",
    ),
    "view": ("view", "draw the annotations of a dataset"),
    "edit": ("edit", "take masks out of a COCO json"),
    "train": ("train", "train a model, or evaluate one"),
    "predict": ("predict", "run a model on images, folders and videos"),
    "complete": ("complete", "give a mask to every object that has a box only"),
    "prompt": ("prompt", "the same by a model that takes boxes, such as SAM"),
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


def load_chosen_model(args: argparse.Namespace, **options) -> TrainedModel:
    """The model of :func:`add_model_arguments`; options of :func:`load_model`."""
    from ..trained_model import load_model

    return load_model(choose_model(args), weights=args.weights, opts=args.opts, **options)


def key_and_value(text: str) -> tuple[str, str]:
    """For the ``type`` of an argument KEY=VALUE."""
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} has no NAME= before a value")
    return key, value


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
    # Options may stand between the words, but not where a word has options of its own.
    has_parts = name in ("edit", "import")
    args = (parser.parse_args if has_parts else parser.parse_intermixed_args)(rest)
    # What this project has to say, and warnings of others.
    console, ours = logging.StreamHandler(sys.stdout), "teacher_student_mask"
    console.addFilter(lambda x: x.levelno >= logging.WARNING or x.name.startswith(ours))
    logging.basicConfig(format="[%(asctime)s %(name)s] %(message)s", handlers=[console])
    logging.getLogger(ours).setLevel(logging.INFO)
    try:
        return module.run(args) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in "tsmask check ... | head"
        return 1
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"error: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1


def _parse_without_command(argv: list[str]) -> int:
    commands = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="tsmask",
        usage="tsmask COMMAND [options]",
        description="Instance segmentation where only some objects have a mask.",
        epilog=f"commands:\n{commands}\n\ntsmask COMMAND --help explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "show the versions of this project and of what it stands on, and what is missing"
    parser.add_argument("--version", action="store_true", help=text)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    if not argv:
        parser.print_help()
    elif argv == ["--version"]:
        print("\n".join(_describe_installation()))
    else:
        parser.parse_args(argv)
    return 0


def _describe_installation() -> list[str]:
    from importlib import metadata

    from packaging.requirements import Requirement

    from .. import __version__

    lines = [f"tsmask {__version__}, Python {sys.version.split()[0]}"]
    try:
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        others = ", ".join(f"{x} {metadata.version(x)}" for x in ("torchvision", "numpy"))
        lines.append(f"torch {torch.__version__}, {others}, {', '.join(devices) or 'no GPU'}")
    except ImportError:
        lines.append("torch: missing; pip install torch torchvision")
    try:
        lines.append(f"Detectron2 {metadata.version('detectron2')}")
    except metadata.PackageNotFoundError:
        lines.append("Detectron2: missing; the README says where it comes from")
    missing: dict[str, list[str]] = {}
    for text in metadata.requires("teacher-student-mask") or ():
        requirement = Requirement(text)
        extra = re.search("extra == ['\"](\\w+)['\"]", str(requirement.marker))
        if not extra:
            continue
        found = missing.setdefault(extra[1], [])
        try:
            metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(f"'{requirement.name}{requirement.specifier}'")
    for extra, packages in missing.items():
        lines.append(f"extra {extra}: {'pip install ' + ' '.join(packages) if packages else 'ok'}")
    return lines
