"""
Train configs x seeds x sets of seen classes, several at once, and put the results side by side.

DIR then holds
  runs/CONFIG/SET/seed_N/  what a training writes; run.json: settings, command, results
  jobs/                    what the trainings printed
  results.csv, summary.md  all results; their mean and standard deviation over the seeds
  summary.png              AP of unseen classes over several --seen-sets (Fig. 8 of the paper)
  reports/SET/seed_N/      with --report: report.html, analysis.json

Runs that are finished are not repeated, and one that was interrupted goes on from its last
checkpoint: give the same command again. More configs, seeds or sets with the same DIR add to it.

examples:
  two methods, three seeds, on the small dataset of the demo (tsmask demo --data-only writes it):
    tsmask sweep --output-dir output/shapes --seeds 1 2 3 --jobs 2 --num-gpus 0 \\
        --configs configs/shapes/mask_rcnn.yaml configs/shapes/teacher_student_box_fit.yaml

  a line of configs/README.md with changes, in quotes, under a name:
    tsmask sweep --output-dir output/teachers --configs configs/coco/teacher_student.yaml \\
        "deep=configs/coco/teacher_student.yaml MODEL.TEACHER_MASK_HEAD.NUM_CONV 12"

  Fig. 8 of the paper, four runs at a time; TEST.SEEN_CLASSES is the largest set, so that all are
  evaluated on the same unseen classes:
    tsmask sweep --output-dir output/fig8 --seen-sets configs/seen_sets/*.json --jobs 4 \\
        --configs configs/coco/mask_rcnn.yaml configs/coco/teacher_student.yaml \\
        --opts TEST.SEEN_CLASSES configs/seen_sets/seen_70.json

  on Slurm, up to 20 runs at once; everything after --opts changes all configs:
    tsmask sweep --output-dir output/fig8 --cluster slurm --slurm partition=gpu time=1440 \\
        --jobs 20 --num-gpus 8 --configs ... --opts SOLVER.MAX_ITER 5000
"""

import argparse
import signal
from pathlib import Path

from .main import key_and_value

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tsmask sweep``."""
    add = parser.add_argument
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    add("--configs", required=True, nargs="+", metavar="[NAME=]YAML", help="one or more configs")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(default: 1)")
    text = "lists of seen classes, json or text, in the place of DATASETS.SEEN_CLASSES"
    add("--seen-sets", nargs="+", default=[], metavar="LIST", help=text)
    text = "evaluate students and teachers on ground-truth boxes, too, and write a report"
    add("--report", action="store_true", help=text)
    add("--jobs", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")
    add("--num-gpus", type=int, metavar="N", help="of each run; 0 = the CPU (default: 1 if any)")
    add("--cluster", choices=("local", "slurm"), default="local", help="(default: %(default)s)")
    text = "options of sbatch, time in minutes (default: three days)"
    add("--slurm", nargs="+", default=[], type=key_and_value, metavar="KEY=VALUE", help=text)
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="of all configs")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and summarize."""
    import torch

    from ..sweep import plan_sweep, run_sweep, write_summary, write_sweep_report

    num_gpus = min(1, torch.cuda.device_count()) if args.num_gpus is None else args.num_gpus
    runs = plan_sweep(
        args.configs,
        args.output_dir,
        seeds=args.seeds,
        seen_sets=args.seen_sets,
        opts=args.opts,
        num_gpus=num_gpus,
        report=args.report,
    )
    # Both stop the trainings, too. What a shell runs in the background would ignore interrupts, and
    # with it the trainings, which submitit stops by them.
    stops = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(x, signal.default_int_handler) for x in stops]
    try:
        failed = run_sweep(
            runs,
            args.output_dir / "jobs",
            jobs=args.jobs,
            num_gpus=num_gpus,
            cluster=args.cluster,
            cluster_options=dict(args.slurm),
        )
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.")
        raise
    finally:
        for stop, handler in zip(stops, handlers):
            signal.signal(stop, handler)
    print(f"\n{write_summary(args.output_dir)}\n\nResults: {args.output_dir}/summary.md")
    groups: dict[str, dict] = {}
    for x in runs:
        if args.report and x.is_done:
            groups.setdefault(x.name.removeprefix(f"{x.config}/"), {})[x.config] = x
    for folder, group in groups.items():
        print(f"Report: {write_sweep_report(group, args.output_dir / 'reports' / folder)}")
    return 1 if failed else 0
