"""
From photographs, some objects of which have masks, to a model that has been judged.

:func:`train` is behind ``tsmask train DATA``: it finds the data, chooses the settings, trains, and
measures boxes and masks.
"""

import argparse
import itertools
import json
import logging
import math
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from .coco_json import check_coco, read_coco
from .data import register_json_datasets
from .engine import Trainer, main
from .errors import InputError
from .judgement import QuietTrainer, judge, log_to, number_of
from .own_data import DataPart, find_data
from .run_folder import as_value
from .trained_model import read_config

__all__ = ["PRESETS", "train"]

CONFIGS = Path(__file__).parent / "configs"
# Name -> (config, changes to it).
PRESETS = {
    "nano": ("custom/photos_cpu.yaml", {}),
    "small": (
        "custom/photos_cpu.yaml",
        {
            "INPUT.MIN_SIZE_TRAIN": "(320,)",
            "INPUT.MAX_SIZE_TRAIN": "512",
            "INPUT.MIN_SIZE_TEST": "320",
            "INPUT.MAX_SIZE_TEST": "512",
        },
    ),
    "base": ("custom/photos_gpu.yaml", {}),
}
# Steps before a plan is made; the first are slower than the others and do not count.
_UNTIMED_STEPS, _TIMED_STEPS = 2, 4
# Evaluations of a training, and the share of a time limit that they take.
_NUM_EVALUATIONS, _EVALUATION_SHARE = 5, 0.15


def train(
    data: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    *,
    model: str | None = None,
    time_limit: float | None = None,
    epochs: float | None = None,
    image_root: str | os.PathLike | None = None,
    seed: int | None = None,
    early_stop: int | None = None,
    opts: Sequence = (),
    say: Callable[[str], None] = print,
) -> Path:
    """
    Train a model on data of one's own, and say how good it is.

    Args:
        data: a COCO json; a folder with ``train.json`` and perhaps ``val.json``; one with
            Roboflow's ``train/_annotations.coco.json``; or a ``data.yaml`` of Ultralytics, which is
            converted into the run's folder. Where there is no validation set, a tenth of the images
            is set aside. The folder of a run that was interrupted: go on with it.
        output_dir: of the run; None: the first free of output/train, output/train2, ...
        model: key of ``PRESETS``; None: "base" where there is a GPU, else "nano".
        time_limit: in seconds; the number of iterations follows from it, evaluations included.
        epochs: passes over the images, in the place of ``time_limit``. With neither, 60 times the
            square root of the number of images is the number of iterations, but at least 600.
        image_root: folder of the images; None: that of the json, or ``images`` in or beside it.
        seed: of the training, and of the images that are set aside; None = 1.
        early_stop: the training ends when validation AP (of masks, else of boxes) has not risen for
            so many evaluations, of which a training has 5; None: not before the time.
        opts: KEY, VALUE, ... of the config; they win over what is chosen.
        say: takes the plan and the outcome. All other messages go to the log file, warnings of this
            project to the console, too.

    Returns:
        The folder of the run, which :func:`load_model` and every command take for a model.

    Raises:
        InputError: data, settings or weights cannot be used.
    """
    start, run = time.monotonic(), Path(data)
    opts = [str(x) for x in opts]
    _refuse_opts(opts)
    is_resumed = (run / "config.yaml").is_file()
    if not is_resumed:
        run = _choose_folder(run, output_dir)
    elif not (run / "data/parts.json").is_file():
        raise InputError(f"{run} was trained by a config; --resume --config-file goes on with it.")
    elif output_dir or model or time_limit or epochs or image_root or seed is not None:
        raise InputError(
            f"{run} goes on as it was planned; of all options only early_stop and opts change it."
        )
    is_new = not run.exists()
    try:
        if is_resumed:
            say(f"Going on with the run in {run}")
            config_file, chosen = run / "config.yaml", {"OUTPUT_DIR": as_value(run)}
        else:
            model = model or ("base" if torch.cuda.is_available() else "nano")
            if model not in PRESETS:
                raise InputError(f"model is {model!r}; allowed: {', '.join(PRESETS)}.")
            config_file = CONFIGS / PRESETS[model][0]
            seed = 1 if seed is None else seed
            parts = find_data(data, run / "data", image_root=image_root, seed=seed, say=say)
            with log_to(run):
                chosen = _plan(model, *parts, run, time_limit, epochs, opts, say)
            chosen["SEED"] = str(seed)
        opts = [*itertools.chain.from_iterable(chosen.items()), *opts]
        arguments = argparse.Namespace(
            config_file=str(config_file), opts=opts, resume=is_resumed, eval_only=False
        )
        trainer_class = type("Trainer", (_WatchedTrainer,), {"early_stop": early_stop})
        with log_to(run):
            main(arguments, trainer_class, is_quiet=True)
    except BaseException as error:
        if not (run / "config.yaml").is_file():
            if is_new and run.exists():  # A start that failed leaves nothing behind.
                shutil.rmtree(run)
        elif isinstance(error, KeyboardInterrupt):
            say(f"\nInterrupted. 'tsmask train {run}' goes on.")
        raise
    summary = judge(run)
    (run / "summary.md").write_text(summary + "\n", encoding="utf-8")
    minutes = (time.monotonic() - start) / 60
    say(f"\n{summary}\n\nDone in {minutes:.0f} min. Everything is in {run}.")
    return run


