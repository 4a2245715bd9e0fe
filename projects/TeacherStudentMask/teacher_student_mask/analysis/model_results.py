"""From a trained model to result files in COCO's format."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

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
from .trained_model import find_test_dataset, load_config, load_model

__all__ = ["PROTOCOLS", "ModelResults", "run_model"]

logger = logging.getLogger(__name__)

PROTOCOLS = ("detections", "gt_boxes")

_FILE_NAMES = {"detections": "{head}.json", "gt_boxes": "{head}_gt_boxes.json"}


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
    output_dir: str,
    *,
    opts: Sequence = (),
    heads: Sequence[str] | None = None,
    protocols: Sequence[str] = PROTOCOLS,
) -> ModelResults:
    """
    Run a trained model on its test dataset and write what it finds as COCO result files.

    The files are ``<output_dir>/<head>.json`` and ``<output_dir>/<head>_gt_boxes.json``. They hold
    the entries, in their order, that ``train_net.py --eval-only`` writes with
    ``TEST.MASK_HEAD <head>`` and with ``TEST.GT_BOXES`` off and on. An image goes through the
    backbone and the detector once; both heads get the same boxes. A file appears when it is
    complete, and replaces an earlier one. The first dataset of ``DATASETS.TEST`` is run.

    Args:
        config_file: of the model, as for ``train_net.py``.
        weights: checkpoint; None = the config's ``MODEL.WEIGHTS``.
        output_dir: made if new.
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the config file.
        heads: of "student" and "teacher"; None = all that the model has. The mask head of a model
            without a teacher is its "student".
        protocols: of "detections" (the model's own boxes) and "gt_boxes" (the boxes and classes of
            the non-crowd objects, each with score 1).

    Raises:
        ValueError: the config, the weights, the dataset, or an argument is wrong or lacking; see
            :func:`load_config`, :func:`find_test_dataset`, :func:`load_model`.
    """
    protocols = tuple(dict.fromkeys(protocols))
    if not protocols or set(protocols) - set(PROTOCOLS):
        raise ValueError(f"protocols is {protocols!r}; allowed: {', '.join(PROTOCOLS)}.")
    cfg = load_config(config_file, weights, opts)
    cfg.TEST.GT_BOXES = "gt_boxes" in protocols
    dataset = find_test_dataset(cfg)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=cfg.TEST.SEEN_CLASSES in ("", AUTO))
    spec = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
    seen_classes = [dataset.classes[i] for i in resolve_seen_classes(spec, dataset.classes)]
    model, heads = load_model(cfg, heads)
    loader = build_detection_test_loader(
        cfg, dataset.name, mapper=TeacherStudentDatasetMapper(cfg, is_train=False)
    )

    os.makedirs(output_dir, exist_ok=True)
    paths = {
        protocol: {h: os.path.join(output_dir, _FILE_NAMES[protocol].format(head=h)) for h in heads}
        for protocol in protocols
    }
    start = time.perf_counter()
    num_boxes = num_masks = 0
    with ExitStack() as stack:
        files = {
            (protocol, head): stack.enter_context(_ResultFile(path))
            for protocol, path_of_head in paths.items()
            for head, path in path_of_head.items()
        }
        for inputs in tqdm(loader, desc=f"{dataset.name}, {' and '.join(heads)}", unit="image"):
            if "gt_boxes" in protocols:
                num_boxes += sum(len(x["instances"]) for x in inputs) * len(heads)
            for protocol, head, found in _run_heads(model, inputs, heads, protocols):
                for image, instances in zip(inputs, found):
                    entries = instances_to_coco_json(instances, image["image_id"])
                    for entry in entries:
                        entry["category_id"] = dataset.category_ids[entry["category_id"]]
                    files[protocol, head].add(entries)
                    num_masks += len(entries) if protocol == "gt_boxes" else 0
    seconds, num_images = time.perf_counter() - start, len(loader.dataset)
    logger.info(
        f"Ran {' and '.join(heads)} on {num_images} images of {dataset.name} in {seconds:.0f} s, "
        f"{seconds / max(1, num_images):.3f} s an image; results: {output_dir}"
    )
    if num_masks < num_boxes:
        logger.warning(
            f"{dataset.annotations}: {(num_boxes - num_masks) // len(heads)} objects have no "
            "result on ground-truth boxes, because their boxes have no area inside the image."
        )
    return ModelResults(
        annotations=dataset.annotations,
        image_root=dataset.image_root,
        seen_classes=seen_classes,
        results=paths.get("detections", {}),
        gt_box_results=paths.get("gt_boxes", {}),
    )


@torch.no_grad()
def _run_heads(
    model: GeneralizedRCNN, inputs: list[dict], heads: Sequence[str], protocols: Sequence[str]
) -> Iterator[tuple[str, str, list[Instances]]]:
    """
    Do what :meth:`GeneralizedRCNN.inference` does, with one pass for all heads and protocols.

    Args:
        inputs: as for the model, with ``instances`` for the protocol "gt_boxes".

    Yields:
        Protocol, head, and the instances of each image, in the frame of the original image and on
        the CPU.
    """
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    boxes = {}
    if "gt_boxes" in protocols:
        boxes["gt_boxes"] = [_as_detections(x["instances"]).to(model.device) for x in inputs]
    for head in heads:
        if isinstance(model.roi_heads, TeacherStudentROIHeads):
            model.roi_heads.test_mask_head = head
        for protocol in protocols:
            if protocol in boxes:
                # Copies, for the masks are added, and the boxes rescaled, in place.
                given = [_copy_boxes(x) for x in boxes[protocol]]
                found = model.roi_heads.forward_with_given_boxes(features, given)
            else:
                proposals, _ = model.proposal_generator(images, features, None)
                found, _ = model.roi_heads(images, features, proposals, None)
                boxes[protocol] = [_copy_boxes(x) for x in found]
            yield protocol, head, [
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


class _ResultFile:
    """A json list, written image by image, that takes its place only when it is complete."""

    def __init__(self, path: str):
        self._path = path
        self._part = f"{path}.part"
        self._separator = ""

    def __enter__(self) -> _ResultFile:
        self._file = open(self._part, "w", encoding="utf-8")
        self._file.write("[")
        return self

    def add(self, entries: list[dict]) -> None:
        for entry in entries:
            self._file.write(self._separator + json.dumps(entry))
            self._separator = ", "

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._file.write("]")
        self._file.close()
        if error_type is None:
            os.replace(self._part, self._path)
        else:
            os.remove(self._part)
