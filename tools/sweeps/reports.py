"""The analysis of a sweep's models: a report for each set of seen classes and each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

from sweeps.configs import UsageError, folder_name
from sweeps.runs import Run
from sweeps.training_jobs import result_file
from teacher_student_mask import resolve_seen_classes
from teacher_student_mask.analysis import analyze, write_report
from teacher_student_mask.analysis.pseudo_mask_quality import measure_pseudo_masks
from teacher_student_mask.analysis.trained_model import find_test_dataset
from teacher_student_mask.class_splits import AUTO
from teacher_student_mask.data import resolve_auto_settings

__all__ = ["check_reports", "short_names", "write_reports"]

NUM_PICTURES = 60


@dataclass(frozen=True)
class _Truth:
    annotations: str
    image_root: str
    seen_classes: list[str]


def check_reports(runs: Sequence[Run]) -> None:
    """
    Find before the trainings what would make the reports fail after them.

    Raises:
        UsageError: several test datasets, one that is not there, or not the same for all runs of
            a report.
    """
    for group in _groups(runs).values():
        truths = [_truth_of(run.cfg) for run in group]
        for run, truth in zip(group, truths):
            if truth != truths[0]:
                raise UsageError(
                    f"--report: {group[0].name} and {run.name} are tested on other data or other "
                    "seen classes, so no report can compare them. Sweep over them on their own."
                )


def write_reports(output: Path, runs: Sequence[Run]) -> list[Path]:
    """
    Compare the first config's model with the others, by seed and set of seen classes.

    Masks are those of the students, detected and on ground-truth boxes; where there is a teacher,
    the pseudo masks are compared with the truth, by each method.

    Args:
        output: of the sweep; the reports are in reports/SET/seed_N.
        runs: those that are not done are left out.

    Returns:
        Paths of the pages.
    """
    pages = []
    for folder, group in _groups([run for run in runs if run.is_done()]).items():
        names = short_names([Path(run.facts["config"]).stem for run in group])
        truth = _truth_of(group[0].cfg)
        print(f"\nReport on {folder}: {', '.join(names)}", flush=True)
        analysis = analyze(
            truth.annotations,
            {name: result_file(run.training.folder) for name, run in zip(names, group)},
            seen_classes=truth.seen_classes,
            gt_box_results={
                name: result_file(run.gt_boxes["student"].folder) for name, run in zip(names, group)
            },
            pseudo_masks={
                name: measure_pseudo_masks(
                    str(run.training.folder / "config.yaml"),
                    str(run.training.folder / "model_final.pth"),
                )
                for name, run in zip(names, group)
                if "teacher" in run.gt_boxes
            },
            baseline=names[0],
        )
        page = write_report(
            analysis,
            output / "reports" / folder,
            image_root=truth.image_root,
            num_objects=NUM_PICTURES,
        )
        pages.append(page)
    return pages


def short_names(names: Sequence[str]) -> list[str]:
    """
    Leave out the words that all names have, if the names then still differ.

    Args:
        names: words joined by "_", as in names of configs.
    """
    words = [name.split("_") for name in names]
    common = set(words[0]).intersection(*words[1:])
    short = ["_".join(w for w in ws if w not in common) for ws in words]
    is_good = len(names) > 1 and all(short) and len(set(short)) == len(set(names))
    return short if is_good else list(names)


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    # By the part of a run's name that is behind its config, in the order of the command line.
    groups: dict[str, list[Run]] = {}
    for run in runs:
        sets = [folder_name(Path(run.facts["seen_set"]).stem)] if run.facts["seen_set"] else []
        groups.setdefault("/".join([*sets, f"seed_{run.facts['seed']}"]), []).append(run)
    return groups


def _truth_of(cfg: CfgNode) -> _Truth:
    if len(cfg.DATASETS.TEST) != 1:
        raise UsageError(
            f"--report needs one dataset in DATASETS.TEST, got {tuple(cfg.DATASETS.TEST)}."
        )
    try:
        dataset = find_test_dataset(cfg)
        cfg = resolve_auto_settings(cfg, needs_seen_classes=cfg.TEST.SEEN_CLASSES in ("", AUTO))
        spec = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
        seen = [dataset.classes[i] for i in resolve_seen_classes(spec, dataset.classes)]
    except ValueError as error:
        raise UsageError(f"--report: {error}") from error
    return _Truth(dataset.annotations, dataset.image_root, seen)
