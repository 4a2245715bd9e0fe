#!/usr/bin/env python
"""Finish a half-annotated COCO json: a mask for every object that has only a box. See --help."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from completion.masks import FORMATS, MASKS_OF
from completion.parts import PartsError
from completion.process_launch import add_launch_arguments, start_processes
from completion.run import CompletionRun, parts_of
from inference.setup import (
    UsageError,
    add_opts_argument,
    add_weights_arguments,
    check_output_dir,
    setup_cfg,
)
from teacher_student_mask.data import register_json_datasets
from teacher_student_mask.engine import WriteError

# A process waits for the slowest one, and all of them for the first, which writes the output.
_TIMEOUT = timedelta(days=2)

DESCRIPTION = """
Reads a COCO json in which only some objects have a mask, and writes the same json with a mask for
every object: a trained model draws it on the object's own box and class. Masks that humans made,
crowds and everything else stay as they are, byte for byte. Each new mask comes with
  segmentation               compressed RLE, or polygons with --format polygon
  area                       of the mask, in pixels
  score                      mean probability of the mask's cells, from 0 to 1
  mask_source                "model"
  teacher_student_agreement  IoU of the masks of teacher and student, where the model has both
  mask_fallback              "box_fit", where no probability came to 0.5 and the threshold that
                             fills the box best was taken; else the field is not there
What exactly these mean stands in docs/COMPLETE.md.

A run that was killed goes on where it was if it is started again with the same command: what is
finished is in OUT.json.parts until the end. The number of processes may be another one.
"""

EXAMPLES = """
examples:
  with a model that train_net.py trained, and a list of what people should look at first:
    %(prog)s --config-file output/mine/config.yaml --weights output/mine/model_final.pth \\
        --annotations data/train.json --image-root data/images \\
        --output output/train_completed.json --rank output/look_at_first.csv

  8 GPUs; or 4 processes on a machine without a GPU:
    %(prog)s --num-gpus 8 --config-file ... --annotations ... --image-root ... --output ...

  two machines, with a common disk for the output:
    %(prog)s --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://first:5000 ...
    %(prog)s --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://first:5000 ...

exit code: 0 written; 1 not written, because of an image, the json or the disk (what is finished is
kept); 2 for a wrong command line. An output that is not written as a whole is not written at all.
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_weights_arguments(parser)
    add = parser.add_argument
    add("--annotations", required=True, metavar="IN.json", help="COCO's format; not changed")
    add("--image-root", required=True, metavar="DIR", help="folder of the images")
    add("--output", required=True, type=Path, metavar="OUT.json", help="see --force")
    add(
        "--masks-of",
        choices=MASKS_OF,
        help="whose masks; both: of the mean of the two heads' probabilities (default: both, or "
        "student where the model has one head)",
    )
    add(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of the new masks; one with a hole is an RLE in any case (default: %(default)s)",
    )
    add(
        "--rank",
        type=Path,
        metavar="CSV",
        help="list the objects, those in need of a human first; see --force",
    )
    add(
        "--redo-model-masks",
        action="store_true",
        help='make masks with "mask_source": "model" anew; they are kept otherwise',
    )
    add(
        "--skip-broken-images",
        action="store_true",
        help="leave the objects of images that are missing or broken as they are, and list those",
    )
    add("--force", action="store_true", help="replace an OUT.json and a CSV that exist")
    add("--restart", action="store_true", help="throw away what an unfinished run has done")
    add_launch_arguments(parser)
    add_opts_argument(parser)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    try:
        check_arguments(args)
        args.cfg = setup_cfg(args.config_file, args.weights, 0.0, args.opts)
    except UsageError as error:
        parser.error(str(error))
    if args.restart and args.machine_rank == 0:
        parts_of(args.output).restart()
    try:
        start_processes(work, args, _TIMEOUT)
    except ProcessExitedException as error:
        return error.exit_code or 1
    except SystemExit as error:
        return int(error.code)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """
    Raises:
        UsageError: a path or a number of processes cannot be.
    """
    if not os.path.isfile(args.annotations):
        raise UsageError(f"--annotations {args.annotations}: no such file.")
    if not os.path.isdir(args.image_root):
        raise UsageError(f"--image-root {args.image_root}: no such folder.")
    _check_outputs(args)
    _check_processes(args)


def _check_outputs(args: argparse.Namespace) -> None:
    outputs = [("--output", args.output), ("--rank", args.rank)]
    outputs = [(name, path) for name, path in outputs if path is not None]
    for name, path in outputs:
        if path.is_dir():
            raise UsageError(f"{name} {path}: a folder; name a file.")
        if _is_same_file(path, Path(args.annotations)):
            raise UsageError(f"{name} {path}: the input itself; it is never replaced.")
    if args.output.exists() and not args.force:
        raise UsageError(f"--output {args.output}: exists; --force replaces it.")
    if args.rank is not None:
        _check_ranking(args)
    for _, path in outputs:
        check_output_dir(path.resolve().parent)


def _check_ranking(args: argparse.Namespace) -> None:
    rank, parts = args.rank, parts_of(args.output)
    if _is_same_file(rank, args.output):
        raise UsageError(f"--rank {rank}: the file of --output too; name another one.")
    if parts.folder.resolve() in (rank.resolve(), *rank.resolve().parents):
        raise UsageError(
            f"--rank {rank}: in {parts.folder}, which is removed at the end; name another folder."
        )
    # An interrupted run that has come so far goes on with the same command.
    if rank.exists() and not args.force and not parts.has_written(rank):
        raise UsageError(f"--rank {rank}: exists; --force replaces it.")


def _is_same_file(path: Path, other: Path) -> bool:
    if path.resolve() == other.resolve():
        return True
    return path.exists() and other.exists() and path.samefile(other)


def _check_processes(args: argparse.Namespace) -> None:
    for name, value, least in (
        ("--num-gpus", args.num_gpus, 1),
        ("--num-machines", args.num_machines, 1),
        ("--machine-rank", args.machine_rank, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; allowed: {least} or more.")
    if args.machine_rank >= args.num_machines:
        raise UsageError(
            f"--machine-rank is {args.machine_rank}; allowed: 0 to {args.num_machines - 1}, as "
            f"--num-machines is {args.num_machines}."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UsageError("--dist-url: with several machines give tcp://HOST:PORT of machine 0.")


def work(args: argparse.Namespace) -> None:
    """
    What each process does.

    Raises:
        SystemExit: it could not be done; said on stderr.
    """
    # Names in the json may have characters that the terminal lacks.
    sys.stdout.reconfigure(errors="backslashreplace")
    if comm.get_world_size() > 1:
        set_up_logging(comm.get_rank())
    try:
        # Each process has a catalog of datasets of its own.
        register_json_datasets(args.cfg)
        CompletionRun(args, args.cfg).run()
    except (OSError, PartsError, UsageError, ValueError) as error:
        # The strerror of a WriteError says all; str() puts a number before it.
        message = error.strerror if isinstance(error, WriteError) else error
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)


def set_up_logging(rank: int) -> None:
    """Let the first process log; what ends one of the others is printed."""
    for name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=name, distributed_rank=rank)


if __name__ == "__main__":
    set_up_logging(0)
    sys.exit(main())
