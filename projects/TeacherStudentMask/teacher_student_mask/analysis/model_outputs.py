"""From a trained model to result files in COCO's format, and the quality of its pseudo masks."""

import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from tqdm import tqdm

from ..class_splits import AUTO, match_classes, resolve_seen_classes
from ..coco_json import load_ground_truth
from ..data import (
    TeacherStudentDatasetMapper,
    dataset_classes,
    load_partial_coco_json,
    resolve_auto_settings,
)
from ..errors import InputError
from ..evaluation import compute_overlaps
from ..evaluation import overlap_bins as to_overlap_bins
from ..evaluation.overlap import OverlapBin
from ..modeling import (
    PSEUDO_MASK_METHODS,
    DenseCRF,
    GTBoxInference,
    PseudoMaskGenerator,
    predict_masks_on_boxes,
)
from ..modeling.mask_targets import crop_gt_masks, crop_pixels
from ..structures import ImageMask
from ..trained_model import TrainedModel, find_test_dataset, load_model

__all__ = ["ModelResults", "measure_pseudo_masks", "run_model"]

logger = logging.getLogger(__name__)


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
            if len(trained.heads) > 1:
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


def measure_pseudo_masks(
    config_file: str,
    weights: str | None,
    *,
    methods: Sequence[str] = PSEUDO_MASK_METHODS,
    overlap_bins: Sequence[float] = tuple(k / 10 for k in range(11)),
    opts: Sequence = (),
) -> dict:
    """
    Compare pseudo masks with the true masks of unseen objects, without training.

    For every non-crowd object of an unseen class in the first dataset of ``DATASETS.TEST`` both
    heads run on its ground-truth box. Each method then makes the target that the student would be
    trained on, by the config's threshold, clipping and exclusion. The true mask is cropped to the
    same M x M cells as a training target and used for the comparison only. Unlike in training the
    model is in evaluation mode, there is no augmentation but the resize of testing, and the ROI is
    the ground-truth box.

    IoU is measured over the cells. "none" gives soft masks, so for all methods intersection and
    union are the sums of the cells' minima and maxima; of binary masks that is the usual IoU. If
    both masks are empty it is 0, as in pycocotools.

    Args:
        config_file, weights, opts: of a model with a teacher, as for :func:`load_model`.
        methods: of :data:`PSEUDO_MASK_METHODS`.
        overlap_bins: edges of the bins over the overlap O, Eq. (1), rising from 0 to 1.

    Returns:
        ``{"num_objects": n, "mask_side": M, "methods": {METHOD: {"mask_iou": mean,
        "overlap_bins": [{"low", "high", "num_gt", "mask_iou"}, ...]}}}``. A mean over no object,
        and M where no object was measured, is None.

    Raises:
        InputError: the config, the weights or the dataset is wrong or lacking, or the model has no
            teacher.
    """
    bins = to_overlap_bins(overlap_bins)
    trained = load_model(config_file, weights=weights, opts=opts)
    model, cfg = trained.model, trained.cfg
    if "teacher" not in trained.heads:
        raise InputError(
            f"{config_file}: MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} with "
            f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME!r} makes no pseudo masks; give the "
            "config of a model with a teacher."
        )
    settings = cfg.MODEL.PSEUDO_MASK
    generators = {
        method: PseudoMaskGenerator(
            method=method,
            threshold=settings.THRESHOLD,
            clip_to_box=settings.CLIP_TO_BOX,
            exclude_seen=settings.EXCLUDE_SEEN,
            crf=DenseCRF.from_config(settings.CRF) if method == "crf" else None,
        )
        for method in methods
    }
    overlaps: list[float] = []
    ious: dict[str, list[float]] = {method: [] for method in generators}
    mask_side = None
    for inputs, rois, truth, overlaps_of_image in _unseen_objects(trained):
        rois = rois.to(model.device)
        probs = predict_masks_on_boxes(model, inputs, rois.gt_boxes.tensor, rois.gt_classes)
        mask_side = probs["student"].shape[-1]
        true_masks = crop_gt_masks([truth], mask_side, model.device).double()
        image = inputs["image"].to(model.device, torch.float32)[None]
        image = image.flip(1) if cfg.INPUT.FORMAT == "BGR" else image
        pixels = crop_pixels(image, [rois.proposal_boxes], mask_side)
        for method, generator in generators.items():
            masks = generator(probs["teacher"], probs["student"], [rois], pixels).double()
            unions = torch.maximum(masks, true_masks).sum(dim=(1, 2)).clamp(min=1e-9)
            intersections = torch.minimum(masks, true_masks).sum(dim=(1, 2))
            ious[method] += (intersections / unions).tolist()
        overlaps += overlaps_of_image
    return {
        "num_objects": len(overlaps),
        "mask_side": mask_side,
        "methods": {
            method: _summarize(np.array(overlaps), np.array(values), bins)
            for method, values in ious.items()
        },
    }


