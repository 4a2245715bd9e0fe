"""
From photographs, some objects of which have masks, to a model that has been judged.

:func:`train` is behind ``tsmask train DATA``: it finds the data, chooses the settings, trains, and
measures boxes and masks. :func:`evaluate` measures any model in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from .coco_json import check_coco, has_mask, read_coco
from .data import register_json_datasets
from .drawing import annotations_to_detections, draw_instances, draw_predictions
from .engine import Trainer, main
from .errors import InputError
from .own_data import DataPart, find_data
from .trained_model import TrainedModel, load_model, read_config

__all__ = ["PRESETS", "evaluate", "train"]

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
_NUM_PICTURES = 12


def train(
    data: str | os.PathLike,
    output_dir: str | os.PathLike | None = None,
    *,
    model: str | None = None,
    time_limit: float | None = None,
    epochs: float | None = None,
    image_root: str | os.PathLike | None = None,
    seed: int = 1,
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
        seed: of the training, and of the images that are set aside.
        opts: KEY, VALUE, ... of the config; they win over what is chosen.
        say: takes the plan and the outcome. All other messages go to the log file, warnings to the
            console, too.

    Returns:
        The folder of the run, which :func:`load_model` and every command take for a model.

    Raises:
        InputError: data, settings or weights cannot be used.
    """
    start, run = time.monotonic(), Path(data)
    is_resumed = (run / "config.yaml").is_file()
    opts = [str(x) for x in opts]
    if is_resumed:
        if not (run / "data/parts.json").is_file():
            raise InputError(
                f"{run} was trained by a config; --resume --config-file goes on with it."
            )
        if output_dir or model or time_limit or epochs or image_root:
            raise InputError(
                f"{run} goes on as it was planned; of all options only opts change it."
            )
        say(f"Going on with the run in {run}")
        config_file, chosen = run / "config.yaml", {"OUTPUT_DIR": str(run)}
    else:
        run = _choose_folder(Path(data), output_dir)
        model = model or ("base" if torch.cuda.is_available() else "nano")
        if model not in PRESETS:
            raise InputError(f"model is {model!r}; allowed: {', '.join(PRESETS)}.")
        parts = find_data(data, run / "data", image_root=image_root, seed=seed, say=say)
        chosen = _plan(model, *parts, run, time_limit, epochs, opts, say)
        config_file, chosen["SEED"] = CONFIGS / PRESETS[model][0], str(seed)
        (run / "data/parts.json").write_text(json.dumps([vars(x) for x in parts if x]))
    opts = [*itertools.chain.from_iterable(chosen.items()), *opts]
    arguments = argparse.Namespace(
        config_file=str(config_file), opts=opts, resume=is_resumed, eval_only=False
    )
    try:
        with _preserved_log_handlers():
            main(arguments, trainer_class=_WatchedTrainer, console_level=logging.WARNING)
            summary = _judge(run)
    except KeyboardInterrupt:
        if (run / "config.yaml").is_file():
            say(f"\nInterrupted. 'tsmask train {run}' goes on.")
        raise
    (run / "summary.md").write_text(summary + "\n", encoding="utf-8")
    minutes = (time.monotonic() - start) / 60
    say(f"\n{summary}\n\nDone in {minutes:.0f} min. Everything is in {run}.")
    return run


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
    return run


@contextlib.contextmanager
def _preserved_log_handlers() -> Iterator[None]:
    # A second training of this process must not write to the log of the first.
    loggers = [logging.getLogger(x) for x in ("detectron2", "fvcore", "teacher_student_mask")]
    before = [list(x.handlers) for x in loggers]
    try:
        yield
    finally:
        for x, handlers in zip(loggers, before):
            x.handlers[:] = handlers