def _refuse_opts(opts: Sequence[str]) -> None:
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "OUTPUT_DIR":
            raise InputError("OUTPUT_DIR is chosen by output_dir (--output-dir).")
        if key == "DATASETS.TEST" and value != "()":
            raise InputError("DATASETS.TEST is the val.json beside train.json; () is without any.")


def _choose_folder(data: Path, output_dir: str | os.PathLike | None) -> Path:
    if output_dir is None:
        numbered = (f"output/train{i}" for i in itertools.count(2))
        folders = map(Path, itertools.chain(["output/train"], numbered))
        return next(x for x in folders if not x.exists())
    run = Path(output_dir)
    if (run / "config.yaml").exists():
        raise InputError(f"{run} holds another run; 'tsmask train {run}' goes on with it.")
    if data.resolve().is_relative_to(run.resolve()):
        raise InputError(f"{data} lies in {run}, the folder of the run; name another folder.")
    found = run / "data"
    if found.exists() and not (found / "parts.json").is_file() and any(found.iterdir()):
        raise InputError(f"{run} has a folder data, which the run needs; name another folder.")
    return run


# ---- the plan ----


def _plan(
    preset: str,
    training: DataPart,
    validation: DataPart | None,
    run: Path,
    time_limit: float | None,
    epochs: float | None,
    opts: list[str],
    say: Callable[[str], None],
) -> dict[str, str]:
    """Choose the settings, say them, and return them as {KEY: VALUE}."""
    report = check_coco(training.json_file, image_root=training.image_root)
    report.raise_on_error()
    config_file, changes = PRESETS[preset]
    chosen = {
        **changes,
        "OUTPUT_DIR": as_value(run),
        "DATASETS.SEEN_CLASSES": "all",
        "DATASETS.TRAIN": repr((training.json_file,)),
        "DATASETS.TRAIN_IMAGE_ROOT": as_value(training.image_root),
        "DATASETS.TEST": repr((validation.json_file,) if validation else ()),
        "DATASETS.TEST_IMAGE_ROOT": as_value(validation.image_root) if validation else "",
    }
    if not torch.cuda.is_available():
        chosen["MODEL.DEVICE"] = "cpu"
    has_sides = any(re.search("left|right", x.name, re.IGNORECASE) for x in report.classes)
    if has_sides:
        chosen["INPUT.RANDOM_FLIP"] = "none"
    flat = itertools.chain.from_iterable(chosen.items())
    cfg = read_config(str(CONFIGS / config_file), [*flat, *opts])
    if cfg.INPUT.RANDOM_FLIP != "none":
        flips = "with flips (--opts INPUT.RANDOM_FLIP none where left is not right)"
    else:
        flips = "no flips" + ", as names of classes tell left from right" * has_sides
    objects, masks = (sum(getattr(x, k) for x in report.classes) for k in ("num_objects", "masks"))
    if not masks and "MODEL.BOX_SUPERVISION.NAME" not in opts:
        raise InputError(
            f"{training.json_file}: no object has a mask that a human drew; draw some, or give "
            "--opts MODEL.BOX_SUPERVISION.NAME boxinst to learn from boxes alone."
        )
    say(
        f"Data        {training.json_file}: {report.num_images} images, {objects} objects of "
        f"{len(report.classes)} classes, {masks} with a mask"
    )
    number = len(read_coco(validation.json_file)["images"]) if validation else 0
    where = f"{validation.json_file}: {number} images" if validation else "none: too few images"
    say(f"Validation  {where}")
    say(f"Model       {preset}: {config_file}, images of {cfg.INPUT.MIN_SIZE_TEST} px")
    say(f"Training    {cfg.MODEL.DEVICE}, batches of {cfg.SOLVER.IMS_PER_BATCH}, {flips}")

    seconds = _time_steps(cfg)
    per_epoch = report.num_images / cfg.SOLVER.IMS_PER_BATCH
    if "SOLVER.MAX_ITER" in opts:
        iterations = cfg.SOLVER.MAX_ITER
    elif time_limit:
        iterations = time_limit * (1 - _EVALUATION_SHARE) / seconds
    elif epochs:
        iterations = epochs * per_epoch
    else:
        iterations = max(600, 60 * math.sqrt(report.num_images))
    iterations = max(1, round(iterations))
    gate, period = iterations // 10, math.ceil(iterations / _NUM_EVALUATIONS)
    chosen |= {
        "SOLVER.MAX_ITER": str(iterations),
        "SOLVER.WARMUP_ITERS": str(min(100, gate)),
        "SOLVER.CHECKPOINT_PERIOD": str(period),
        "TEST.EVAL_PERIOD": str(period),
        "MODEL.PSEUDO_MASK.WARMUP_ITERS": str(gate),
    }
    say(
        f"Schedule    {iterations} iterations, {iterations / per_epoch:.1f} passes over the "
        f"images; objects without a mask take part from iteration {gate} on"
    )
    minutes = iterations * seconds / (1 - _EVALUATION_SHARE) / 60
    say(f"Time        {seconds:.2f} s an iteration, about {minutes:.0f} min in all")
    say(f"Folder      {run}; should the training be interrupted, tsmask train {run} goes on")
    return chosen


