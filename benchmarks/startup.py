#!/usr/bin/env python
"""
Time to import the package and to get the help of every command, each in a new Python process.

The first program imports torch and detectron2 and nothing of them, less than any program on
Detectron2 needs. Files are in the disk cache after the first round, which does not count.
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path

from paired import Programs, main

from teacher_student_mask.cli.main import COMMANDS


def make_programs(args: argparse.Namespace) -> Programs:
    commands = {
        "import torch, detectron2": ["-c", "import torch, detectron2"],
        "import teacher_student_mask": ["-c", "import teacher_student_mask"],
        "train_net.py --help": ["train_net.py", "--help"],
    }
    for name in COMMANDS:
        commands[f"tsmask {name} --help"] = ["-m", "teacher_student_mask", name, "--help"]
    return {
        name: functools.partial(run, command, args.checkout) for name, command in commands.items()
    }


def run(command: list[str], checkout: Path) -> None:
    """Run Python as a user would in a checkout."""
    subprocess.run(  # nosec B603  # This interpreter, on files of a checkout.
        [sys.executable, *command],
        cwd=checkout,
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
        check=True,
    )


if __name__ == "__main__":
    raise SystemExit(main(__doc__, lambda parser: None, make_programs, rounds=10))
