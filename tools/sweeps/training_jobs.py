"""Runs of train_net.py as processes of their own, several at once, with a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

__all__ = [
    "REPOSITORY",
    "TRAIN_PROGRAM",
    "Job",
    "even_slots",
    "evaluation_job",
    "gt_boxes_folder",
    "gt_boxes_job",
    "path_for_child",
    "result_file",
    "run_jobs",
    "threads_per_job",
]

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_PROGRAM = REPOSITORY / "train_net.py"
POLL_SECONDS = 1.0
# What a process may take to end when it is told to.
GRACE_SECONDS = 20
_NOT_STARTED = "not started, because what it needs failed"


@dataclass(eq=False)
class Job:
    """
    One run of the training program.

    Args:
        name: for messages.
        folder: its OUTPUT_DIR; output.txt there gets what it prints.
        arguments: of the training program.
        num_iters: of a training, for the progress bar; 0 = an evaluation.
        after: the job that must have succeeded before; one of the same :func:`run_jobs`, or done.
    """

    name: str
    folder: Path
    arguments: list = field(repr=False)
    num_iters: int = 0
    after: Job | None = field(default=None, repr=False)

    def is_done(self) -> bool:
        """
        Whether results.json is there and final.

        With TEST.EVAL_PERIOD a training writes results.json on its way, too: it is final if it is
        not older than the note that the last checkpoint is model_final.pth.
        """
        results = self.folder / "results.json"
        if not results.is_file():
            return False
        if self.num_iters == 0:
            return True
        note = self.folder / "last_checkpoint"
        return (
            note.is_file()
            and note.read_text().strip() == "model_final.pth"
            and results.stat().st_mtime_ns >= note.stat().st_mtime_ns
        )

    def iters_done(self) -> int:
        """Iterations of the training so far, as its last line in metrics.json says."""
        metrics = self.folder / "metrics.json"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        for line in reversed(lines):
            # The last line may be half written.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return json.loads(line)["iteration"] + 1
        return 0

    def end_of_output(self, num_lines: int = 15) -> list[str]:
        """The last lines that it printed."""
        return (self.folder / "output.txt").read_text(errors="replace").splitlines()[-num_lines:]


def path_for_child(path: str | Path) -> str:
    """A path as a job understands it, which runs in the repository."""
    path = Path(path).resolve()
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def evaluation_job(
    name: str, model: Path, folder: Path, options: Sequence, after: Job | None = None
) -> Job:
    """
    An evaluation of a trained model, with the config that its training has written.

    Args:
        name: for messages.
        model: OUTPUT_DIR of the training.
        folder: of the evaluation.
        options: KEY VALUE changes to the config.
        after: the training, unless it is done.
    """
    arguments = ["--eval-only", "--config-file", path_for_child(model / "config.yaml")]
    arguments += ["MODEL.WEIGHTS", path_for_child(model / "model_final.pth")]
    arguments += ["OUTPUT_DIR", path_for_child(folder), *options]
    return Job(name, folder, arguments, after=after)


def gt_boxes_job(name: str, model: Path, head: str, after: Job | None = None) -> Job:
    """
    The evaluation of a mask head on the ground-truth boxes, in a folder of the model.

    Args:
        name, model, after: see :func:`evaluation_job`.
        head: "student", which is the only one of some models, or "teacher".
    """
    options = ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", head]
    folder = gt_boxes_folder(model, head)
    return evaluation_job(f"{name}, {head} on ground-truth boxes", model, folder, options, after)


def gt_boxes_folder(model: Path, head: str) -> Path:
    """Where :func:`gt_boxes_job` writes."""
    return model / f"gt_boxes_{head}"


def result_file(folder: Path) -> str:
    """Path of what the model has found in an evaluation with this OUTPUT_DIR."""
    path = folder / "inference" / "coco_instances_results.json"
    if not path.is_file():
        # Detectron2 writes none for a model that finds nothing.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([]))
    return str(path)


def threads_per_job(num_jobs: int) -> int:
    """Threads of each of so many jobs at one time: OMP_NUM_THREADS, or a share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    # One thread too many makes each of these small models slower than one too few.
    return max(1, (os.cpu_count() or 1) // num_jobs)


def even_slots(num_jobs: int) -> list[dict[str, str]]:
    """Slots, see :func:`run_jobs`, for so many jobs at once, each with a share of the cores."""
    return [{"OMP_NUM_THREADS": str(threads_per_job(num_jobs))} for _ in range(num_jobs)]


def run_jobs(
    title: str,
    jobs: Sequence[Job],
    slots: Sequence[dict[str, str]] | None = None,
    program: Path = TRAIN_PROGRAM,
    on_end: Callable[[Job, float, bool], None] | None = None,
) -> bool:
    """
    Run the jobs that are not done.

    What fails is printed with the end of its output; the others go on. However this function is
    left, no process stays behind.

    Args:
        title: of the progress bar and of messages.
        jobs: in the order in which to start them.
        slots: environment variables for a job; so many jobs run at the same time as there are
            slots. None: all of them, each with a share of the cores.
        program: the training program.
        on_end: called with (job, seconds it has run, whether it is done) when a job ends, and for
            those that were stopped.

    Returns:
        Whether all jobs are done.
    """
    to_run = [job for job in jobs if not job.is_done()]
    if not to_run:
        print(f"{title}: done already")
        return True
    runner = _Runner(to_run, slots or even_slots(len(to_run)), program, on_end)
    try:
        with _progress_bar(title, to_run) as bar:
            is_running = True
            while is_running:
                is_running = runner.step()
                bar.set_postfix_str(f"{runner.num_done} of {len(to_run)} done", refresh=False)
                _show(bar, _amount_done(to_run))
                if is_running:
                    time.sleep(POLL_SECONDS)
    finally:
        runner.stop()
    for job, reason in runner.failed.items():
        print(f"\n{title} failed for {job.name} ({reason})", end="")
        # What was never started has no output.
        end = job.end_of_output() if reason != _NOT_STARTED else []
        print("; the end of its output:" if end else ".", *end, sep="\n")
    return not runner.failed


class _Runner:
    # Starts what may start and collects what has ended, one step at a time.

    def __init__(self, jobs, slots, program, on_end) -> None:
        self.num_done = 0
        self.failed: dict[Job, str] = {}  # with the reason
        self._waiting = list(jobs)
        self._free = list(slots)
        self._running: list[tuple[Job, subprocess.Popen, dict, float]] = []
        self._program = program
        self._on_end = on_end or (lambda job, seconds, is_done: None)

    def step(self) -> bool:
        # Whether there is something left to wait for.
        for entry in list(self._running):
            if entry[1].poll() is not None:
                self._end(entry)
        for job in list(self._waiting):
            if job.after in self.failed:
                self._waiting.remove(job)
                self.failed[job] = _NOT_STARTED
            elif self._free and self._may_start(job):
                self._waiting.remove(job)
                self._start(job, self._free.pop(0))
        if not self._running:
            # They wait for jobs that nobody runs.
            self.failed.update(dict.fromkeys(self._waiting, _NOT_STARTED))
        return bool(self._running)

    def _may_start(self, job: Job) -> bool:
        # What is done may still run: its results are there before its process has ended.
        is_running = any(entry[0] is job.after for entry in self._running)
        return job.after is None or (job.after.is_done() and not is_running)

    def stop(self) -> None:
        for _, process, *_ in self._running:
            _signal(process, signal.SIGTERM)
        for entry in list(self._running):
            try:
                entry[1].wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(entry[1], signal.SIGKILL)
                entry[1].wait()
            self._end(entry)

    def _start(self, job: Job, slot: dict[str, str]) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "output.txt", "w") as log:
            process = subprocess.Popen(  # nosec B603  # A list of arguments, without a shell.
                [sys.executable, str(self._program), *map(str, job.arguments)],
                cwd=REPOSITORY,
                env={**os.environ, **slot},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # With a process group of its own, its workers can be stopped with it.
                start_new_session=True,
            )
        self._running.append((job, process, slot, time.perf_counter()))

    def _end(self, entry) -> None:
        job, process, slot, start = entry
        self._running.remove(entry)
        self._free.append(slot)
        if process.returncode != 0:
            self.failed[job] = f"exit code {process.returncode}"
        elif not job.is_done():
            self.failed[job] = "it ended without results.json"
        else:
            self.num_done += 1
        self._on_end(job, time.perf_counter() - start, job not in self.failed)


def _signal(process: subprocess.Popen, number: int) -> None:
    # The group may have ended by itself.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _progress_bar(title: str, jobs: list[Job]) -> tqdm:
    # Over the iterations of the trainings, or over the jobs if they are all evaluations.
    num_iters = sum(job.num_iters for job in jobs)
    return tqdm(
        total=num_iters or len(jobs),
        initial=_amount_done(jobs),
        desc=title,
        unit="iteration" if num_iters else "job",
        smoothing=0.1,
    )


def _show(bar: tqdm, amount_done: int) -> None:
    # An update by nothing would start the clock of the rate anew: then the 20 iterations that a
    # training reports at a time would seem to be those of the last second.
    if amount_done != bar.n:
        bar.update(amount_done - bar.n)
    else:
        bar.refresh()


def _amount_done(jobs: list[Job]) -> int:
    if any(job.num_iters for job in jobs):
        return sum(min(job.iters_done(), job.num_iters) for job in jobs)
    return sum(job.is_done() for job in jobs)
