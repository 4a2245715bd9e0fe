"""
Many trainings: configs x seeds x sets of seen classes, several at once, and their summary.

:func:`plan_sweep` finds what is wrong before anything runs, :func:`run_sweep` trains and evaluates
what is not done yet, :func:`write_summary` and :func:`write_report` compare. The jobs are
submitit's: processes of this machine, or of a Slurm cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
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

__all__ = [
    "Run",
    "plan_sweep",
    "read_results",
    "run_sweep",
    "summarize",
    "write_report",
    "write_summary",
]

TRAIN_COMMAND = (sys.executable, "-m", "teacher_student_mask", "train")
POLL_SECONDS = 1.0
# Heading of a column -> (task, metric) of results.json.
COLUMNS = {
    "box AP": ("bbox", "AP"),
    "mask AP": ("segm", "AP"),
    "seen AP": ("segm_seen", "AP"),
    "unseen AP": ("segm_unseen", "AP"),
    "unseen AP50": ("segm_unseen", "AP50"),
    "overlapped unseen AP": ("segm_unseen_overlap", "AP"),
}
# Evaluations: the one that ends the training, and others by these names.
DETECTIONS, ALWAYS_UNSEEN, ON_GT_BOXES = "detections", "always_unseen", "gt_boxes_{head}"


@dataclass(frozen=True)
class Run:
    """
    One training and the evaluations of its model.

    Args:
        name: of the run.
        folder: OUTPUT_DIR of the training; an evaluation writes to a folder in it.
        config: label of what it trains, the same for all seeds and sets.
        config_file: path of the yaml.
        opts: KEY, VALUE, ... of the config, without what the sweep sets.
        seed: of the training.
        seen_set: name of the set of seen classes; None = the config's own.
        num_seen_classes: of the set; None without one.
        arguments: of ``tsmask train``, without OUTPUT_DIR.
        evaluations: {name: KEY, VALUE, ...} of the evaluations beside the training's own.
        truth: json, image folder and names of the seen classes that a report needs, or None.
    """

    name: str
    folder: Path
    config: str
    config_file: str
    opts: list[str]
    seed: int
    seen_set: str | None
    num_seen_classes: int | None
    arguments: list[str]
    evaluations: dict[str, list[str]] = field(default_factory=dict)
    truth: tuple[str, str, list[str]] | None = None

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
        seeds: at least 0 each.
        seen_sets: paths of lists, json or text, in the place of ``DATASETS.SEEN_CLASSES``.
        opts: KEY, VALUE, ... for all configs.
        num_gpus: of each run; 0 = the CPU.
        report: evaluate students and teachers on ground-truth boxes, as a report needs it.

    Raises:
        InputError: a config, a list, a change or a seed is missing, wrong or there twice, or a
            config is there with other changes.
    """
    from .trained_model import load_config

    if min(seeds) < 0:
        raise InputError(f"Seeds must not be negative, which means random; got {list(seeds)}.")
    own_keys = {"SEED", "OUTPUT_DIR", *(["DATASETS.SEEN_CLASSES"] if seen_sets else [])}
    for key in own_keys & set(opts[::2]):
        raise InputError(f"{key} cannot be changed: the sweep sets it for each run.")
    entries = [_parse_config(text) for text in configs]
    sets = {Path(path).stem: path for path in seen_sets}
    labels = [label for label, *_ in entries]
    for what, names in [("configs", labels), ("seeds", list(seeds)), ("seen sets", list(sets))]:
        if len(set(names)) < max(len(names), len(seen_sets) if what == "seen sets" else 0):
            raise InputError(f"Several {what} have the same name, of {', '.join(map(str, names))}.")

    opts = [str(x) for x in opts]
    device = ["MODEL.DEVICE", "cuda" if num_gpus else "cpu"]
    cfgs = [load_config(path, [*device, *own, *opts]) for _, path, own in entries]
    for label, cfg in zip(labels, cfgs):
        if not cfg.DATASETS.TEST:
            raise InputError(f"{label}: DATASETS.TEST is empty, so there would be no results.")
        if sets and (cfg.TEST.SEEN_CLASSES or _class_names(cfg) != _class_names(cfgs[0])):
            raise InputError(
                f"{label} sets TEST.SEEN_CLASSES, as the oracle does, or has other classes than "
                f"{labels[0]}, so it cannot be compared over sets of seen classes. Sweep over it "
                "on its own."
            )
    seen_ids = {}
    for name, path in sets.items():
        if not os.path.isfile(path):
            raise InputError(f"The list of seen classes {path} does not exist.")
        seen_ids[name] = resolve_seen_classes(path, _class_names(cfgs[0]))
    always_unseen = _always_unseen(list(seen_ids.values()), cfgs[0], Path(output_dir))

    runs = []
    for seed in seeds:
        for seen_set in sets or [None]:
            for (label, path, own), cfg in zip(entries, cfgs):
                parts = [label, *([seen_set] if seen_set else []), f"seed_{seed}"]
                changes = [*own, *opts]
                arguments = ["--resume", "--config-file", str(Path(path).resolve())]
                arguments += [*device, *changes]
                if num_gpus > 1:
                    arguments = ["--num-gpus", str(num_gpus), "--dist-url", "auto", *arguments]
                if seen_set:
                    arguments += ["DATASETS.SEEN_CLASSES", str(Path(sets[seen_set]).resolve())]
                evaluations, truth = dict(always_unseen), None
                if report:
                    truth = _truth(cfg, sets.get(seen_set))
                    has_teacher = cfg.MODEL.ROI_HEADS.NAME == "TeacherStudentROIHeads"
                    for head in ("student", "teacher") if has_teacher else ("student",):
                        name = ON_GT_BOXES.format(head=head)
                        evaluations[name] = ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", head]
                run = Run(
                    name="/".join(parts),
                    folder=Path(output_dir, "runs", *parts).resolve(),
                    config=label,
                    config_file=path,
                    opts=changes,
                    seed=seed,
                    seen_set=seen_set,
                    num_seen_classes=len(seen_ids[seen_set]) if seen_set else None,
                    arguments=[*arguments, "SEED", str(seed)],
                    evaluations=evaluations,
                    truth=truth,
                )
                earlier = run.record.get("opts", run.opts)
                if earlier != run.opts:
                    raise InputError(
                        f"{run.folder} was run with other changes, {' '.join(earlier) or 'none'}. "
                        "Choose another output folder, or remove that one."
                    )
                if truth and truth != (first := runs[-1] if len(runs) % len(cfgs) else run).truth:
                    raise InputError(
                        f"{first.name} and {run.name} are tested on other data or other seen "
                        "classes, so no report can compare them. Sweep over them on their own."
                    )
                runs.append(run)
    return runs


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

    A run that fails is printed with the end of its output; the others go on. On this machine no
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
    waiting = [run for run in runs if not run.is_done]
    total, start, failed = len(waiting), time.perf_counter(), []
    jobs = max(1, min(jobs, total))
    running = {}
    try:
        while waiting or running:
            for slot in set(range(jobs)) - set(running):
                if waiting:
                    run = waiting.pop(0)
                    environment = _environment(slot, jobs, num_gpus) if cluster == "local" else {}
                    run.folder.mkdir(parents=True, exist_ok=True)
                    _write_json(run.folder / "run.json", {**_facts(run, environment), **run.record})
                    running[slot] = run, executor.submit(_run_job, run, TRAIN_COMMAND, environment)
                    print(f"{run.name}: started", flush=True)
            time.sleep(POLL_SECONDS)
            for slot, (run, job) in list(running.items()):
                if not job.done():
                    continue
                del running[slot]
                if not run.is_done:
                    failed.append(run)
                    lines = (job.stdout() or "").splitlines()[-15:]
                    print(f"{run.name}: failed; the end of its output:", *lines, sep="\n")
                    continue
                ended = total - len(waiting) - len(running)
                minutes = (time.perf_counter() - start) / 60
                print(
                    f"{run.name}: done; {ended} of {total} after {minutes:.1f} minutes, about "
                    f"{minutes / ended * (total - ended):.1f} left",
                    flush=True,
                )
    finally:
        for _, job in running.values():
            job.cancel(check=False)
        while cluster == "local" and not all(job.done() for _, job in running.values()):
            time.sleep(0.1)
    return failed


