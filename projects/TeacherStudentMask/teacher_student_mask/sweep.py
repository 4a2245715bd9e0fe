"""
Many trainings, configs x seeds x sets of seen classes, several at once, and their results.

:func:`plan_sweep` finds what is wrong before anything runs, :func:`run_sweep` trains and evaluates
what is not done yet, :func:`write_summary` and :func:`write_sweep_report` compare. The jobs are
submitit's: processes of this machine, or of a Slurm cluster.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .coco_json import write_json
from .errors import InputError, require

# Each job imports this module again, so what takes long to import is imported where it is needed.
if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Run",
    "plan_sweep",
    "refuse_other_changes",
    "run_sweep",
    "write_summary",
    "write_sweep_report",
]

logger = logging.getLogger(__name__)

TRAIN_COMMAND = (sys.executable, "-m", "teacher_student_mask", "train")
POLL_SECONDS = 1.0
# The evaluation that ends the training, and those on ground-truth boxes.
DETECTIONS, STUDENT, TEACHER = "detections", "gt_boxes_student", "gt_boxes_teacher"
# What Detectron2 writes into the folder of each.
RESULTS = "inference/coco_instances_results.json"
# Column of the summary -> (task, metric) of results.json.
COLUMNS = {
    "box AP": ("bbox", "AP"),
    "mask AP": ("segm", "AP"),
    "seen AP": ("segm_seen", "AP"),
    "unseen AP": ("segm_unseen", "AP"),
    "unseen AP50": ("segm_unseen", "AP50"),
    "overlapped unseen AP": ("segm_unseen_overlap", "AP"),
}


@dataclass(frozen=True)
class Run:
    """
    One training and the evaluations of its model.

    Args:
        name: of the run.
        folder: OUTPUT_DIR of the training; an evaluation writes to a folder in it.
        config: label of what it trains, the same for all seeds and sets.
        opts: KEY, VALUE, ... of the config, without what the sweep sets.
        seed: of the training.
        seen_set: name of the set of seen classes; None = the config's own.
        arguments: of ``tsmask train``, without OUTPUT_DIR.
        evaluations: {name: KEY, VALUE, ...} of the evaluations beside the training's own.
    """

    name: str
    folder: Path
    config: str
    opts: list[str]
    seed: int
    seen_set: str | None
    arguments: list[str]
    evaluations: dict[str, list[str]]

    @property
    def record(self) -> dict:
        """What run.json says of it; {} before it was started."""
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def is_done(self) -> bool:
        """Whether all its results are there."""
        return {DETECTIONS, *self.evaluations} <= set(self.record.get("results", ()))


def plan_sweep(
    configs: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    seeds: Sequence[int] = (1,),
    seen_sets: Sequence[str] = (),
    opts: Sequence[str] = (),
    num_gpus: int = 0,
    report: bool = False,
) -> list[Run]:
    """
    Build the runs, those with the first seed first, and check them.

    Args:
        configs: paths of yamls, or ``"[NAME=]YAML KEY VALUE ..."`` with changes to one of them.
        output_dir: the runs get the folders ``runs/CONFIG/SET/seed_N`` in it.
        seeds: values of SEED.
        seen_sets: paths of lists, json or text, in the place of ``DATASETS.SEEN_CLASSES``.
        opts: KEY, VALUE, ... for all configs.
        num_gpus: of each run; 0 = the CPU.
        report: evaluate students and teachers on ground-truth boxes, as a report needs it.

    Raises:
        InputError: a config, a list or a change is missing, wrong or there twice, or a config is
            there with other changes.
    """
    from .trained_model import load_config

    require("sweep", "pandas", "submitit")
    if report:
        require("report", "jinja2", "plotly")
    opts = [str(x) for x in opts]
    device = ["MODEL.DEVICE", "cuda" if num_gpus else "cpu"]
    runs: dict[Path, Run] = {}
    tests = set()
    for seed, seen_path, text in itertools.product(seeds, seen_sets or [None], configs):
        try:
            path, *own = [text] if os.path.isfile(text) else shlex.split(text)
        except ValueError as error:  # a quotation that does not end; nothing at all
            raise InputError(f"--configs {text!r}: {error}.") from error
        # Folder and stem, because configs of several datasets have the same stem.
        has_label = "=" in path and not os.path.isfile(path)
        label, path = path.split("=", 1) if has_label else (None, path)
        label = label or "/".join(Path(path).resolve().with_suffix("").parts[-2:])
        label = re.sub(r"[^\w./-]|\.\.", "_", label)
        cfg = load_config(path, [*device, *own, *opts])
        if len(cfg.DATASETS.TEST) != 1:
            raise InputError(f"{label}: DATASETS.TEST is {cfg.DATASETS.TEST}; allowed: one.")
        arguments = ["--resume", "--config-file", str(Path(path).resolve()), *device, *own, *opts]
        if num_gpus > 1:
            arguments = ["--num-gpus", str(num_gpus), "--dist-url", "auto", *arguments]
        seen_set = seen_path and Path(seen_path).stem
        if seen_path:
            if not os.path.isfile(seen_path):
                raise InputError(f"The list of seen classes {seen_path} does not exist.")
            arguments += ["DATASETS.SEEN_CLASSES", str(Path(seen_path).resolve())]
        names = (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME)
        has_teacher = any(x.startswith("TeacherStudent") for x in names)
        heads = {STUDENT: "student", **({TEACHER: "teacher"} if has_teacher else {})}
        parts = [label, *([seen_set] if seen_set else []), f"seed_{seed}"]
        run = Run(
            name="/".join(parts),
            folder=Path(output_dir, "runs", *parts).resolve(),
            config=label,
            opts=[*own, *opts],
            seed=seed,
            seen_set=seen_set,
            arguments=[*arguments, "SEED", str(seed)],
            evaluations={
                name: ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", head]
                for name, head in heads.items()
                if report
            },
        )
        if run.folder in runs:
            raise InputError(f"Two runs are named {run.name}; NAME=YAML gives a config a name.")
        refuse_other_changes(run)
        runs[run.folder] = run
        tests.add(cfg.DATASETS.TEST)
        if report and len(tests) > 1:
            raise InputError("A report compares models on one DATASETS.TEST.")
    return list(runs.values())


def refuse_other_changes(run: Run) -> None:
    """Raise an InputError if the folder of a run has one with other changes to its config."""
    earlier = run.record.get("opts", run.opts)
    if earlier != run.opts:
        changes = " ".join(earlier) or "none"
        raise InputError(f"{run.folder} has a run with other changes, {changes}; remove it.")


def run_sweep(
    runs: Sequence[Run],
    log_dir: str | os.PathLike,
    *,
    jobs: int = 1,
    num_gpus: int = 0,
    cluster: str = "local",
    cluster_options: Mapping[str, str] | None = None,
) -> list[Run]:
    """
    Train and evaluate what is not done; a run that was interrupted goes on from its checkpoint.

    A run that fails is logged with the end of its output; the others go on. On this machine no
    process stays behind, however this function is left.

    Args:
        runs: in the order in which to start them.
        log_dir: folder for submitit's files, the output of the jobs among them.
        jobs: runs at once. On this machine each has OMP_NUM_THREADS threads or, where that is not
            set, its share of the cores; runs share GPUs if there are too few.
        num_gpus: of each run.
        cluster: "local" or "slurm".
        cluster_options: of ``sbatch``, such as {"partition": "gpu", "time": "600"}.

    Returns:
        The runs that failed.
    """
    import submitit

    executor = submitit.AutoExecutor(log_dir, cluster=cluster)
    # Three days on a cluster, where "time" does not say otherwise.
    timeout = 4320 if cluster == "slurm" else 60 * 24 * 365
    slurm = {f"slurm_{key}": value for key, value in (cluster_options or {}).items()}
    executor.update_parameters(
        timeout_min=timeout, gpus_per_node=num_gpus, stderr_to_stdout=True, **slurm
    )
    waiting, running, failed = [run for run in runs if not run.is_done], {}, []
    jobs = max(1, min(jobs, len(waiting)))
    try:
        while waiting or running:
            for slot in set(range(jobs)) - set(running):
                if waiting:
                    run = waiting.pop(0)
                    environment = _environment(slot, jobs, num_gpus) if cluster == "local" else {}
                    running[slot] = run, executor.submit(_run_job, run, TRAIN_COMMAND, environment)
                    logger.info(f"{run.name}: started; {len(waiting)} runs are waiting")
            time.sleep(POLL_SECONDS)
            for slot, (run, job) in list(running.items()):
                if job.done():
                    del running[slot]
                    if run.is_done:
                        logger.info(f"{run.name}: done")
                        continue
                    failed.append(run)
                    lines = "\n".join((job.stdout() or "").splitlines()[-15:])
                    logger.error(f"{run.name}: failed; the end of its output:\n{lines}")
    finally:
        for _, job in running.values():
            job.cancel(check=False)
        while cluster == "local" and not all(job.done() for _, job in running.values()):
            time.sleep(0.1)
    return failed


def _environment(slot: int, num_slots: int, num_gpus: int) -> dict[str, str]:
    # One thread too many makes small models slower than one too few.
    threads = max(1, (os.cpu_count() or 1) // num_slots)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if num_gpus:
        import torch

        every = ",".join(map(str, range(torch.cuda.device_count())))
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
        chosen = [gpus[(slot * num_gpus + i) % len(gpus)] for i in range(num_gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment


def _run_job(run: Run, command: Sequence[str], environment: dict[str, str]) -> None:
    """In a process of its own: train, evaluate, and add the results to run.json after each."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "run.json"
    facts = dataclasses.asdict(run) | {"folder": str(run.folder)}
    record = {**facts, "results": {}, **run.record}

    def call(name: str, folder: Path, arguments: Sequence[str], results_file: str) -> None:
        if name in record["results"]:
            return
        # Ended with this process: subprocess.run does so when an interrupt comes.
        ended = subprocess.run(  # nosec B603  # A list of arguments, without a shell.
            [*command, *arguments, "OUTPUT_DIR", str(folder)], env={**os.environ, **environment}
        )
        if ended.returncode:
            sys.exit(ended.returncode)
        # NaN is not json, although Python writes it.
        text = (folder / results_file).read_text()
        record["results"][name] = json.loads(text, parse_constant=lambda _: None)
        write_json(path, record)

    write_json(path, record)
    call(DETECTIONS, run.folder, run.arguments, "results.json")
    model = ["--eval-only", "--config-file", str(run.folder / "config.yaml")]
    model += ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
    for name, opts in run.evaluations.items():
        call(name, run.folder / name, [*model, *opts], "inference/results.json")


