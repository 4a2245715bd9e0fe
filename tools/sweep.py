#!/usr/bin/env python
"""Train configs x seeds x sets of seen classes, and put the results side by side. See --help."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from sweeps.configs import UsageError
from sweeps.records import (
    append_row,
    check_settings,
    finished_row,
    has_all_evaluations,
    read_rows,
    record_seconds,
    record_start,
)
from sweeps.reports import check_reports, write_reports
from sweeps.runs import Run, plan_runs
from sweeps.summary import draw_summary, write_summary
from sweeps.training_jobs import TRAIN_PROGRAM, Job, run_jobs, threads_per_job

DESCRIPTION = """
Trains every config with every seed, and with every set of seen classes if some are given, several
at once. DIR then holds
  runs/CONFIG/SET/seed_N/  what train_net.py writes; output.txt, what it printed; run.json
  results.jsonl            one line per finished run: config, seed, seen classes, the results of all
                           tasks, seconds, commit, versions, command, hardware. If a run is in it
                           twice, the later line counts
  summary.md               mean and standard deviation over the seeds
  summary.png              AP of unseen classes over the number of seen classes (Fig. 8 of the
                           paper); without --seen-sets, bars of all configs
  reports/SET/seed_N/      with --report: report.html, analysis.json, tables
With several sets the unseen classes are others at each of them. So each model is also evaluated on
the classes that are unseen in all sets, which can be compared.
With --report students and teachers are also evaluated on ground-truth boxes, which leaves out what
the detector does, and tools/analyze.py's report compares the first config with each other one.