def _run_job(run: Run, command: Sequence[str], environment: dict[str, str]) -> None:
    """In a process of its own: train, evaluate, and add the results to run.json after each."""

    def call(folder: Path, arguments: Sequence[str]) -> dict:
        # Ended with this process: subprocess.run does so when an interrupt comes.
        ended = subprocess.run(  # nosec B603  # A list of arguments, without a shell.
            [*command, *arguments, "OUTPUT_DIR", str(folder)], env={**os.environ, **environment}
        )
        if ended.returncode:
            sys.exit(ended.returncode)
        # NaN is not json, although Python writes it.
        text = (folder / "results.json").read_text()
        results = json.loads(text, parse_constant=lambda _: None)
        # Of the first of several test datasets.
        return results if {"bbox", "segm"} & set(results) else next(iter(results.values()))

    path, record = run.folder / "run.json", run.record
    results = record.setdefault("results", {})
    if DETECTIONS not in results:
        start = time.perf_counter()
        results[DETECTIONS] = call(run.folder, run.arguments)
        record["seconds"] = round(time.perf_counter() - start, 1)
        _write_json(path, record)
    model = ["--eval-only", "--config-file", str(run.folder / "config.yaml")]
    model += ["MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
    for name, opts in run.evaluations.items():
        if name not in results:
            results[name] = call(run.folder / name, [*model, *opts])
            _write_json(path, record)


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
    if name not in DatasetCatalog.list():
        raise InputError(f"DATASETS.TRAIN names {name!r}, which is neither registered nor a json.")
    if not MetadataCatalog.get(name).get("thing_classes"):
        try:
            DatasetCatalog.get(name)  # the names of many are known when their json has been read
        except (OSError, ValueError) as error:
            raise InputError(f"The dataset {name!r} cannot be read: {error}") from error
    return list(MetadataCatalog.get(name).thing_classes)


def _always_unseen(sets: list[list[int]], cfg: CfgNode, output: Path) -> dict[str, list[str]]:
    """The evaluation on the classes that none of several sets has, if there are any."""
    seen = sorted(set().union(*sets))
    if len(sets) < 2 or len(seen) == len(_class_names(cfg)):
        return {}
    text = json.dumps([_class_names(cfg)[i] for i in seen])
    # Other sets, other results: they have another name.
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = output.resolve() / "seen_classes" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {f"{ALWAYS_UNSEEN}_{key}": ["TEST.SEEN_CLASSES", str(path)]}


def _truth(cfg: CfgNode, seen_set: str | None) -> tuple[str, str, list[str]]:
    from .trained_model import find_test_dataset

    names = _class_names(cfg)
    spec = cfg.TEST.SEEN_CLASSES or seen_set or cfg.DATASETS.SEEN_CLASSES
    return *find_test_dataset(cfg), [names[i] for i in resolve_seen_classes(spec, names)]


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


def _facts(run: Run, environment: dict[str, str]) -> dict:
    """What run.json says before the training: what is run, by which code, on which machine."""
    import detectron2
    import torch

    git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(  # nosec B603
            git, cwd=Path(__file__).parent, capture_output=True, text=True
        )
        commit = described.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "run": run.name,
        "config": run.config,
        "config_file": run.config_file,
        "opts": run.opts,
        "seed": run.seed,
        "seen_set": run.seen_set,
        "num_seen_classes": run.num_seen_classes,
        "command": shlex.join(["tsmask", "train", *run.arguments, "OUTPUT_DIR", str(run.folder)]),
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
        },
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            **environment,
        },
    }