def write_summary(output_dir: str | os.PathLike) -> str:
    """
    Write results.csv, summary.md and, for several sets of seen classes, summary.png.

    Args:
        output_dir: of the sweep; all runs in it count, not the last call's alone.

    Returns:
        The table, in Markdown.
    """
    import pandas as pd

    output = Path(output_dir)
    records = [json.loads(path.read_text()) for path in sorted(output.glob("**/run.json"))]
    rows = []
    for record in records:
        row = {"seed": record["seed"], "seen_set": record["seen_set"] or "-"}
        for evaluation, found in record.get("results", {}).items():
            # "segm_unseen/filled_box": the yardsticks beside masks on ground-truth boxes.
            yardsticks = {task.partition("/")[2] for task in found} - {""}
            systems = [("", evaluation, record["config"])]
            systems += [(f"/{x}", "gt_boxes", x.replace("_", " ")) for x in sorted(yardsticks)]
            for end, name, config in systems:
                aps = {k: found.get(f"{t}{end}", {}).get(m) for k, (t, m) in COLUMNS.items()}
                rows.append({"evaluation": name, "config": config, **row, **aps})
    if not rows:
        return "No run has finished."
    # All runs have the same yardsticks.
    results = pd.DataFrame(rows).astype(dict.fromkeys(COLUMNS, float)).drop_duplicates()
    results.to_csv(output / "results.csv", index=False)
    groups = results.groupby(["evaluation", "config", "seen_set"])
    cells = groups[list(COLUMNS)].agg(_mean_and_deviation)
    cells.insert(0, "seeds", groups.size())
    text = (
        "COCO AP in percent, mean ± standard deviation (of the sample) over the seeds, of the "
        "detections; gt_boxes: of masks on the ground-truth boxes and classes.\n\n"
        + cells.reset_index().to_markdown(index=False, disable_numparse=True)
    )
    (output / "summary.md").write_text(text + "\n", encoding="utf-8")
    if results["seen_set"].nunique() > 1:
        # Fig. 8 of the paper.
        detected = results[results["evaluation"] == DETECTIONS]
        aps = detected.groupby(["seen_set", "config"])["unseen AP"]
        errors = aps.std().unstack().fillna(0)
        ax = aps.mean().unstack().plot(yerr=errors, marker="o", ylabel="unseen AP")
        ax.figure.savefig(output / "summary.png", dpi=150)
    return text


