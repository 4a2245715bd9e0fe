"""Programs in processes forked from one that has imported PyTorch: it saves them seconds."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["detectron2.engine", "detectron2.evaluation", "teacher_student_mask.engine"]
)


def run_program(path, arguments, output, timeout=900):
    """
    What ``python PATH ARGUMENTS`` does, with the environment of the first call in this process.

    Args:
        path: of the program.
        arguments: its command line.
        output: file that gets what it prints.
        timeout: seconds.

    Returns:
        Its exit code.

    Raises:
        TimeoutError: it was killed.
    """
    arguments = list(map(str, arguments))
    process = _context.Process(target=_run, args=(str(path), arguments, output, os.getcwd()))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{path} took longer than {timeout} s")
    return process.exitcode


def _run(path, arguments, output, folder):
    os.chdir(folder)
    with open(output, "wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