Runs that are finished are not repeated, and one that was interrupted goes on from its last
checkpoint: give the same command again. More configs, seeds or sets with the same DIR add to it.
"""

EXAMPLES = """
examples:
  two methods, three seeds, on the small dataset of the demo (tools/make_shapes.py writes it):
    %(prog)s --output-dir output/shapes --seeds 1 2 3 --jobs 2 --num-gpus 0 --configs \\
        configs/shapes/mask_rcnn.yaml configs/shapes/teacher_student_box_fit.yaml

  all methods on that dataset, with the analysis:
    %(prog)s --report --output-dir output/shapes --seeds 1 2 --jobs 2 --num-gpus 0 \\
        --configs configs/shapes/*_shapes*.yaml

  Fig. 8 of the paper, a GPU for each of four runs at a time:
    %(prog)s --output-dir output/fig8 --seen-sets configs/seen_sets/*.json --jobs 4 --configs \\
        configs/coco/mask_rcnn.yaml \\
        configs/coco/teacher_student.yaml

  any config key, at the end:
    %(prog)s --output-dir ... --configs ... --opts SOLVER.MAX_ITER 5000 SOLVER.STEPS "(4000,)"

  the results in Python:
    rows = [json.loads(line) for line in open("output/fig8/results.jsonl")]
    rows[0]["config"], rows[0]["seed"], rows[0]["results"]["segm_unseen"]["AP"]

exit code: 0; 1 if a run failed (the end of its output is printed, the others are done); 2 if
nothing could be started; 130 if it was interrupted.
"""


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    add("--configs", required=True, nargs="+", metavar="YAML", help="one or more configs")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(default: 1)")
    add(
        "--seen-sets",
        nargs="+",
        default=[],
        metavar="LIST",
        help="lists of seen classes, json or text, in the place of the configs' "
        "DATASETS.SEEN_CLASSES",
    )
    add("--report", action="store_true", help="evaluate on ground-truth boxes, too, and analyse")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once (default: %(default)s), each with OMP_NUM_THREADS threads, or, where "
        "that is not set, with its share of the cores",
    )
    add(
        "--num-gpus",
        type=int,
        default=None,
        metavar="N",
        help="GPUs of each run; 0 = the CPU (default: 1, or 0 where there is none). Runs share "
        "GPUs if there are too few",
    )
    add(
        "--train-program",
        type=Path,
        default=TRAIN_PROGRAM,
        metavar="PY",
        help="a program with the arguments of train_net.py, which is the default",
    )
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to all configs; everything after --opts belongs to it",
    )
    return parser, parser.parse_args(argv)


def check_numbers(args: argparse.Namespace) -> None:
    """
    Fill in the default number of GPUs.

    Raises:
        UsageError: a number that makes no sense here.
    """
    available = torch.cuda.device_count()
    if args.num_gpus is None:
        args.num_gpus = min(1, available)
    if args.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {args.jobs}.")
    if not 0 <= args.num_gpus <= available:
        raise UsageError(
            f"--num-gpus must be from 0 to the number of GPUs here, {available}; got "
            f"{args.num_gpus}."
        )
    if min(args.seeds) < 0:
        raise UsageError(f"--seeds must not be negative, which means random; got {args.seeds}.")
    if not args.train_program.is_file():
        raise UsageError(f"--train-program {args.train_program}: no such file.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Make the folder and keep other sweeps out of it.

    Raises:
        UsageError: the folder cannot be made, or another sweep runs in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UsageError(f"Cannot write to --output-dir {folder}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"Another sweep is running in {folder}.") from None
        yield


def make_slots(num_slots: int, num_gpus: int) -> list[dict[str, str]]:
    """
    The environment variables of each of the runs at one time: threads, and which GPUs.

    Args:
        num_slots: runs at one time.
        num_gpus: of each; the runs share GPUs if there are too few.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    slots = []
    for k in range(num_slots):
        slots.append({"OMP_NUM_THREADS": str(threads_per_job(num_slots))})
        if num_gpus:
            chosen = [gpus[(k * num_gpus + i) % len(gpus)] for i in range(num_gpus)]
            slots[k]["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return slots


def run_sweep(args: argparse.Namespace, runs: list[Run]) -> bool:
    """Train what is not done, and write results and summary; return whether all is done."""
    results_file = args.output_dir / "results.jsonl"
    rows = read_rows(results_file)
    to_run = [run for run in runs if not run.is_done()]
    slots = make_slots(max(1, min(args.jobs, len(to_run))), args.num_gpus)
    runs_by_job = {job: run for run in runs for job in run.jobs}
    to_end = {run: {job for job in run.jobs if not job.is_done()} for run in runs}

    def add_row(run: Run) -> None:
        rows.pop(run.name, None)
        rows[run.name] = append_row(results_file, finished_row(run))

    def on_end(job: Job, seconds: float, is_done: bool) -> None:
        run = runs_by_job[job]
        if job is run.training:
            record_seconds(run, seconds)
        to_end[run].discard(job)
        # Results may be there while a process of the run has not ended: one line, after the last.
        if not to_end[run] and run.is_done():
            add_row(run)

    for run in runs:
        if run in to_run:
            hardware = {"threads": int(slots[0]["OMP_NUM_THREADS"]), "runs_at_once": len(slots)}
            record_start(run, {**hardware, "gpus_per_run": args.num_gpus})
        elif run.name not in rows or not has_all_evaluations(rows[run.name], run):
            add_row(run)
    all_done = run_jobs("Sweep", list(runs_by_job), slots, args.train_program, on_end)
    if rows:
        missing = [run.name for run in runs if not run.is_done()]
        print("\n" + write_summary(args.output_dir / "summary.md", list(rows.values()), missing))
        draw_summary(args.output_dir / "summary.png", list(rows.values()))
        print(f"Results: {results_file}, and summary.md and summary.png beside it")
    if args.report:
        for page in write_reports(args.output_dir, runs):
            print(f"Report, to be opened in a browser: {page}")
    return all_done


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    # As from the keyboard: the trainings are stopped, too.
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check_numbers(args)
        runs = plan_runs(args)
        with locked(args.output_dir):
            check_settings(runs)
            if args.report:
                check_reports(runs)
            return 0 if run_sweep(args, runs) else 1
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    sys.exit(main())