def _time_steps(cfg: CfgNode) -> float:
    """Seconds of a training step, the median of a few."""
    register_json_datasets(cfg)
    # A trainer would begin to log to the console.
    logging.getLogger("detectron2").setLevel(logging.INFO)
    trainer, times = Trainer(cfg), []
    for group in trainer.optimizer.param_groups:  # without its weights the model would diverge
        group["lr"] = 0.0
    trainer.model.train()
    # Behind the gate, where most of the training is.
    with EventStorage(cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS + 1) as trainer.storage:
        for trainer.iter in range(_UNTIMED_STEPS + _TIMED_STEPS):
            start = time.perf_counter()
            trainer.run_step()
            times.append(time.perf_counter() - start)
    return statistics.median(times[_UNTIMED_STEPS:])


# ---- the training ----


class _WatchedTrainer(QuietTrainer):
    """The trainer with a progress bar, which keeps the best checkpoint and may stop early."""

    early_stop: int | None = None

    def build_hooks(self) -> list[HookBase | None]:
        # Behind the evaluation, whose result it reads.
        best = _KeepBest(self.early_stop) if self.cfg.DATASETS.TEST else None
        return [*super().build_hooks(), _Progress(), best]

    def train(self) -> dict | None:
        try:
            return super().train()
        except _EarlyStop:
            return None


class _EarlyStop(BaseException):
    """Ends a training; not an Exception, which Detectron2 would log as a failure."""


class _KeepBest(HookBase):
    """
    Keeps the checkpoint of the highest validation AP as model_best.pth.

    That of masks, else that of boxes. The training ends when it has not risen for ``early_stop``
    evaluations; None: it goes on.
    """

    def __init__(self, early_stop: int | None):
        self._early_stop = early_stop

    def before_train(self) -> None:
        log, begin = Path(self.trainer.cfg.OUTPUT_DIR, "metrics.json"), self.trainer.start_iter
        rows = map(json.loads, log.read_text().splitlines() if log.is_file() else ())
        self._found = [
            _validation_ap(x) for x in rows if "bbox/AP" in x and x["iteration"] <= begin
        ]

    def after_step(self) -> None:
        if self._look() and self._early_stop:
            since = len(self._found) - 1 - self._found.index(max(self._found))
            if since >= self._early_stop:
                tqdm.write(f"AP has not risen for {since} evaluations: the training ends.")
                raise _EarlyStop

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # else nothing is new
            self._look()

    def _look(self) -> bool:
        """Whether there is a new evaluation; the best one's model is saved."""
        now = self.trainer.storage.iter
        latest = {k: x for k, (x, i) in self.trainer.storage.latest().items() if i == now}
        if "bbox/AP" not in latest:
            return False
        self._found.append(_validation_ap(latest))
        # Of equal ones the last: with AP 0 it has learnt the most.
        if self._found[-1] == max(self._found):
            self.trainer.checkpointer.save("model_best", iteration=self.trainer.iter)
        return True


def _validation_ap(metrics: Mapping[str, float]) -> float:
    return number_of(metrics.get("segm/AP", metrics["bbox/AP"]))


class _Progress(HookBase):
    """A bar with the loss and the time that is left; plain lines where there is no terminal."""

    def before_train(self) -> None:
        begin, end = self.trainer.start_iter, self.trainer.max_iter
        self._start = time.monotonic()
        self._bar = tqdm(total=end, initial=begin, unit="it", desc="Training", disable=None)

    def after_step(self) -> None:
        self._bar.update()
        storage = self.trainer.storage
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        latest = {k: x for k, (x, i) in storage.latest().items() if i == self.trainer.iter}
        if "bbox/AP" in latest:
            masks = f", mask AP {number_of(latest['segm/AP']):.1f}" if "segm/AP" in latest else ""
            ap = number_of(latest["bbox/AP"])
            tqdm.write(f"iteration {done}: validation box AP {ap:.1f}{masks}")
        is_line = self._bar.disable and done % max(1, end // 10) == 0
        if not is_line and done % 20:
            return
        loss = storage.history("total_loss").median(20)
        self._bar.set_postfix(loss=f"{loss:.3f}")
        if is_line:
            steps = done - self.trainer.start_iter
            minutes = (time.monotonic() - self._start) / steps * (end - done) / 60
            tqdm.write(f"iteration {done} of {end}, loss {loss:.3f}, {minutes:.0f} min left")

    def after_train(self) -> None:
        self._bar.close()
