"""The runs of a sweep: configs x sets of seen classes x seeds."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from sweeps.configs import (
    UsageError,
    common_classes,
    config_name,
    count_seen_classes,
    flatten,
    folder_name,
    load_config,
    seen_classes_value,
    seen_ids,
)
from sweeps.training_jobs import Job, evaluation_job, gt_boxes_job, path_for_child

__all__ = ["AlwaysUnseen", "Run", "plan_runs"]


@dataclass(frozen=True)
class AlwaysUnseen:
    """
    The classes that none of several sets has.

    Args:
        classes: their names.
        others: the names of all other classes.
        key: of letters and digits; other sets have another one.
    """

    classes: list[str]
    others: list[str]

    @property
    def key(self) -> str:
        return hashlib.sha256("\n".join(self.others).encode()).hexdigest()[:8]


@dataclass(frozen=True, eq=False)
class Run:
    """
    One training, and what belongs to it.

    Args:
        name: also its folder below OUTPUT/runs.
        facts: what its line of results.jsonl says of what was run.
        cfg: its config.
        training: the job.
        always_unseen: None if there are not several sets.
        evaluation: of the model on these classes; None if the training's own does it.
        gt_boxes: {head: evaluation of its masks on the ground-truth boxes}; empty without a report.
    """

    name: str
    facts: dict
    cfg: CfgNode
    training: Job
    always_unseen: AlwaysUnseen | None = None
    evaluation: Job | None = None
    gt_boxes: dict[str, Job] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> dict:
        """{key: value} of its config, in plain Python types."""
        return flatten(self.cfg)

    @property
    def jobs(self) -> list[Job]:
        """In the order in which they run."""
        evaluations = [self.evaluation] if self.evaluation else []
        return [self.training, *evaluations, *self.gt_boxes.values()]

    def is_done(self) -> bool:
        """Whether all its results are there."""
        return all(job.is_done() for job in self.jobs)


def plan_runs(args: argparse.Namespace) -> list[Run]:
    """
    Build the runs, those with the first seed first.

    Args:
        args: of the command line.

    Raises:
        UsageError: a config, a list or an override that is missing or wrong.
    """
    configs = {x: load_config(x, args.opts, bool(args.seen_sets)) for x in args.configs}
    _check_distinct("--configs", args.configs, [config_name(x) for x in args.configs])
    _check_distinct(
        "--seen-sets", args.seen_sets, [folder_name(Path(x).stem) for x in args.seen_sets]
    )
    _check_distinct("--seeds", args.seeds, args.seeds)
    classes = common_classes(configs) if args.seen_sets else []
    ids_by_set = {path: seen_ids(path, classes) for path in args.seen_sets}
    always_unseen = _find_always_unseen(list(ids_by_set.values()), classes)
    runs = []
    for seed in args.seeds:
        for seen_set in args.seen_sets or [None]:
            for path, cfg in configs.items():
                run = _make_run(args, path, cfg, seen_set, seed, classes)
                if always_unseen is not None:
                    seen = [classes[i] for i in ids_by_set[seen_set]]
                    run = _with_always_unseen(run, always_unseen, seen, args.output_dir)
                runs.append(run)
    return runs


def _check_distinct(option: str, given: Sequence, names: Sequence) -> None:
    repeated = [str(x) for x, name in zip(given, names) if names.count(name) > 1]
    if repeated:
        raise UsageError(
            f"{option}: {' and '.join(repeated)} would have the same name in the results."
        )


def _find_always_unseen(sets: list[list[int]], classes: list[str]) -> AlwaysUnseen | None:
    seen = set().union(*sets)
    if len(sets) < 2 or len(seen) == len(classes):
        return None
    return AlwaysUnseen(
        [name for i, name in enumerate(classes) if i not in seen],
        [name for i, name in enumerate(classes) if i in seen],
    )


def _make_run(
    args: argparse.Namespace,
    config: str,
    cfg: CfgNode,
    seen_set: str | None,
    seed: int,
    classes: list[str],
) -> Run:
    sets = [folder_name(Path(seen_set).stem)] if seen_set else []
    name = "/".join([config_name(config), *sets, f"seed_{seed}"])
    folder = args.output_dir / "runs" / name
    changes = []
    if seen_set:
        changes += ["DATASETS.SEEN_CLASSES", seen_classes_value(cfg, seen_set, classes)]
    if "MODEL.DEVICE" not in args.opts[::2]:
        changes += ["MODEL.DEVICE", "cuda" if args.num_gpus else "cpu"]
    cfg = cfg.clone()
    cfg.merge_from_list(changes)

    arguments = ["--resume", "--config-file", path_for_child(config), *args.opts, *changes]
    arguments += ["SEED", seed, "OUTPUT_DIR", path_for_child(folder)]
    if args.num_gpus > 1:
        arguments = ["--num-gpus", args.num_gpus, "--dist-url", "auto", *arguments]
    program = ["python", path_for_child(args.train_program)]
    facts = {
        "run": name,
        "config": path_for_child(config),
        "seed": seed,
        "seen_set": seen_set and path_for_child(seen_set),
        "num_seen_classes": count_seen_classes(cfg),
        "opts": args.opts,
        "command": shlex.join([*program, *map(str, arguments)]),
    }
    training = Job(name, folder, arguments, _num_iters(config, cfg, args.num_gpus))
    gt_boxes = {}
    if args.report:
        has_teacher = cfg.MODEL.ROI_HEADS.NAME == "TeacherStudentROIHeads"
        heads = ["student", "teacher"] if has_teacher else ["student"]
        gt_boxes = {head: gt_boxes_job(name, folder, head, after=training) for head in heads}
    return Run(name, facts, cfg, training, gt_boxes=gt_boxes)


def _with_always_unseen(
    run: Run, always_unseen: AlwaysUnseen, seen: list[str], output: Path
) -> Run:
    run = dataclasses.replace(run, always_unseen=always_unseen)
    if set(seen) == set(always_unseen.others):
        return run
    model = run.training.folder
    folder = model / f"always_unseen_{always_unseen.key}"
    options = ["TEST.SEEN_CLASSES", path_for_child(folder / "seen_classes.json")]
    name = f"{run.name}, on the classes unseen in all sets"
    job = evaluation_job(name, model, folder, options, after=run.training)
    return dataclasses.replace(run, evaluation=job)


def _num_iters(config: str, cfg: CfgNode, num_gpus: int) -> int:
    # As the trainer will scale them.
    try:
        scaled = DefaultTrainer.auto_scale_workers(cfg, max(1, num_gpus))
    except AssertionError as error:
        raise UsageError(f"{config}: SOLVER.REFERENCE_WORLD_SIZE: {error}") from error
    return scaled.SOLVER.MAX_ITER