def _write_json(path: Path, value: dict) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


# ---- results ----


def read_results(records: Sequence[dict]) -> pd.DataFrame:
    """
    The results of runs as a table.

    Args:
        records: contents of run.json files, or lines of results.jsonl.

    Returns:
        A row for each run and evaluation: "config", "seen_set", "num_seen_classes", "seed",
        "evaluation" ("detections", "gt_boxes_student", "gt_boxes_teacher" or "always_unseen_KEY"),
        and AP of :data:`COLUMNS`.
    """
    import pandas as pd

    rows = []
    for record in records:
        for evaluation, results in record["results"].items():
            row = {key: record[key] for key in ("config", "seen_set", "num_seen_classes", "seed")}
            row["evaluation"] = evaluation
            for heading, (task, metric) in COLUMNS.items():
                row[heading] = results.get(task, {}).get(metric)
            rows.append(row)
    types = {"num_seen_classes": "Int64", **dict.fromkeys(COLUMNS, float)}
    return pd.DataFrame(rows).fillna({"seen_set": "-"}).astype(types)


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """
    Mean and sample standard deviation over the seeds.

    Args:
        results: of :func:`read_results`.

    Returns:
        Rows (evaluation, config, number of seen classes, set); columns ("seeds", "count") and
        (COLUMN, "mean") and (COLUMN, "std"), which is NaN for one seed.
    """
    keys = ["evaluation", "config", "num_seen_classes", "seen_set"]
    groups = results.groupby(keys, dropna=False)
    return groups.agg({"seed": ["count"], **dict.fromkeys(COLUMNS, ["mean", "std"])})


