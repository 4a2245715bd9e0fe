"""The quality of a model's pseudo masks, where the truth is known."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances
from tqdm import tqdm

from ..class_splits import match_classes, resolve_seen_classes
from ..coco_json import load_ground_truth
from ..data import (
    TeacherStudentDatasetMapper,
    dataset_classes,
    load_partial_coco_json,
    resolve_auto_settings,
)
from ..evaluation import compute_overlaps
from ..evaluation import overlap_bins as to_overlap_bins
from ..evaluation.overlap import OverlapBin
from ..modeling import PSEUDO_MASK_METHODS, PseudoMaskGenerator, predict_masks_on_boxes
from ..modeling.mask_targets import crop_gt_masks, crop_pixels
from ..structures import ImageMask
from ..trained_model import TrainedModel, find_test_dataset

__all__ = ["measure_pseudo_masks"]

logger = logging.getLogger(__name__)


def measure_pseudo_masks(
    trained: TrainedModel,
    *,
    methods: Sequence[str] = PSEUDO_MASK_METHODS,
    overlap_bins: Sequence[float] = tuple(k / 10 for k in range(11)),
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
        trained: a model with a teacher.
        methods: of :data:`PSEUDO_MASK_METHODS`.
        overlap_bins: edges of the bins over the overlap O, Eq. (1), rising from 0 to 1.

    Returns:
        ``{"num_objects": n, "mask_side": M, "methods": {METHOD: {"mask_iou": mean,
        "overlap_bins": [{"low", "high", "num_gt", "mask_iou"}, ...]}}}``. A mean over no object,
        and M where no object was measured, is None.

    Raises:
        InputError: the dataset is wrong or lacking.
    """
    bins = to_overlap_bins(overlap_bins)
    model, cfg, generators = trained.model, trained.cfg, {}
    for method in methods:
        chosen = cfg.clone()
        chosen.MODEL.PSEUDO_MASK.METHOD = method
        generators[method] = PseudoMaskGenerator.from_config(chosen)
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
        if len(truth) < len(unseen):  # the resize leaves nothing of a mask
            num_left_out += len(unseen)
            continue
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
            " have no true mask, or a box without area in their image, or the resize leaves nothing"
            " of a mask of their image."
        )


def _summarize(overlaps: np.ndarray, ious: np.ndarray, bins: list[OverlapBin]) -> dict:
    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) > 0 else None

    rows = []
    for x in bins:
        values = ious[x.contains(overlaps)]
        rows.append({"low": x.low, "high": x.high, "num_gt": len(values), "mask_iou": mean(values)})
    return {"mask_iou": mean(ious), "overlap_bins": rows}
