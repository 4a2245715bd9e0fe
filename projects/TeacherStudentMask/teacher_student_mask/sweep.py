"""
Many trainings, configs x seeds x sets of seen classes, several at once, and their results.

:func:`plan_sweep` finds what is wrong before anything runs, :func:`run_sweep` trains and evaluates
what is not done yet, :func:`write_summary` and :func:`write_sweep_report` compare. The jobs are
submitit's: processes of this machine, or of a Slurm cluster.
"""

from __future__ import annotations

import hashlib
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .class_splits import resolve_seen_classes
from .errors import InputError

# Each job imports this module again, so what takes long to import is imported where it is needed.
if TYPE_CHECKING:
    import pandas as pd
    from detectron2.config import CfgNode

__all__ = ["Run", "plan_sweep", "run_sweep", "write_summary", "write_sweep_report"]

logger = logging.getLogger(__name__)

TRAIN_COMMAND = (sys.executable, "-m", "teacher_student_mask", "train")
POLL_SECONDS = 1.0
# Evaluations: the one that ends the training, and others by these names.
DETECTIONS, ALWAYS_UNSEEN, ON_GT_BOXES = "detections", "always_unseen", "gt_boxes_{head}"
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
        num_seen_classes: of the set; None without one.
        arguments: of ``tsmask train``, without OUTPUT_DIR.
        evaluations: {name: KEY, VALUE, ...} of the evaluations beside the training's own.
    """

    name: str
    folder: Path
    config: str
    opts: list[str]
    seed: int
    seen_set: str | None
    num_seen_classes: int | None
    arguments: list[str]
    evaluations: dict[str, list[str]] = field(default_factory=dict)

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

    With several sets the unseen classes are others at each of them; each model is then evaluated on
    the classes that are unseen in all sets, too.

    Args:
        configs: paths of yamls, or ``"[NAME=]YAML KEY VALUE ..."`` with changes to one of them.
        output_dir: the runs get the folders ``runs/CONFIG/SET/seed_N`` in it.
        seeds: values of SEED.
        seen_sets: paths of lists, json or text, in the place of ``DATASETS.SEEN_CLASSES``.
        opts: KEY, VALUE, ... for all configs.
        num_gpus: of each run; 0 = the CPU.
        report: evaluate students and teachers on ground-truth boxes, as a report needs it.

    Raises:
        InputError: a config, a list, a change or a seed is missing, wrong or there twice, or a
            config is there with other changes.
    """
    from .trained_model import load_config

    entries = [_parse_config(text) for text in configs]
    labels, set_names = [label for label, *_ in entries], [Path(x).stem for x in seen_sets]
    for what, names in ("configs", labels), ("seeds", list(seeds)), ("seen sets", set_names):
        if len(set(names)) < len(names):
            raise InputError(f"Several {what} have the same name, of {', '.join(map(str, names))}.")
    for key in {"SEED", "OUTPUT_DIR", *(["DATASETS.SEEN_CLASSES"] if seen_sets else [])}:
        if key in opts[::2]:
            raise InputError(f"{key} cannot be changed: the sweep sets it for each run.")
    opts = [str(x) for x in opts]
    device = ["MODEL.DEVICE", "cuda" if num_gpus else "cpu"]
    cfgs = [load_config(path, [*device, *own, *opts]) for _, path, own in entries]
    _check_configs(dict(zip(labels, cfgs)), bool(seen_sets), bool(report or seen_sets))
    seen_names: dict[str | None, list[str]] = {}
    for name, path in zip(set_names, seen_sets):
        if not os.path.isfile(path):
            raise InputError(f"The list of seen classes {path} does not exist.")
        classes = _class_names(cfgs[0])
        seen_names[name] = [classes[i] for i in resolve_seen_classes(path, classes)]
    ever_seen = ",".join(sorted(set().union(*seen_names.values())))
    always_unseen = {}
    if len(seen_names) > 1 and set(ever_seen.split(",")) != set(_class_names(cfgs[0])):
        # Other sets, other results: they have another name.
        key = hashlib.sha256(ever_seen.encode()).hexdigest()[:8]
        always_unseen = {f"{ALWAYS_UNSEEN}_{key}": ["TEST.SEEN_CLASSES", ever_seen]}

    runs = []
    for seed, seen_set, k in itertools.product(seeds, set_names or [None], range(len(entries))):
        (label, path, own), cfg = entries[k], cfgs[k]
        parts = [label, *([seen_set] if seen_set else []), f"seed_{seed}"]
        arguments = ["--resume", "--config-file", str(Path(path).resolve()), *device, *own, *opts]
        if num_gpus > 1:
            arguments = ["--num-gpus", str(num_gpus), "--dist-url", "auto", *arguments]
        if seen_set:
            seen_path = Path(seen_sets[set_names.index(seen_set)]).resolve()
            arguments += ["DATASETS.SEEN_CLASSES", str(seen_path)]
        has_teacher = cfg.MODEL.ROI_HEADS.NAME == "TeacherStudentROIHeads"
        heads = ("student", "teacher") if has_teacher else ("student",)
        on_gt_boxes = {
            ON_GT_BOXES.format(head=x): ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", x]
            for x in heads
        }
        run = Run(
            name="/".join(parts),
            folder=Path(output_dir, "runs", *parts).resolve(),
            config=label,
            opts=[*own, *opts],
            seed=seed,
            seen_set=seen_set,
            num_seen_classes=len(seen_names[seen_set]) if seen_set else None,
            arguments=[*arguments, "SEED", str(seed)],
            evaluations=always_unseen | (on_gt_boxes if report else {}),
        )
        earlier = run.record.get("opts", run.opts)
        if earlier != run.opts:
            raise InputError(
                f"{run.folder} was run with other changes, {' '.join(earlier) or 'none'}. Choose "
                "another output folder, or remove that one."
            )
        runs.append(run)
    return runs


