"""
Run train_net.py again and again on one output folder and kill -9 it; for the tests of --resume.

  interrupted_runs.py PLAN.json RESULT.json

Starting Python and importing PyTorch takes longer than the tiny training itself. So this program
imports everything once, and each run is a child that it forks before any thread exists: what is
killed is a process of its own, with a trainer, DataLoader workers and files of its own, but not a
new interpreter. The plan has "config_file", "dataset" (name, json_file, image_root), "output" and
"runs", a list of

  {"opts": [KEY, VALUE, ...], "kill": null or {"event": ..., "count": ..., "delay": ...}}

A run is killed ``delay`` seconds after it told of an event for the ``count``-th time: "start" (of
the process), "step", "checkpoint" (half of a checkpoint file is written, and the child waits for
the kill), "evaluation". From that moment on it begins no further step, so that a fast machine does
not get further than a slow one. The result has one entry for each run: how
it ended, the events it told of, and the checkpoints that could be read afterwards.
"""

import io
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.engine import default_argument_parser

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import train_net  # noqa: E402
from teacher_student_mask import register_partial_coco  # noqa: E402
from teacher_student_mask.engine import trainer  # noqa: E402

EVENTS = {b"b": "start", b"s": "step", b"c": "checkpoint", b"e": "evaluation"}
LONGEST_RUN = 120  # seconds


def tell_events(pipe: int, kill: dict | None) -> Callable[[bytes], None]:
    """Wrap what train_net.py calls, in this process, so that it tells where it is."""
    told = []
    step, test, save = train_net.Trainer.run_step, train_net.Trainer.test.__func__, torch.save

    def tell(letter):
        told.append(EVENTS[letter])
        os.write(pipe, letter)

    def is_to_be_killed():
        return kill is not None and told.count(kill["event"]) >= kill["count"]

    def run_step(self):
        if is_to_be_killed():
            time.sleep(LONGEST_RUN)  # here the kill comes
        tell(b"s")
        step(self)

    def evaluate(cls, *args, **kwargs):
        tell(b"e")
        return test(cls, *args, **kwargs)

    def save_in_halves(data, file):
        if "model" not in data:  # an evaluation's predictions
            return save(data, file)
        buffer = io.BytesIO()
        save(data, buffer)
        content = buffer.getbuffer()
        file.write(content[: len(content) // 2])
        file.flush()
        tell(b"c")
        if is_to_be_killed():
            time.sleep(LONGEST_RUN)
        file.write(content[len(content) // 2 :])

    train_net.Trainer.run_step = run_step
    train_net.Trainer.test = classmethod(evaluate)
    if kill is not None and kill["event"] == "checkpoint":
        torch.save = save_in_halves
    return tell


def train(plan: dict, run: dict, pipe: int) -> None:
    """In the child: what ``train_net.py --resume`` does."""
    with open(plan["output"] + ".log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    trainer.collect_env_info = lambda: "(left out)"  # it runs compilers to ask for their versions
    tell = tell_events(pipe, run["kill"])
    tell(b"b")
    arguments = ["--resume", "--config-file", plan["config_file"], "OUTPUT_DIR", plan["output"]]
    train_net.main(default_argument_parser().parse_args([*arguments, *map(str, run["opts"])]))
    if run["kill"] is not None:
        # Near its end a run may be done before its kill comes.
        os.close(pipe)
        time.sleep(LONGEST_RUN)


def fork(plan: dict, run: dict) -> tuple[int, int]:
    """Start a run; return its process id and what its events are read from."""
    reader, writer = os.pipe()
    child = os.fork()
    if child > 0:
        os.close(writer)
        return child, reader
    code = 1
    try:
        os.close(reader)
        train(plan, run, writer)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(child: int, reader: int, kill: dict | None) -> list[str]:
    """Read events until the run ends or its moment has come; return them."""
    told, deadline = [], time.monotonic() + LONGEST_RUN
    while True:
        ready, _, _ = select.select([reader], [], [], max(deadline - time.monotonic(), 0))
        letter = os.read(reader, 1) if ready else b""
        if not letter:
            break
        told.append(EVENTS[letter])
        if kill is not None and told.count(kill["event"]) == kill["count"]:
            time.sleep(kill["delay"])
            break
    if kill is not None or time.monotonic() >= deadline:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    return told


def readable_checkpoints(output: str, known: set) -> list[str]:
    """Load all checkpoints but those that are as they were; raises if one cannot be read."""
    paths = sorted(Path(output).glob("*.pth"))
    for path in paths:
        state = (path.name, path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns)
        if state not in known:
            assert torch.load(path, weights_only=False)["model"], path
            known.add(state)
    return [path.name for path in paths]


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    # The name that the json is registered with; the child loads it.
    register_partial_coco(*plan["dataset"])
    results, known = [], set()
    for run in plan["runs"]:
        child, reader = fork(plan, run)
        told = watch(child, reader, run["kill"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        partial = [path.name for path in Path(plan["output"]).glob("*.partial")]
        results.append(
            {
                "status": status,
                "events": told,
                "checkpoints": readable_checkpoints(plan["output"], known),
                "partial": partial,
            }
        )
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
