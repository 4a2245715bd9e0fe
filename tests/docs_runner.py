"""
Run the commands of the documents in a copy of the repository, in the order in which they stand.

  docs_runner.py WORKSPACE RESULT.json [PAGE ...]

Starting Python and importing PyTorch takes longer than most of the commands. So this program
imports everything once, and each command is a child that it forks before any thread exists: a
process of its own with the command's arguments, variables and folder, but not a new interpreter.
The result is a list with an entry for each command: page, line, what it was, why it was not run or
how it ended, seconds, the end of its output. A page stops at its first failure, as what follows
needs what failed; and if the tutorial fails, so does everything. The other pages find the data and
the model of the tutorial (data/, output/mine), and nothing of one another.
"""

import json
import os
import runpy
import shlex
import shutil
import sys
import time
import traceback
from pathlib import Path

# What programs import; the children find it there.
import cv2  # noqa: F401
import detectron2.data  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch  # noqa: F401
from detectron2.engine import defaults
from docs_commands import Command, blocks_of, commands_of, pages
from docs_exclusions import missing_package, reason_not_to_run

import teacher_student_mask.analysis  # noqa: F401
import teacher_student_mask.engine  # noqa: F401

LONGEST_COMMAND = 600  # seconds
# Anything else, make and pip and git among it, is for readers.
PROGRAMS = ("python", "cp", "ls", "mkdir", "mv")
LINES_OF_OUTPUT = 25


def run_python(argv: list[str]) -> None:
    """What ``python ARGV`` does, in a process that is about to end."""
    if argv[0] == "-c":
        sys.argv = argv[:1] + argv[2:]
        exec(compile(argv[1], "-c", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, os.path.dirname(os.path.realpath(argv[0])))
        runpy.run_path(argv[0], run_name="__main__")


def child(command: Command, workspace: Path, log: int) -> None:
    """Run a command and leave."""
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(workspace)
        os.environ.update(command.environment)
        # It runs compilers to ask for their versions.
        defaults.collect_env_info = lambda: "(left out)"
        if command.argv[0] != "python":
            os.execvp(command.argv[0], command.argv)
        # The program's own folder comes first, and nothing of the tests.
        here = str(Path(__file__).resolve().parent)
        sys.path[:] = [x for x in sys.path if x != here]
        run_python(list(command.argv[1:]))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command: Command, workspace: Path) -> dict:
    """Run a command to its end, which comes after LONGEST_COMMAND seconds at the latest."""
    if command.argv[0] not in PROGRAMS:
        allowed = f"Tests run {', '.join(PROGRAMS)} alone; mark it with <!-- not run: reason -->."
        return {"status": 1, "seconds": 0.0, "output": [allowed]}
    start, path = time.monotonic(), workspace / "command.log"
    with open(path, "wb") as log:
        process = os.fork()
        if process == 0:
            child(command, workspace, log.fileno())
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        time.sleep(0.05)
        if time.monotonic() - start > LONGEST_COMMAND:
            os.kill(process, 9)
    lines = path.read_text(errors="replace").splitlines()
    status = os.waitstatus_to_exitcode(ended[1])
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "output": lines[-LINES_OF_OUTPUT:],
    }


def commands_in(block, workspace: Path) -> list[Command]:
    """The commands of a block as they stand now, when the files exist that patterns stand for."""
    if block.language == "python":
        argv = ("python", "-c", block.text)
        return [Command(block.page, block.line, argv, (), block.not_run)]
    return commands_of(block, workspace)


def forget_other_pages(workspace: Path) -> None:
    """Leave of all output the model that the tutorial has trained: two pages may use one name."""
    for path in (workspace / "output").glob("*"):
        if path.name != "mine":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run_page(path: Path, workspace: Path) -> list[dict]:
    """Run what a page has, up to its first failure."""
    found, missing = [], None  # what, from then on, keeps the commands from being run
    page = os.path.relpath(path, workspace)
    for block in blocks_of(path, page, ("bash", "python")):
        for command in commands_in(block, workspace):
            reason = command.not_run or reason_not_to_run(command)
            if not reason and not missing and (package := missing_package(command)):
                missing = f"this or an earlier command needs the package {package}"
            reason = reason or missing
            entry = {"page": page, "line": command.line, "command": shlex.join(command.argv)}
            entry |= {"not_run": reason} if reason else run(command, workspace)
            if entry.get("status"):
                missing = "an earlier command of the page failed"
            found.append(entry)
    return found


def main(workspace: Path, result: Path, wanted: list[str]) -> None:
    found = []
    for path in pages(workspace):
        if wanted and os.path.relpath(path, workspace) not in wanted:
            continue
        forget_other_pages(workspace)
        found += run_page(path, workspace)
        result.write_text(json.dumps(found, indent=1))
        if path.name == "TUTORIAL.md" and any(x.get("status") for x in found):
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:])