def _check_configs(cfgs: dict[str, CfgNode], has_sets: bool, are_compared: bool) -> None:
    first, first_cfg = next(iter(cfgs.items()))
    for label, cfg in cfgs.items():
        if not cfg.DATASETS.TEST:
            raise InputError(f"{label}: DATASETS.TEST is empty, so there would be no results.")
        if are_compared and cfg.DATASETS.TEST != first_cfg.DATASETS.TEST:
            raise InputError(f"{label} is tested on other data than {first}.")
        if has_sets and cfg.TEST.SEEN_CLASSES:
            raise InputError(
                f"{label} sets TEST.SEEN_CLASSES, as the oracle does, so it cannot be compared "
                "over sets of seen classes. Sweep over it on its own."
            )


def _parse_config(text: str) -> tuple[str, str, list[str]]:
    """Label, path and changes of "[NAME=]YAML KEY VALUE ..."."""
    path, *opts = shlex.split(text)
    label, has_label, rest = path.partition("=")
    if has_label:
        path = rest
    else:
        # Folder and stem, because configs of several datasets have the same stem.
        parts = Path(path).resolve().with_suffix("").parts[-2:]
        changes = [f"{key.split('.')[-1]}_{value}" for key, value in zip(opts[::2], opts[1::2])]
        label = "_".join(["/".join(parts), *changes])
    return re.sub(r"[^\w./-]|\.\.", "_", label), path, opts


def _class_names(cfg: CfgNode) -> list[str]:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    name = cfg.DATASETS.TRAIN[0]
    if not MetadataCatalog.get(name).get("thing_classes"):
        DatasetCatalog.get(name)  # the names of many are known when their json has been read
    return list(MetadataCatalog.get(name).thing_classes)


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
                    run.folder.mkdir(parents=True, exist_ok=True)
                    _write_json(run.folder / "run.json", {**_facts(run), **run.record})
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


def _run_job(run: Run, command: Sequence[str], environment: dict[str, str]) -> None:
    """In a process of its own: train, evaluate, and add the results to run.json after each."""

    def call(folder: Path, arguments: Sequence[str], results_file: str) -> dict:
        # Ended with this process: subprocess.run does so when an interrupt comes.
        ended = subprocess.run(  # nosec B603  # A list of arguments, without a shell.
            [*command, *arguments, "OUTPUT_DIR", str(folder)], env={**os.environ, **environment}
        )
        if ended.returncode:
            sys.exit(ended.returncode)
        # NaN is not json, although Python writes it.
        text = (folder / results_file).read_text()
        results = json.loads(text, parse_constant=lambda _: None)
        # Of the first of several test datasets.
        return results if {"bbox", "segm"} & set(results) else next(iter(results.values()))

    path, record = run.folder / "run.json", run.record
    results = record.setdefault("results", {})
    if DETECTIONS not in results:
        start = time.perf_counter()
        results[DETECTIONS] = call(run.folder, run.arguments, "results.json")
        record["seconds"] = round(time.perf_counter() - start, 1)
        _write_json(path, record)
    model = ["--eval-only", "--config-file", str(run.folder / "config.yaml")]
    model += ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
    for name, opts in run.evaluations.items():
        if name not in results:
            results[name] = call(run.folder / name, [*model, *opts], "inference/results.json")
            _write_json(path, record)


