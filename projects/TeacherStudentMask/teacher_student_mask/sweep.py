"""
Many trainings: configs x seeds x sets of seen classes, several at once.

:func:`plan_sweep` finds what is wrong before anything runs, :func:`run_sweep` trains and evaluates
what is not done yet; sweep_summary.py compares. The jobs are submitit's: processes of this machine,
or of a Slurm cluster.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
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
    from detectron2.config import CfgNode

__all__ = [
    "ALWAYS_UNSEEN",
    "DETECTIONS",
    "ON_GT_BOXES",
    "Run",
    "plan_sweep",
    "run_sweep",
]

logger = logging.getLogger(__name__)

TRAIN_COMMAND = (sys.executable, "-m", "teacher_student_mask", "train")
POLL_SECONDS = 1.0
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
    own_keys = {"SEED", "OUTPUT_DIR", *(["DATASETS.SEEN_CLASSES"] if seen_sets else [])}
    for key in own_keys & set(opts[::2]):
        raise InputError(f"{key} cannot be changed: the sweep sets it for each run.")
    opts = [str(x) for x in opts]
    device = ["MODEL.DEVICE", "cuda" if num_gpus else "cpu"]
    cfgs = [load_config(path, [*device, *own, *opts]) for _, path, own in entries]
    _check_configs(dict(zip(labels, cfgs)), bool(seen_sets), report)
    seen_names: dict[str | None, list[str]] = {None: []}
    for name, path in zip(set_names, seen_sets):
        if not os.path.isfile(path):
            raise InputError(f"The list of seen classes {path} does not exist.")
        classes = _class_names(cfgs[0])
        seen_names[name] = [classes[i] for i in resolve_seen_classes(path, classes)]
    always_unseen = _always_unseen(seen_names, cfgs[0], Path(output_dir)) if seen_sets else {}

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
        evaluations = dict(always_unseen)
        has_teacher = cfg.MODEL.ROI_HEADS.NAME == "TeacherStudentROIHeads"
        for head in ("student", "teacher")[: 1 + has_teacher] if report else ():
            name = ON_GT_BOXES.format(head=head)
            evaluations[name] = ["TEST.GT_BOXES", "True", "TEST.MASK_HEAD", head]
        run = Run(
            name="/".join(parts),
            folder=Path(output_dir, "runs", *parts).resolve(),
            config=label,
            opts=[*own, *opts],
            seed=seed,
            seen_set=seen_set,
            num_seen_classes=len(seen_names[seen_set]) if seen_set else None,
            arguments=[*arguments, "SEED", str(seed)],
            evaluations=evaluations,
            truth=_truth(cfg, seen_names[seen_set]) if report else None,
        )
        earlier = run.record.get("opts", run.opts)
        if earlier != run.opts:
            raise InputError(
                f"{run.folder} was run with other changes, {' '.join(earlier) or 'none'}. Choose "
                "another output folder, or remove that one."
            )
        runs.append(run)
    return runs


def _check_configs(cfgs: dict[str, CfgNode], has_sets: bool, report: bool) -> None:
    (first, first_cfg), *_ = cfgs.items()
    for label, cfg in cfgs.items():
        if not cfg.DATASETS.TEST:
            raise InputError(f"{label}: DATASETS.TEST is empty, so there would be no results.")
        if has_sets and (cfg.TEST.SEEN_CLASSES or _class_names(cfg) != _class_names(first_cfg)):
            raise InputError(
                f"{label} sets TEST.SEEN_CLASSES, as the oracle does, or has other classes than "
                f"{first}, so it cannot be compared over sets of seen classes. Sweep over it on "
                "its own."
            )
        if report and _truth(cfg) != _truth(first_cfg):
            raise InputError(
                f"{label} is tested on other data or other seen classes than {first}, so no report "
                "can compare them. Sweep over them on their own."
            )


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
                    logger.info(f"{run.name}: started")
            time.sleep(POLL_SECONDS)
            for slot, (run, job) in list(running.items()):
                if not job.done():
                    continue
                del running[slot]
                if not run.is_done:
                    failed.append(run)
                    lines = "\n".join((job.stdout() or "").splitlines()[-15:])
                    logger.error(f"{run.name}: failed; the end of its output:\n{lines}")
                    continue
                ended = total - len(waiting) - len(running)
                minutes = (time.perf_counter() - start) / 60
                logger.info(
                    f"{run.name}: done; {ended} of {total} after {minutes:.1f} minutes, about "
                    f"{minutes / ended * (total - ended):.1f} left"
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


def _always_unseen(sets: dict[str | None, list[str]], cfg: CfgNode, output: Path) -> dict:
    """The evaluation on the classes that none of several sets has, if there are any."""
    seen = sorted(set().union(*sets.values()))
    if len(sets) < 3 or len(seen) == len(_class_names(cfg)):  # None is one of them
        return {}
    text = json.dumps(seen)
    # Other sets, other results: they have another name.
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    path = output.resolve() / "seen_classes" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return {f"{ALWAYS_UNSEEN}_{key}": ["TEST.SEEN_CLASSES", str(path)]}


def _truth(cfg: CfgNode, seen: Sequence[str] = ()) -> tuple[str, str, list[str]]:
    """Json, image folder and seen classes of the test data, as a report needs them."""
    from .trained_model import find_test_dataset

    names = _class_names(cfg)
    ids = resolve_seen_classes(cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES, names)
    return *find_test_dataset(cfg), list(seen) or [names[i] for i in ids]


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
