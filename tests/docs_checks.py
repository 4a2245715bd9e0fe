"""Whether a command of the documents could be right, without running it."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser
from docs_commands import Block, Command, commands_of
from docs_exclusions import OPTIONAL

from teacher_student_mask import add_teacher_student_mask_config

__all__ = ["problem_of"]

# What starts the command that follows it.
WRAPPERS = ("srun", "nice", "env", "timeout")
# Programs that are no part of this project: their arguments are not looked at.
OTHERS = ("cp", "git", "ls", "mkdir", "mv", "sbatch", "tensorboard")
# A config that a command reads from where an earlier one has written it has the keys of this one.
STAND_IN = "configs/shapes/teacher_student_box_fit.yaml"
# Below these folders a path names a file of the repository.
FOLDERS = ("configs", "tools", "benchmarks", "docs", "tests", "projects")


class _Parsed(Exception):
    """A program has got as far as its arguments."""


class _Wrong(Exception):
    """Its parser does not take them."""


def problem_of(command: Command, root: Path) -> str | None:
    """
    What is wrong with a command: an unknown program, file, flag, make target, config key or type.

    Args:
        command: of a document.
        root: the repository.

    Returns:
        The reason, or None.
    """
    argv = list(command.argv)
    while argv and argv[0] in WRAPPERS:
        argv = argv[next((i for i, x in enumerate(argv) if x in ("python", "bash")), len(argv)) :]
    if argv[:2] == ["bash", "-c"]:
        inner = commands_of(Block(command.page, command.line, argv[2], None), root)
        return next(filter(None, (problem_of(x, root) for x in inner)), None)
    missing = [x for x in argv if x.split("/")[0] in FOLDERS and not _exists(root, x)]
    if missing:
        return f"no such file: {', '.join(missing)}"
    if argv and argv[0] == "python":
        return _python_problem(argv[1:], root)
    if argv and argv[0] == "make":
        return _make_problem(argv[1:], root)
    if argv and argv[0] == "pip":
        return _pip_problem(argv[1:], root)
    if argv and (argv[0] in OTHERS or _exists(root, argv[0])):
        return None
    return f"unknown program: {' '.join(argv[:1]) or command}"


def _exists(root: Path, path: str) -> bool:
    return (root / path).exists() or any(char in path for char in "*?[")


def _python_problem(argv: list[str], root: Path) -> str | None:
    if argv[:1] == ["-c"]:
        compile(argv[1], "-c", "exec")
        return None
    if argv[:1] == ["-m"]:
        # Not importlib.util: asked for pip, the finder of setuptools gives up replacing distutils
        # in this process, and a later import of setuptools then fails.
        return None if PathFinder.find_spec(argv[1]) else f"no module {argv[1]}"
    if not argv or not argv[0].endswith(".py"):
        return f"not a file: python {' '.join(argv)}"
    if argv[1:] == ["--help"]:
        return None if (root / argv[0]).is_file() else f"no such file: {argv[0]}"
    try:
        options = _parse(root / argv[0], argv[1:])
    except _Wrong as error:
        return str(error)
    except ModuleNotFoundError as error:
        # Of a program that is nothing without an optional package.
        return None if error.name in OPTIONAL else f"it needs {error.name}"
    return _config_problem(options, root)


def _parse(path: Path, argv: list[str]) -> argparse.Namespace:
    # The options of a program, from its own parser; it goes no further.
    with _parsing_alone() as parsed:
        if path.name == "train_net.py":
            default_argument_parser().parse_args(argv)
        _load(path).main(argv)
    if not parsed:
        raise _Wrong(f"{path.name}: its arguments could not be looked at")
    return parsed[0]


def _load(path: Path) -> ModuleType:
    # Under a name of its own, with the folder that Python adds for a program.
    name = f"of_the_documents_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(path.parent))
    return sys.modules[name]


@contextmanager
def _parsing_alone() -> Iterator[list[argparse.Namespace]]:
    parse_args, error = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.error
    found = []

    def stop(self, *args, **kwargs):
        found.append(parse_args(self, *args, **kwargs))
        raise _Parsed

    def complain(self, message):
        raise _Wrong(message)

    argparse.ArgumentParser.parse_args = stop
    argparse.ArgumentParser.error = complain
    try:
        yield found
    except _Parsed:
        pass
    finally:
        argparse.ArgumentParser.parse_args, argparse.ArgumentParser.error = parse_args, error


def _config_problem(options: argparse.Namespace, root: Path) -> str | None:
    opts = getattr(options, "opts", None) or []
    files = [getattr(options, "config_file", None) or STAND_IN]
    files += getattr(options, "configs", None) or []
    for file in files:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        path = root / file
        try:
            cfg.merge_from_file(str(path if path.is_file() else root / STAND_IN))
            cfg.merge_from_list(list(opts))
        except (AssertionError, KeyError, ValueError) as error:
            return f"{file}, {' '.join(opts)}: {error}"
    return None


def _make_problem(argv: list[str], root: Path) -> str | None:
    known = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    known |= set(re.findall(r"^([A-Z_]+) \?=", (root / "Makefile").read_text(), re.MULTILINE))
    unknown = [x for x in argv if x.split("=")[0] not in known]
    return f"no such target or variable of make: {', '.join(unknown)}" if unknown else None


def _pip_problem(argv: list[str], root: Path) -> str | None:
    extras = set(re.findall(r"^(\w+) =$", (root / "setup.cfg").read_text(), re.MULTILINE))
    for text in argv:
        for extra in re.findall(r"^\.\[(.*)\]$", text):
            unknown = sorted(set(extra.split(",")) - extras)
            if unknown:
                return f"no such extra in setup.cfg: {', '.join(unknown)}"
    files = [argv[i + 1] for i, x in enumerate(argv[:-1]) if x in ("-c", "-r")]
    missing = [x for x in files if not (root / x).is_file()]
    return f"no such file: {', '.join(missing)}" if missing else None
