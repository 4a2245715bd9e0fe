"""How good a model is: AP beside yardsticks, sentences, curves and pictures."""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from .coco_json import read_coco
from .drawing import annotations_to_detections, draw_instances, read_image
from .engine import Trainer, main
from .own_data import DataPart, read_parts
from .run_folder import as_value, find_model

__all__ = ["QuietTrainer", "evaluate", "judge", "log_to", "number_of"]

_NUM_PICTURES = 12


class QuietTrainer(Trainer):
    """The trainer with a bar for the images of an evaluation, and without pycocotools' tables."""

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> tqdm:
        loader = super().build_test_loader(cfg, dataset_name)
        return tqdm(loader, dataset_name, unit="image", leave=False, disable=None)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators=None) -> dict:
        with contextlib.redirect_stdout(io.StringIO()):
            return super().test(cfg, model, evaluators)


@contextlib.contextmanager
def log_to(folder: str | os.PathLike) -> Iterator[None]:
    """
    Around a quiet ``engine.main``: log.txt in ``folder``, made if new, takes all messages.

    Those of PyTorch and Python's warnings, too. In the end the loggers are as they were before.
    """
    # Not by Detectron2, which keeps a file open under its name, whatever becomes of its folder.
    os.makedirs(folder, exist_ok=True)
    handler = logging.FileHandler(Path(folder, "log.txt"), delay=True, encoding="utf-8")
    form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%m/%d %H:%M:%S"))
    names = ("detectron2", "fvcore", "teacher_student_mask", "py.warnings", "torch")
    loggers = [logging.getLogger(x) for x in names]
    before = [(list(x.handlers), x.propagate) for x in loggers]
    for x in loggers:
        x.handlers[:], x.propagate = [handler], False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        handler.close()
        for x, (handlers, propagate) in zip(loggers, before):
            x.handlers[:], x.propagate = handlers, propagate
        setup_logger.cache_clear()  # else it takes the handlers for being there still


def evaluate(
    model: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    image_root: str | os.PathLike = "",
    *,
    weights: str | None = None,
    gt_boxes: bool = False,
    head: str = "student",
    output_dir: str | os.PathLike | None = None,
    opts: Sequence = (),
) -> dict:
    """
    Measure a model on a COCO json, as ``tsmask train --eval-only`` does.

    Args:
        model: folder of a training, or the path of a config that names its weights.
        annotations: the json, with a mask on every object or on none; None: the test data of the
            training.
        image_root: folder of its images; "": the folder of the json.
        weights: path of a checkpoint; None: that of the folder or config.
        gt_boxes: draw the masks on the boxes and classes of the json. AP then measures the masks
            alone, and the yardsticks stand beside it.
        head: "student" or "teacher".
        output_dir: results.json, the masks and a log are written to ``inference/`` in it; None: the
            folder of the model.
        opts: KEY, VALUE, ... of the config.

    Returns:
        {task: {metric: value}}, see :class:`PartiallySupervisedCOCOEvaluator`.

    Raises:
        InputError: the model or the json cannot be used.
    """
    config_file, found = find_model(model)
    folder = os.fspath(output_dir or os.path.dirname(config_file))
    opts = [*(["MODEL.WEIGHTS", found] if found else []), *map(str, opts)]
    opts += ["OUTPUT_DIR", as_value(folder), "TEST.GT_BOXES", str(gt_boxes), "TEST.MASK_HEAD", head]
    if weights:
        opts += ["MODEL.WEIGHTS", weights]
    if annotations is not None:
        opts += ["DATASETS.TEST", repr((os.fspath(annotations),))]
        opts += ["DATASETS.TEST_IMAGE_ROOT", as_value(image_root)]
    args = argparse.Namespace(config_file=config_file, opts=opts, resume=False, eval_only=True)
    with log_to(os.path.join(folder, "inference")):
        return dict(main(args, QuietTrainer, is_quiet=True))


def judge(run: Path) -> str:
    """Evaluate the best checkpoint, draw curves and pictures, and return what was learned."""
    training, *rest = read_parts(run)
    lines = []
    for part in rest:
        found = evaluate(run)
        if not found:  # DATASETS.TEST () of the user
            continue
        lines.append(_sentence_on_boxes(found["bbox"]))
        if "segm" in found:
            lines.append(f"Masks on detected boxes: AP {number_of(found['segm']['AP']):.1f}.")
        if part.masks_file:
            data = part.masks_file, part.image_root
            on_boxes = evaluate(run, *data, gt_boxes=True, output_dir=run / "gt_boxes")
            lines.append(_sentence_on_masks(on_boxes))
        _draw_pictures(run, part)
        lines.append(f"Your annotations beside what was found: {run}/pictures")
    _draw_curves(run)
    lines.append(f"Losses, and AP of the evaluations: {run}/curves.png")
    predict = ["tsmask", "predict", str(run), "PHOTOS", "--output-dir", str(run / "predictions")]
    complete = ["tsmask", "complete", str(run), "--annotations"]
    complete += [training.source or training.json_file, "--image-root", training.image_root]
    complete += ["--output", str(run / "completed.json")]
    return "\n".join([*lines, "Next:", f"  {shlex.join(predict)}", f"  {shlex.join(complete)}"])


def number_of(ap: float) -> float:
    """AP, 0 where it is nan as nothing was found."""
    return 0.0 if math.isnan(ap) else ap


def _sentence_on_boxes(found: Mapping[str, float]) -> str:
    if not found["num_gt"]:
        return "The validation images have no objects: nothing was measured."
    ap, ap50 = number_of(found["AP"]), number_of(found["AP50"])
    text = f"Boxes: AP {ap:.1f}, AP50 {ap50:.1f} on {found['num_gt']} objects."
    if ap50 >= 10:
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
        if ax.lines:
            ax.legend()
    figure.savefig(run / "curves.png", dpi=120)


def _draw_pictures(run: Path, part: DataPart) -> None:
    """Annotations at the left, and at the right what the evaluation of the run has found."""
    coco = read_coco(part.json_file)
    given = {x["id"]: x for x in coco["annotations"]}
    if part.masks_file:  # of a part of the objects
        given |= {x["id"]: x for x in read_coco(part.masks_file)["annotations"]}
    found = json.loads((run / "inference/coco_instances_results.json").read_text())
    names = {x["id"]: x["name"] for x in coco["categories"]}
    (run / "pictures").mkdir(exist_ok=True)
    for image in coco["images"][:_NUM_PICTURES]:
        pixels = read_image(os.path.join(part.image_root, image["file_name"]))
        pair = []
        for objects in (given.values(), [x for x in found if x["score"] > 0.5]):
            rows = [x for x in objects if x["image_id"] == image["id"]]
            ids = [x["category_id"] for x in rows]
            scores = [f" {x['score']:.0%}" if "score" in x else "" for x in rows]
            labels = [names[i] + score for i, score in zip(ids, scores)]
            detections = annotations_to_detections(rows, pixels.shape[:2], ids)
            pair.append(draw_instances(pixels, detections, labels))
        # Images of the same name may lie in several folders.
        parts = Path(image["file_name"]).with_suffix("").parts
        name = "_".join(x for x in parts if x not in ("/", ".."))
        cv2.imwrite(str(run / "pictures" / f"{name}.jpg"), np.hstack(pair))