def _unseen_objects(
    trained: TrainedModel,
) -> Iterator[tuple[dict, Instances, Instances, list[float]]]:
    """
    The unseen objects that have a true mask, and a box with area in their image; image by image.

    Image and exclusion masks come from the mapper of the training, which forgets unseen masks
    before anything else; the true masks from a second one, whose seen classes are all. Yields the
    model's input, what training knows of the objects, their true masks, and their overlaps.
    """
    json_file, image_root = find_test_dataset(trained.cfg)
    coco = load_ground_truth(json_file, reads_masks=False)
    overlap_of = compute_overlaps(coco)
    cfg = resolve_auto_settings(trained.cfg).clone()
    # By the model's ids, as the annotations below.
    seen = resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, trained.class_names)
    # The mapper looks there for the classes, which the training data need not be at hand to tell.
    cfg.DATASETS.TRAIN, cfg.DATASETS.SEEN_CLASSES = cfg.DATASETS.TEST[:1], "all"
    # Of the training, but for the resize of testing in the place of augmentations.
    resize = {"is_train": True, "augmentations": utils.build_augmentation(cfg, is_train=False)}
    mapper = TeacherStudentDatasetMapper(cfg, seen_classes=seen, **resize)
    cfg.INPUT.RECTANGLE_AS_BOX_ONLY = False
    every_class = range(len(trained.class_names))
    truth_mapper = TeacherStudentDatasetMapper(cfg, seen_classes=every_class, **resize)
    names, _ = dataset_classes(cfg.DATASETS.TEST[0])
    model_ids = match_classes(names, trained.class_names, json_file)
    num_left_out = 0
    images = load_partial_coco_json(json_file, image_root)
    for image in tqdm(images, desc=f"{cfg.DATASETS.TEST[0]}, pseudo masks", unit="image"):
        unseen, overlaps = [], []
        # Both lists are in the order of the json.
        entries = coco.imgToAnns[image["image_id"]]
        for annotation, entry in zip(image["annotations"], entries, strict=True):
            annotation["category_id"] = model_ids[annotation["category_id"]]
            if annotation["iscrowd"] or annotation["category_id"] in mapper.seen_classes:
                continue
            x, y, w, h = annotation["bbox"]
            if min(x + w, image["width"]) > max(x, 0) and min(y + h, image["height"]) > max(y, 0):
                unseen.append(annotation)
                overlaps.append(overlap_of[entry["id"]])
            else:
                num_left_out += 1
        if not unseen:
            continue
        truth = truth_mapper({**image, "annotations": unseen})["instances"]
        has_mask = truth.gt_has_mask
        num_left_out += int((~has_mask).sum())
        truth, overlaps = truth[has_mask], np.array(overlaps)[has_mask.numpy()].tolist()
        if not overlaps:
            continue
        example = mapper(image)
        rois = Instances(truth.image_size, gt_boxes=truth.gt_boxes, gt_classes=truth.gt_classes)
        rois.proposal_boxes = truth.proposal_boxes = truth.gt_boxes
        union = example["instances"].gt_exclusion_masks.tensor
        rois.gt_exclusion_masks = ImageMask(union, len(rois))
        yield {"image": example["image"]}, rois, truth, overlaps
    if num_left_out:
        logger.warning(
            f"{json_file}: the pseudo masks of {num_left_out} unseen objects are not measured: they"
            " have no true mask, or a box without area in their image."
        )


def _summarize(overlaps: np.ndarray, ious: np.ndarray, bins: list[OverlapBin]) -> dict:
    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) > 0 else None

    rows = []
    for x in bins:
        values = ious[x.contains(overlaps)]
        rows.append({"low": x.low, "high": x.high, "num_gt": len(values), "mask_iou": mean(values)})
    return {"mask_iou": mean(ious), "overlap_bins": rows}