def _environment(slot: int, num_slots: int, num_gpus: int) -> dict[str, str]:
    # One thread too many makes small models slower than one too few.
    threads = max(1, (os.cpu_count() or 1) // num_slots)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if num_gpus:
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        chosen = [gpus[(slot * num_gpus + i) % len(gpus)] for i in range(num_gpus)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment


def _facts(run: Run) -> dict:
    """What run.json says before the training: what is run, by which code."""
    import detectron2
    import torch

    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    described = subprocess.run(  # nosec B603  # As above.
        git, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    keys = ("config", "opts", "seed", "seen_set", "num_seen_classes")
    return {
        "run": run.name,
        **{key: getattr(run, key) for key in keys},
        "command": shlex.join(["tsmask", "train", *run.arguments, "OUTPUT_DIR", str(run.folder)]),
        "commit": described.stdout.strip() or None,
        "versions": {"torch": torch.__version__, "detectron2": detectron2.__version__},
    }


def _write_json(path: Path, value: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def write_summary(output_dir: str | os.PathLike) -> str:
    """
    Write results.jsonl, results.csv, summary.md and, for sets of several sizes, summary.png.

    Args:
        output_dir: of the sweep; all runs in it count, not the last call's alone.

    Returns:
        The tables, in Markdown.
    """
    import pandas as pd

    output = Path(output_dir)
    records = [json.loads(path.read_text()) for path in sorted(output.glob("runs/**/run.json"))]
    records = [record for record in records if record.get("results")]
    if not records:
        return "No run has finished."
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (output / "results.jsonl").write_text(lines, encoding="utf-8")
    keys = ["config", "num_seen_classes", "seen_set"]
    rows = [
        {"evaluation": evaluation, "seed": record["seed"]}
        | {key: "-" if record[key] is None else record[key] for key in keys}
        | {name: found.get(task, {}).get(metric) for name, (task, metric) in COLUMNS.items()}
        for record in records
        for evaluation, found in record["results"].items()
    ]
    results = pd.DataFrame(rows).astype(dict.fromkeys(COLUMNS, float))
    results.to_csv(output / "results.csv", index=False)
    tables = []
    for evaluation, rows in results.groupby("evaluation"):
        # The standard deviation is that of the sample; NaN for one seed.
        groups = rows.groupby(keys)[list(COLUMNS)]
        cells = groups.mean().map("{:.2f}".format)
        spread = groups.std().map(lambda x: "" if pd.isna(x) else f" ± {x:.2f}")
        cells = (cells + spread).replace("nan", "-")
        cells.insert(0, "seeds", rows.groupby(keys).size())
        table = cells.reset_index().to_markdown(index=False, disable_numparse=True)
        tables.append(f"{_title(evaluation)}:\n\n{table}")
    text = "\n\n".join(tables)
    (output / "summary.md").write_text(
        "# Summary of the sweep\n\nCOCO AP in percent: mean ± standard deviation (of the sample) "
        f"over the seeds; a value without ± is one run.\n\n{text}\n\n{len(records)} runs; "
        "results.jsonl says with which command and commit each was made.\n",
        encoding="utf-8",
    )
    if results["num_seen_classes"].nunique() > 1:
        _draw(results, output / "summary.png")
    return text


def _title(evaluation: str) -> str:
    if evaluation == DETECTIONS:
        return "Masks and boxes detected by the model"
    if evaluation.startswith(ALWAYS_UNSEEN):
        return "On the classes that are unseen in all sets"
    return f"Masks of the {evaluation.split('_')[-1]} on the ground-truth boxes and classes"


def _draw(results: pd.DataFrame, path: Path) -> None:
    """AP of unseen classes over the number of seen ones: Fig. 8 of the paper."""
    from matplotlib.figure import Figure

    results = results[~results["evaluation"].str.startswith("gt_boxes")]
    groups = results.groupby("evaluation")
    figure = Figure(figsize=(5.4 * len(groups), 4.4), layout="constrained")
    for ax, (evaluation, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for config, of_config in rows.groupby("config"):
            points = of_config.groupby("num_seen_classes")["unseen AP"].agg(["mean", "std"])
            spread = points["std"].fillna(0)
            ax.errorbar(points.index, points["mean"], spread, marker="o", label=config)
        ax.set(title=_title(evaluation), xlabel="number of seen classes", ylabel="unseen AP")
        ax.legend(frameon=False)
    figure.savefig(path, dpi=150)


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
    from .analysis.model_outputs import measure_pseudo_masks
    from .trained_model import find_test_dataset, load_config

    on_gt_boxes, quality = {}, {}
    for name, run in runs.items():
        on_gt_boxes[name] = _result_file(run.folder / ON_GT_BOXES.format(head="student"))
        if ON_GT_BOXES.format(head="teacher") in run.evaluations:
            folder = run.folder / ON_GT_BOXES.format(head="teacher")
            on_gt_boxes[f"{name}, teacher"] = _result_file(folder)
            quality[name] = measure_pseudo_masks(
                str(run.folder / "config.yaml"), str(run.folder / "model_final.pth")
            )
    baseline = next(iter(runs))
    cfg = load_config(str(runs[baseline].folder / "config.yaml"))
    annotations, image_root = find_test_dataset(cfg)
    analysis = analyze(
        annotations,
        {name: _result_file(run.folder) for name, run in runs.items()},
        seen_classes=cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES,
        gt_box_results=on_gt_boxes,
        pseudo_masks=quality,
        baseline=baseline,
    )
    return write_report(analysis, output_dir, image_root=image_root, num_objects=60)


def _result_file(folder: Path) -> str:
    path = folder / "inference" / "coco_instances_results.json"
    if not path.is_file():  # Detectron2 writes none for a model that finds nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    return str(path)
