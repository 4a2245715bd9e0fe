#!/usr/bin/env python3
"""
Makes the virtual environment of this project: pinned packages, Detectron2, the project itself.

Runs under a bare Python, with the standard library alone. See --help.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import List, Optional

from environment import description, detectron2_source
from environment.detectron2_wheel import SetupError
from environment.optional_parts import PARTS
from environment.virtual_environment import (
    VirtualEnvironment,
    check_disk,
    check_python,
    check_venv_module,
)

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
STAMP_NAME = "setup-stamp.json"

DESCRIPTION = """
Makes a virtual environment in which every command of this project runs: PyTorch and the other
packages at the versions of constraints.txt, Detectron2, and the project in editable mode. A second
run sees that nothing has changed and ends at once.

Detectron2 has no release on PyPI. It comes from the first of these that works:
  1. the source that you name: --detectron2, or the environment variable DETECTRON2_SOURCE;
  2. a Detectron2 that the environment can import already;
  3. "official": the official repository at the tested commit, compiled here
     (needs git, a C++ compiler and Python's headers);
  4. "pure-python": a source distribution on PyPI, checked by its hash, without the compiled
     operators (rotated boxes, deformable convolutions), which this project does not use.
"""

EXAMPLES = """
examples:
  %(prog)s                                    the usual environment, in .venv
  %(prog)s --describe                         what is in it
  %(prog)s --detectron2 ../detectron2         Detectron2 from a checkout of yours
  %(prog)s --detectron2 pure-python --force   from scratch, without a compiler
  python3.12 %(prog)s --venv .venv312         another interpreter, another folder
  %(prog)s --system-site-packages             keep the torch and Detectron2 of this Python
"""


def unpinned(constraints: str, installed: List[str]) -> str:
    """
    Drops the pins of packages that are installed already.

    Args:
        constraints (str): lines of a constraints file.
        installed (List[str]): names of packages, in any spelling.
    """

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    present = {plain(name) for name in installed}
    lines = constraints.splitlines(keepends=True)
    return "".join(line for line in lines if plain(line.split("==")[0].strip()) not in present)


def inputs_hash(options: List[str]) -> str:
    """
    Hashes everything that decides what the environment holds, but for the Detectron2 asked for.
    """
    digest = hashlib.sha256()
    for path in ("constraints.txt", "setup.cfg", "pyproject.toml"):
        digest.update((ROOT / path).read_bytes())
    digest.update(json.dumps([str(ROOT), list(sys.version_info[:2]), *options]).encode())
    return digest.hexdigest()


def is_current(stamp: Path, inputs: str, requested: Optional[str]) -> bool:
    """
    Says whether an environment holds what is asked for, going by its stamp.

    Without a request for a certain Detectron2, any Detectron2 will do.
    """
    if not stamp.is_file():
        return False
    written = json.loads(stamp.read_text())
    return written["inputs"] == inputs and requested in (None, written["detectron2"])


class Progress:
    """Numbers the steps and prints how long they take."""

    def __init__(self, total: int):
        self.total = total
        self.number = 0
        self.start = time.monotonic()

    def step(self, text: str) -> None:
        """
        Announces the next step.
        """
        self.number += 1
        print(f"[{self.number}/{self.total}] {self.seconds():4.0f} s  {text}", flush=True)

    def note(self, text: str) -> None:
        """
        Prints a line that belongs to the current step.
        """
        print(f"               {text}", flush=True)

    def seconds(self) -> float:
        """
        Returns the seconds since the first step.
        """
        return time.monotonic() - self.start


def set_up(environment: VirtualEnvironment, args: argparse.Namespace) -> None:
    """
    Makes the environment, step by step.
    """
    progress = Progress(total=5)
    progress.step("check Python and the disk")
    check_python()
    check_venv_module()
    has_torch = any(environment.folder.glob("lib/python*/site-packages/torch"))
    if args.force or not (has_torch or args.system_site_packages):
        check_disk(environment.folder)
    progress.step(f"make {environment.folder} with {sys.executable}")
    environment.create(args.system_site_packages, clear=args.force)
    if args.system_site_packages:
        environment.constraints = environment.folder / "constraints.txt"
        pins = unpinned(CONSTRAINTS.read_text(), environment.installed())
        environment.constraints.write_text(pins)
    progress.step("install PyTorch and the build tools (downloads 2.5 GB once)")
    packages = ["setuptools", "wheel", "ninja", "numpy", "torch", "torchvision"]
    environment.pip("install", *environment.pins(), *packages)
    progress.step("install Detectron2")
    detectron2_source.obtain_detectron2(environment, args.detectron2, log=progress.note)
    progress.step("install this project with the tools for its tests")
    environment.pip("install", *environment.pins(), "-e", f"{ROOT}[report,dev]")
    print(f"ready after {progress.seconds():.0f} s: {environment.folder}")


def describe(environment: VirtualEnvironment) -> None:
    """
    Prints what is in an environment.
    """
    if not environment.python.exists():
        raise SetupError(f"there is no environment in {environment.folder}: run `make env` first")
    print(environment.execute([str(environment.python), description.__file__]).stdout, end="")


def get_parser() -> argparse.ArgumentParser:
    """
    Returns the parser of the command line.
    """
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--venv",
        type=Path,
        default=ROOT / ".venv",
        metavar="FOLDER",
        help="the folder of the environment; default: .venv in the repository",
    )
    parser.add_argument(
        "--detectron2",
        default=os.environ.get("DETECTRON2_SOURCE") or None,
        metavar="REQUIREMENT",
        help="where Detectron2 comes from: anything `pip install` takes (a path, a wheel, a git "
        'URL), or one of the words "official" and "pure-python"',
    )
    parser.add_argument(
        "--system-site-packages",
        action="store_true",
        help="see and keep the packages of the interpreter (a container or cluster with its own "
        "torch); pins then hold only for what is missing",
    )
    parser.add_argument(
        "--with",
        dest="parts",
        nargs="+",
        choices=tuple(PARTS),
        default=[],
        help='also try to get: "crf", pydensecrf for pseudo masks by that method (compiles); '
        '"browser", Playwright, and Debian\'s Chromium where root runs this, for tests of the '
        'report; "export", onnx and onnxruntime for tools/export_student.py; "app", gradio for '
        "tools/app.py. What cannot be had is left out with a reason",
    )
    parser.add_argument(
        "--force", action="store_true", help="empty the folder first and do every step again"
    )
    parser.add_argument(
        "--describe",
        action="store_true",
        help="only print the versions of Python, torch, torchvision, numpy, Pillow and Detectron2",
    )
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """
    Runs the program; returns its exit code.
    """
    args = get_parser().parse_args(argv)
    environment = VirtualEnvironment(args.venv, CONSTRAINTS)
    stamp = environment.folder / STAMP_NAME
    try:
        if args.describe:
            describe(environment)
            return 0
        inputs = inputs_hash([str(args.system_site_packages)])
        if not args.force and is_current(stamp, inputs, args.detectron2):
            print(f"{args.venv} is up to date (--force makes it anew)")
        else:
            if stamp.exists():
                stamp.unlink()  # so that an interrupted run does not pass for a complete one
            set_up(environment, args)
            stamp.write_text(json.dumps({"inputs": inputs, "detectron2": args.detectron2}) + "\n")
        written = json.loads(stamp.read_text())
        for part in args.parts:
            if part in written.get("tried", []):
                continue
            PARTS[part](environment)
            # Also where it could not be had: each `make test` would try again for minutes.
            written["tried"] = [*written.get("tried", []), part]
            stamp.write_text(json.dumps(written) + "\n")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