def evaluate(
    model: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    image_root: str | os.PathLike = "",
    *,
    gt_boxes: bool = False,
    head: str = "student",
    output_dir: str | os.PathLike | None = None,
) -> dict:
    """
    Measure a model on a COCO json.

    Args:
        model: folder of a training, or the path of a config that names its weights.
        annotations: the json, with a mask on every object or on none; None: the test data of the
            training.
        image_root: folder of its images; "": the folder of the json.
        gt_boxes: draw the masks on the boxes and classes of the json. AP then measures the masks
            alone, and the yardsticks stand beside it.
        head: "student" or "teacher".
        output_dir: for results.json and the masks; None: ``inference/`` in the model's folder.

    Returns:
        {task: {metric: value}}, see :class:`PartiallySupervisedCOCOEvaluator`.

    Raises:
        InputError: the model or the json cannot be used.
    """
    opts = ["TEST.GT_BOXES", str(gt_boxes), "TEST.MASK_HEAD", head]
    if annotations is not None:
        opts += ["DATASETS.TEST", repr((os.fspath(annotations),))]
        opts += ["DATASETS.TEST_IMAGE_ROOT", os.fspath(image_root)]
    trained = load_model(os.fspath(model), opts=opts, heads=[head])
    cfg = trained.cfg
    cfg.OUTPUT_DIR = os.fspath(output_dir or Path(cfg.MODEL.WEIGHTS).parent / "inference")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    evaluators = [Trainer.build_evaluator(cfg, x, cfg.OUTPUT_DIR) for x in cfg.DATASETS.TEST]
    return dict(_WatchedTrainer.test(cfg, trained.model, evaluators))


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
        "OUTPUT_DIR": str(run),
        "DATASETS.SEEN_CLASSES": "all",
        "DATASETS.TRAIN": repr((training.json_file,)),
        "DATASETS.TRAIN_IMAGE_ROOT": training.image_root,
        "DATASETS.TEST": repr((validation.json_file,) if validation else ()),
        "DATASETS.TEST_IMAGE_ROOT": validation.image_root if validation else "",
    }
    if not torch.cuda.is_available():
        chosen["MODEL.DEVICE"] = "cpu"
    has_sides = any(re.search("left|right", x.name, re.IGNORECASE) for x in report.classes)
    flips = "with flips (--opts INPUT.RANDOM_FLIP none where left is not right)"
    if has_sides:
        chosen["INPUT.RANDOM_FLIP"] = "none"
        flips = "no flips, as names of classes tell left from right"
    flat = itertools.chain.from_iterable(chosen.items())
    cfg = read_config(str(CONFIGS / config_file), [*flat, *opts])
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
    trainer.model.train()
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(_UNTIMED_STEPS + _TIMED_STEPS):
            start = time.perf_counter()
            trainer.run_step()
            times.append(time.perf_counter() - start)
    return statistics.median(times[_UNTIMED_STEPS:])


# ---- the training ----


class _WatchedTrainer(Trainer):
    """The trainer with a progress bar, which also keeps the best checkpoint as model_best.pth."""

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase | None]:
        found, period = super().build_hooks(), self.cfg.TEST.EVAL_PERIOD
        if self.cfg.DATASETS.TEST:
            # After the evaluation, whose result it reads.
            place = 1 + [isinstance(x, hooks.EvalHook) for x in found].index(True)
            metric = "segm/AP" if _has_masks(self.cfg.DATASETS.TEST[0]) else "bbox/AP"
            best = hooks.BestCheckpointer(
                period, self.checkpointer, metric, file_prefix="model_best"
            )
            found.insert(place, best)
        return [*found, _Progress()]


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
            masks = f", mask AP {latest['segm/AP']:.1f}" if "segm/AP" in latest else ""
            tqdm.write(f"iteration {done}: validation box AP {latest['bbox/AP']:.1f}{masks}")
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


def _has_masks(json_file: str) -> bool:
    return any(map(has_mask, read_coco(json_file)["annotations"]))


# ---- the judgement ----