def _mean_and_deviation(values: pd.Series) -> str:
    if values.isna().any():
        return "-"
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def write_sweep_report(runs: Mapping[str, Run], output_dir: str | os.PathLike) -> Path:
    """
    Write the report on the models of some runs, the first of which is the baseline.

    Args:
        runs: {name in the report: run that is done}, planned with ``report``.
        output_dir: of the report.

    Returns:
        The path of the page.
    """
    from .analysis import analyze, write_report
    from .analysis.pseudo_mask_quality import measure_pseudo_masks
    from .trained_model import find_test_dataset, load_config, load_model

    on_gt_boxes, quality = {}, {}
    for name, run in runs.items():
        on_gt_boxes[name] = str(run.folder / STUDENT / RESULTS)
        if TEACHER in run.evaluations:
            on_gt_boxes[f"{name}, teacher"] = str(run.folder / TEACHER / RESULTS)
            quality[name] = measure_pseudo_masks(load_model(run.folder))
    baseline = next(iter(runs))
    cfg = load_config(str(runs[baseline].folder / "config.yaml"))
    annotations, image_root = find_test_dataset(cfg)
    analysis = analyze(
        annotations,
        {name: str(run.folder / RESULTS) for name, run in runs.items()},
        seen_classes=cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES,
        gt_box_results=on_gt_boxes,
        pseudo_masks=quality,
        baseline=baseline,
    )
    return write_report(analysis, output_dir, image_root=image_root, num_objects=60)