def write_summary(output_dir: str | os.PathLike) -> str:
    """
    Write results.jsonl, results.csv, summary.md and summary.png.

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
    results = read_results(records)
    results.to_csv(output / "results.csv", index=False)
    summary = summarize(results)
    tables = []
    for evaluation, rows in summary.groupby("evaluation"):
        rows = rows.droplevel("evaluation")
        cells = pd.DataFrame({"seeds": rows["seed", "count"]})
        for heading in COLUMNS:
            if rows[heading, "mean"].notna().any():
                cells[heading] = [
                    "-" if pd.isna(mean) else f"{mean:.2f}" + f" ± {std:.2f}" * pd.notna(std)
                    for mean, std in rows[heading].itertuples(index=False)
                ]
        cells = cells.reset_index().astype(str).replace({"<NA>": "-", "nan": "-"})
        tables.append(f"{_title(evaluation)}:\n\n{cells.to_markdown(index=False)}")
    text = "\n\n".join(tables)
    hours = sum(record.get("seconds", 0) for record in records) / 3600
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    (output / "summary.md").write_text(
        "# Summary of the sweep\n\nCOCO AP in percent: mean ± standard deviation (of the sample) "
        "over the seeds; a value without ± is one run. Seen, unseen and overlapped unseen: the "
        f"tasks segm_seen, segm_unseen and segm_unseen_overlap.\n\n{text}\n\n{len(records)} runs, "
        f"{hours:.2f} hours of training. Each with its command, versions and hardware is a line of "
        f"results.jsonl. Commits: {commits}.\n",
        encoding="utf-8",
    )
    _draw(summary, output / "summary.png")
    return text


def _title(evaluation: str) -> str:
    if evaluation == DETECTIONS:
        return "Masks and boxes detected by the model"
    if evaluation.startswith(ALWAYS_UNSEEN):
        return "On the classes that are unseen in all sets"
    return f"Masks of the {evaluation.split('_')[-1]} on the ground-truth boxes and classes"


def _draw(summary: pd.DataFrame, path: Path) -> None:
    """AP of unseen classes over the number of seen ones (Fig. 8), or bars of all configs."""
    from matplotlib.figure import Figure

    evaluations = summary.index.unique("evaluation")
    if summary.index.unique("num_seen_classes").size > 1:
        shown = [x for x in evaluations if x == DETECTIONS or x.startswith(ALWAYS_UNSEEN)]
        figure = Figure(figsize=(5.4 * len(shown), 4.4), layout="constrained")
        for ax, evaluation in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            for config, rows in summary.loc[evaluation]["unseen AP"].groupby("config"):
                count = rows.index.get_level_values("num_seen_classes").astype(float)
                ax.errorbar(count, rows["mean"], rows["std"].fillna(0), marker="o", label=config)
            ax.set(title=_title(evaluation), xlabel="number of seen classes", ylabel="unseen AP")
            ax.legend(frameon=False)
    else:
        rows = summary.loc[DETECTIONS].droplevel(["num_seen_classes", "seen_set"])[::-1]
        figure = Figure(figsize=(10.5, 1.6 + 0.45 * len(rows)), layout="constrained")
        columns = ("seen AP", "unseen AP", "overlapped unseen AP")
        for ax, column in zip(figure.subplots(1, len(columns), sharey=True), columns):
            means, spread = rows[column, "mean"].fillna(0), rows[column, "std"].fillna(0)
            ax.barh(rows.index, means, xerr=spread)
            ax.set_title(column)
    figure.savefig(path, dpi=150)


def write_report(runs: Mapping[str, Run], output_dir: str | os.PathLike) -> Path:
    """
    Write the report on the models of some runs, the first of which is the baseline.

    Args:
        runs: {name in the report: run that is done}, planned with ``report``.
        output_dir: of the report.

    Returns:
        The path of the page.
    """
    from .analysis import analyze
    from .analysis import write_report as write_page
    from .analysis.pseudo_mask_quality import measure_pseudo_masks

    on_gt_boxes, quality = {}, {}
    for name, run in runs.items():
        on_gt_boxes[name] = _result_file(run.folder / ON_GT_BOXES.format(head="student"))
        if ON_GT_BOXES.format(head="teacher") in run.evaluations:
            folder = run.folder / ON_GT_BOXES.format(head="teacher")
            on_gt_boxes[f"{name}, teacher"] = _result_file(folder)
            quality[name] = measure_pseudo_masks(
                str(run.folder / "config.yaml"), str(run.folder / "model_final.pth")
            )
    annotations, image_root, seen_classes = next(iter(runs.values())).truth
    analysis = analyze(
        annotations,
        {name: _result_file(run.folder) for name, run in runs.items()},
        seen_classes=seen_classes,
        gt_box_results=on_gt_boxes,
        pseudo_masks=quality,
        baseline=next(iter(runs)),
    )
    return write_page(analysis, output_dir, image_root=image_root, num_objects=60)


def _result_file(folder: Path) -> str:
    path = folder / "inference" / "coco_instances_results.json"
    if not path.is_file():  # Detectron2 writes none for a model that finds nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    return str(path)
