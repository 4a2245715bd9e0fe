#!/usr/bin/env python
"""
Time to import the package and to get train_net.py's help, against importing torch and detectron2.

Each program is a new Python process, from its start to its end, with files in the disk cache. The
baseline imports the two libraries and nothing of them, less than any program on Detectron2 needs;
"Detectron2's own parts" imports those that train_net.py uses. With --slowest the package's import
is followed by the modules that took longest by themselves (python -X importtime).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from paired import print_ratios, time_in_turns

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINE = "import torch, detectron2"
PARTS = ("checkpoint", "config", "data", "engine", "evaluation", "modeling")
PROGRAMS = {
    BASELINE: ["-c", BASELINE],
    "Detectron2's own parts": ["-c", "import " + ", ".join(f"detectron2.{x}" for x in PARTS)],
    "import teacher_student_mask": ["-c", "import teacher_student_mask"],
    "train_net.py --help": ["train_net.py", "--help"],
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="modules to print")
    args = parser.parse_args(argv)
    programs = {name: lambda command=x: run(command) for name, x in PROGRAMS.items()}
    print_ratios(time_in_turns(programs, args.rounds, args.warmup), BASELINE)
    if args.slowest:
        print_slowest_modules(args.slowest)
    return 0


def run(command: list[str]) -> str:
    """Run Python as a user would from the repository; return what it wrote to stderr."""
    package = str(REPOSITORY / "projects/TeacherStudentMask")
    path = os.pathsep.join(filter(None, [package, os.getenv("PYTHONPATH")]))
    result = subprocess.run(  # nosec B603  # This interpreter, on files of this repository.
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"python {' '.join(command)} failed:\n{result.stderr}")
    return result.stderr


def print_slowest_modules(count: int) -> None:
    lines = run(["-X", "importtime", *PROGRAMS["import teacher_student_mask"]]).splitlines()
    # "import time: self [us] | cumulative | module", without the header.
    rows = [x.partition(":")[2].split("|") for x in lines if x.startswith("import time:")][1:]
    rows.sort(key=lambda row: int(row[0]), reverse=True)
    print("\nms by itself, module")
    for row in rows[:count]:
        print(f"{int(row[0]) / 1000:8.1f}  {row[2].strip()}")


if __name__ == "__main__":
    raise SystemExit(main())