def _judge(run: Path) -> str:
    """Evaluate the best checkpoint, draw curves and pictures, and return what was learned."""
    training, *rest = [DataPart(**x) for x in json.loads((run / "data/parts.json").read_text())]
    lines = []
    for part in rest:
        found = evaluate(run)
        lines.append(_sentence_on_boxes(found["bbox"]))
        if "segm" in found:
            lines.append(f"Masks on detected boxes: AP {found['segm']['AP']:.1f}.")
        if part.masks_file:
            on_boxes = evaluate(
                run,
                part.masks_file,
                part.image_root,
                gt_boxes=True,
                output_dir=run / "inference/gt_boxes",
            )
            lines.append(_sentence_on_masks(on_boxes))
        _draw_pictures(load_model(run), part, run / "pictures")
        lines.append(f"Your annotations beside what was found: {run}/pictures")
    _draw_curves(run)
    lines.append(f"Losses, and AP of the evaluations: {run}/curves.png")
    command = ["tsmask", "complete", str(run), "--annotations", training.json_file]
    command += ["--image-root", training.image_root, "--output", str(run / "completed.json")]
    predict = f"  tsmask predict {run} PHOTOS --output-dir {run}/predictions"
    return "\n".join([*lines, "Next:", predict, f"  {shlex.join(command)}"])


def _sentence_on_boxes(found: Mapping[str, float]) -> str:
    text = f"Boxes: AP {found['AP']:.1f}, AP50 {found['AP50']:.1f} on {found['num_gt']} objects."
    if found["AP50"] >= 10:
        return text
    return text + " Detection has not been learnt: train longer, or on more images."


def _sentence_on_masks(on_boxes: Mapping[str, Mapping[str, float]]) -> str:
    ap, number = on_boxes["segm"]["AP"], on_boxes["segm"]["num_gt"]
    yardsticks = {
        task.split("/")[1].replace("_", " "): x["AP"]
        for task, x in on_boxes.items()
        if task.startswith("segm/")
    }
    others = ", ".join(f"{name} {x:.1f}" for name, x in yardsticks.items())
    text = f"Masks on given boxes: AP {ap:.1f} on {number} objects (without a model: {others})."
    if ap > max(yardsticks.values()):
        return text
    return text + " The masks are no better than that: train longer, or draw more masks."


def _draw_curves(run: Path) -> None:
    from matplotlib.figure import Figure

    rows = [json.loads(x) for x in (run / "metrics.json").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    charts = {
        "loss": ("total_loss", "loss_mask", "loss_mask_teacher"),
        "AP of the validation images": ("bbox/AP", "segm/AP"),
    }
    for ax, (title, names) in zip(figure.subplots(1, 2), charts.items()):
        for name in names:
            points = [(x["iteration"], x[name]) for x in rows if name in x]
            if not points:
                continue
            ax.plot(*zip(*points), marker="." if "/" in name else "", label=name)
        ax.set(xlabel="iteration", title=title)
        ax.legend()
    figure.savefig(run / "curves.png", dpi=120)


def _draw_pictures(trained: TrainedModel, part: DataPart, folder: Path) -> None:
    coco = read_coco(part.masks_file or part.json_file)
    names = {x["id"]: x["name"] for x in coco["categories"]}
    folder.mkdir(exist_ok=True)
    for image in coco["images"][:_NUM_PICTURES]:
        pixels = cv2.imread(os.path.join(part.image_root, image["file_name"]))
        given = [x for x in coco["annotations"] if x["image_id"] == image["id"]]
        labels = [names[x["category_id"]] for x in given]
        classes = [trained.class_names.index(x) for x in labels]
        truth = annotations_to_detections(given, pixels.shape[:2], classes)
        found = trained.predict(pixels)
        found = draw_predictions(pixels, found[found.scores > 0.5], trained.class_names)
        picture = np.hstack([draw_instances(pixels, truth, labels), found])
        # Images of the same name may lie in several folders.
        name = "_".join(Path(image["file_name"]).with_suffix("").parts)
        cv2.imwrite(str(folder / f"{name}.jpg"), picture)
