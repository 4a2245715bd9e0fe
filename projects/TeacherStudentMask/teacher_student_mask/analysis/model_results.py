"""From a trained model to result files in COCO's format."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from tqdm import tqdm

from ..class_splits import AUTO, resolve_seen_classes
from ..data import TeacherStudentDatasetMapper, resolve_auto_settings
from ..modeling import TeacherStudentROIHeads
from ..trained_model import find_test_dataset, load_model

__all__ = ["ModelResults", "run_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelResults:
    """
    Where :func:`run_model` wrote what.

    Attributes:
        annotations: path of the dataset's json.
        image_root: folder of its images.
        seen_classes: names of the seen classes, from ``TEST.SEEN_CLASSES``, or
            ``DATASETS.SEEN_CLASSES`` where that is empty.
        results: {head: result file}, on the boxes that the model detects.
        gt_box_results: {head: result file}, on the ground-truth boxes and classes.
    """

    annotations: str
    image_root: str
    seen_classes: list[str]
    results: dict[str, str]
    gt_box_results: dict[str, str]


def run_model(
    config_file: str,
    weights: str | None,
    output_dir: str | os.PathLike,
    *,
    opts: Sequence = (),
    heads: Sequence[str] | None = None,
) -> ModelResults:
    """
    Run a trained model on its test dataset and write what it finds as COCO result files.

    The files are ``<output_dir>/<head>.json`` and ``<output_dir>/<head>_gt_boxes.json``. They hold
    the entries, in their order, that ``train_net.py --eval-only`` writes with
    ``TEST.MASK_HEAD <head>`` and with ``TEST.GT_BOXES`` off and on. An image goes through the
    backbone and the detector once; both heads get the same boxes. The first dataset of
    ``DATASETS.TEST`` is run.

    Args:
        config_file: of the model, as for ``train_net.py``.
        weights: checkpoint; None = the config's ``MODEL.WEIGHTS``.
        output_dir: made if new.
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the config file.
        heads: of "student" and "teacher"; None = all that the model has. The mask head of a model
            without a teacher is its "student".

    Raises:
        InputError: the config, the weights, the dataset, or the heads are wrong or lacking.
    """
    trained = load_model(config_file, weights=weights, opts=opts, heads=heads)
    cfg = trained.cfg
    cfg.TEST.GT_BOXES = True
    annotations, image_root = find_test_dataset(cfg)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=cfg.TEST.SEEN_CLASSES in ("", AUTO))
    spec = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
    seen = resolve_seen_classes(spec, trained.class_names)
    loader = build_detection_test_loader(
        cfg, cfg.DATASETS.TEST[0], mapper=TeacherStudentDatasetMapper(cfg, is_train=False)
    )

    found: dict[str, list[dict]] = {f"{head}{end}": [] for end in _ENDS for head in trained.heads}
    num_boxes = 0
    title = f"{cfg.DATASETS.TEST[0]}, {' and '.join(trained.heads)}"
    for inputs in tqdm(loader, desc=title, unit="image"):
        num_boxes += sum(len(x["instances"]) for x in inputs)
        for name, outputs in _run_heads(trained.model, inputs, trained.heads):
            for image, instances in zip(inputs, outputs):
                for entry in instances_to_coco_json(instances, image["image_id"]):
                    entry["category_id"] = trained.category_ids[entry["category_id"]]
                    found[name].append(entry)
    num_left_out = num_boxes - len(found[f"{trained.heads[0]}_gt_boxes"])
    if num_left_out:
        logger.warning(
            f"{annotations}: {num_left_out} objects have no result on ground-truth boxes, because "
            "their boxes have no area inside the image."
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in found.items():
        (folder / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")
    return ModelResults(
        annotations=annotations,
        image_root=image_root,
        seen_classes=[trained.class_names[i] for i in seen],
        results={x: str(folder / f"{x}.json") for x in trained.heads},
        gt_box_results={x: str(folder / f"{x}_gt_boxes.json") for x in trained.heads},
    )


# Of the names of result files: on detected and on ground-truth boxes.
_ENDS = ("", "_gt_boxes")


@torch.no_grad()
def _run_heads(
    model: GeneralizedRCNN, inputs: list[dict], heads: Sequence[str]
) -> Iterator[tuple[str, list[Instances]]]:
    """
    Do what :meth:`GeneralizedRCNN.inference` does, with one pass for all heads and kinds of boxes.

    Args:
        inputs: as for the model, with ``instances``.

    Yields:
        Name of the result file, and the instances of each image, in the frame of the original image
        and on the CPU.
    """
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    boxes = {"_gt_boxes": [_as_detections(x["instances"]).to(model.device) for x in inputs]}
    for head in heads:
        if isinstance(model.roi_heads, TeacherStudentROIHeads):
            model.roi_heads.test_mask_head = head
        for end in _ENDS:
            if end in boxes:
                # Copies, for the masks are added, and the boxes rescaled, in place.
                given = [_copy_boxes(x) for x in boxes[end]]
                found = model.roi_heads.forward_with_given_boxes(features, given)
            else:
                found, _ = model.roi_heads(images, features, proposals, None)
                boxes[end] = [_copy_boxes(x) for x in found]
            yield f"{head}{end}", [
                detector_postprocess(x, image["height"], image["width"]).to("cpu")
                for x, image in zip(found, inputs)
            ]


def _as_detections(targets: Instances) -> Instances:
    detections = Instances(targets.image_size)
    detections.pred_boxes = targets.gt_boxes
    detections.scores = torch.ones(len(targets))
    detections.pred_classes = targets.gt_classes
    return detections


def _copy_boxes(instances: Instances) -> Instances:
    copy = Instances(instances.image_size)
    copy.pred_boxes = Boxes(instances.pred_boxes.tensor.clone())
    copy.scores = instances.scores
    copy.pred_classes = instances.pred_classes
    return copy
