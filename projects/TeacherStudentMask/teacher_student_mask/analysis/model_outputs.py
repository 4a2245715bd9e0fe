"""From a trained model to result files in COCO's format."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from tqdm import tqdm

from ..class_splits import AUTO, match_classes, resolve_seen_classes
from ..data import TeacherStudentDatasetMapper, dataset_classes, resolve_auto_settings
from ..modeling import GTBoxInference, TeacherStudentROIHeads
from ..trained_model import find_test_dataset, load_model

__all__ = ["ModelResults", "run_model"]


@dataclass(frozen=True)
class ModelResults:
    """
    Where :func:`run_model` wrote what: {head: result file}, on the boxes that the model detects
    and on the ground-truth boxes and classes; the dataset's json and folder of images, and the
    names of its seen classes.
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
) -> ModelResults:
    """
    Run a trained model on its test dataset and write what it finds as COCO result files.

    The files are ``<output_dir>/<head>.json`` and ``<output_dir>/<head>_gt_boxes.json``, for the
    head "student" and, where there is one, "teacher". They hold the entries, in their order, that
    ``train_net.py --eval-only`` writes with ``TEST.MASK_HEAD <head>`` and with ``TEST.GT_BOXES``
    off and on. The first dataset of ``DATASETS.TEST`` is run.

    Args:
        config_file, weights, opts: as for :func:`load_model`.
        output_dir: made if new.

    Raises:
        InputError: the config, the weights or the dataset is wrong or lacking.
    """
    trained = load_model(config_file, weights=weights, opts=opts)
    cfg = trained.cfg
    cfg.TEST.GT_BOXES = True
    annotations, image_root = find_test_dataset(cfg)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=cfg.TEST.SEEN_CLASSES in ("", AUTO))
    spec = cfg.TEST.SEEN_CLASSES or cfg.DATASETS.SEEN_CLASSES
    seen = resolve_seen_classes(spec, trained.class_names)
    names, ids = dataset_classes(cfg.DATASETS.TEST[0])
    model_ids = match_classes(names, trained.class_names, annotations)
    category_ids = dict(zip(model_ids, ids))
    mapper = TeacherStudentDatasetMapper(cfg, is_train=False, model_class_ids=model_ids)
    loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=mapper)

    model, roi_heads = trained.model, trained.model.roi_heads
    programs = {"": model, "_gt_boxes": GTBoxInference(model)}
    found = {f"{head}{end}": [] for end in programs for head in trained.heads}
    title = f"{cfg.DATASETS.TEST[0]}, {' and '.join(trained.heads)}"
    for inputs in tqdm(loader, desc=title, unit="image"):
        for head, (end, program) in itertools.product(trained.heads, programs.items()):
            if isinstance(roi_heads, TeacherStudentROIHeads):
                roi_heads.test_mask_head = head
            with torch.no_grad():
                outputs = program(inputs)
            for image, output in zip(inputs, outputs):
                instances = output["instances"].to("cpu")
                for entry in instances_to_coco_json(instances, image["image_id"]):
                    # The dataset may lack classes of the model.
                    if entry["category_id"] in category_ids:
                        entry["category_id"] = category_ids[entry["category_id"]]
                        found[f"{head}{end}"].append(entry)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in found.items():
        (folder / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")
    return ModelResults(
        annotations=annotations,
        image_root=image_root,
        seen_classes=[trained.class_names[i] for i in seen if i in category_ids],
        results={x: str(folder / f"{x}.json") for x in trained.heads},
        gt_box_results={x: str(folder / f"{x}_gt_boxes.json") for x in trained.heads},
    )
