"""How good the pseudo masks of unseen objects are where their true masks are known."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from tqdm import tqdm

from ..coco_json import has_mask, is_from_model, load_ground_truth, valid_polygons
from ..data import TeacherStudentDatasetMapper, load_partial_coco_json, resolve_auto_settings
from ..errors import InputError
from ..evaluation import OverlapBin, compute_overlaps
from ..evaluation import overlap_bins as to_overlap_bins
from ..modeling import (
    PSEUDO_MASK_METHODS,
    DenseCRF,
    PseudoMaskGenerator,
    TeacherStudentROIHeads,
)
from ..modeling.mask_targets import crop_gt_masks, crop_pixels
from ..structures import ImageMask
from ..trained_model import TrainedModel, find_test_dataset, load_model

__all__ = ["measure_pseudo_masks"]

logger = logging.getLogger(__name__)


def measure_pseudo_masks(
    config_file: str,
    weights: str | None,
    *,
    methods: Sequence[str] = PSEUDO_MASK_METHODS,
    overlap_bins: Sequence[float] = tuple(k / 10 for k in range(11)),
    opts: Sequence = (),
    max_images: int | None = None,
) -> dict:
    """
    Compare pseudo masks with the true masks of unseen objects, without training.

    For every non-crowd object of an unseen class in the first dataset of ``DATASETS.TEST`` both
    heads run on its ground-truth box. Each method then makes the target that the student would be
    trained on: threshold, clipping and exclusion are the config's, and the exclusion masks are
    those of the image's objects of ``DATASETS.SEEN_CLASSES``. The true mask is cropped to the same
    M x M cells as a training target and used for the comparison only. Unlike in training the model
    is in evaluation mode, there is no augmentation but the resize of testing, and the ROI is the
    ground-truth box, as with ``TRAIN_ON_GT_BOXES``.

    IoU is measured over the cells. "none" gives soft masks, so for all methods intersection and
    union are the sums of the cells' minima and maxima; of binary masks that is the usual IoU. If
    both masks are empty it is 0, as in pycocotools.

    Args:
        config_file: of a model with a teacher, as for ``train_net.py``.
        weights: checkpoint; None = the config's ``MODEL.WEIGHTS``.
        methods: of :data:`PSEUDO_MASK_METHODS`. "crf" is left out, with a warning, where the
            config names a backend for it that is not installed.
        overlap_bins: edges of the bins over the overlap O, Eq. (1), rising from 0 to 1.
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the config file.
        max_images: only the first images of the dataset, by image id; None = all.

    Returns:
        ``{"num_objects": n, "mask_side": M, "methods": {METHOD: {"mask_iou": mean,
        "overlap_bins": [{"low", "high", "num_gt", "mask_iou"}, ...]}}}``. The first bin is O = 0
        (low = high = 0), the others are low < O <= high. A mean over no object, and M where no
        object was measured, is None.

    Raises:
        InputError: the config, the weights or the dataset is wrong or lacking, or the model has no
            teacher.
        ValueError: another argument is wrong.
    """
    methods = tuple(dict.fromkeys(methods))
    if not methods or set(methods) - set(PSEUDO_MASK_METHODS):
        raise ValueError(
            f"methods is {methods!r}; allowed: one or more of {', '.join(PSEUDO_MASK_METHODS)}."
        )
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; it must be at least 1, or None for all.")
    bins = to_overlap_bins(overlap_bins)
    trained = load_model(config_file, weights=weights, opts=opts)
    model, cfg = trained.model, trained.cfg
    if not isinstance(model.roi_heads, TeacherStudentROIHeads):
        raise InputError(
            f"{config_file}: MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}, which makes no "
            "pseudo masks; give the config of a model with TeacherStudentROIHeads."
        )
    generators = _make_generators(cfg, methods)
    objects = _UnseenObjects(trained)

    overlaps: list[float] = []
    ious: dict[str, list[float]] = {method: [] for method in generators}
    mask_side = None
    images = objects.images[:max_images]
    for image in tqdm(images, desc=f"{cfg.DATASETS.TEST[0]}, pseudo masks", unit="image"):
        found = objects.read(image)
        if found is None:
            continue
        inputs, rois, truth, overlaps_of_image = found
        rois = rois.to(model.device)
        teacher_probs, student_probs, pixels = _predict(model, inputs, rois)
        mask_side = student_probs.shape[-1]
        true_masks = crop_gt_masks([truth], mask_side, model.device)
        roi_images = None
        if any(x.needs_images for x in generators.values()):
            roi_images = crop_pixels(pixels, [rois.proposal_boxes], mask_side)
        for method, generator in generators.items():
            masks = generator(teacher_probs, student_probs, [rois], roi_images)
            ious[method] += _soft_ious(masks, true_masks).tolist()
        overlaps += overlaps_of_image
    if objects.num_left_out:
        logger.warning(
            f"{cfg.DATASETS.TEST[0]}: the pseudo masks of {objects.num_left_out} unseen objects "
            "are not measured: they have no true mask, or a box without area in their image."
        )
    return {
        "num_objects": len(overlaps),
        "mask_side": mask_side,
        "methods": {
            method: _summarize(np.array(overlaps), np.array(values), bins)
            for method, values in ious.items()
        },
    }


class _UnseenObjects:
    """
    The unseen objects of images: what training knows of them, and their true masks.

    Image and exclusion masks come from the training mapper, which forgets unseen masks before
    anything else; the true masks are read beside it.
    """

    def __init__(self, trained: TrainedModel):
        cfg = trained.cfg
        json_file, image_root = find_test_dataset(cfg)
        self._coco = load_ground_truth(json_file, reads_masks=False)
        if sorted(self._coco.cats) != trained.category_ids:
            raise InputError(
                f"{json_file}: the classes of {cfg.DATASETS.TEST[0]!r} are not in the order of "
                "their category ids; register the json with register_partial_coco."
            )
        self._overlaps = compute_overlaps(self._coco)
        self.images = load_partial_coco_json(json_file, image_root)
        self._mask_format = cfg.INPUT.MASK_FORMAT
        self.num_left_out = 0
        cfg = resolve_auto_settings(cfg).clone()
        cfg.defrost()
        # The mapper looks there for the classes.
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST[:1]
        augmentations = utils.build_augmentation(cfg, is_train=False)
        self._mapper = TeacherStudentDatasetMapper(cfg, is_train=True, augmentations=augmentations)
        if len(self._mapper.seen_classes) == len(trained.class_names):
            logger.warning(
                f"DATASETS.SEEN_CLASSES {cfg.DATASETS.SEEN_CLASSES!r} are all classes: there is no "
                "unseen object whose pseudo mask could be measured."
            )

    def read(self, image: dict) -> tuple[dict, Instances, Instances, list[float]] | None:
        """
        Args:
            image: one of ``self.images``.

        Returns:
            The model's input, which holds nothing of the objects; of the n unseen objects that have
            a true mask and a box with area in the image: what training knows (``proposal_boxes``,
            ``gt_boxes``, ``gt_classes``, ``gt_exclusion_masks``), the true masks
            (``proposal_boxes``, ``gt_masks``, ``gt_has_mask``), and the overlap O of each. None
            where n is 0.
        """
        unseen, overlaps = [], []
        # Both lists are in the order of the json.
        entries = self._coco.imgToAnns[image["image_id"]]
        for annotation, entry in zip(image["annotations"], entries, strict=True):
            if annotation["iscrowd"] or annotation["category_id"] in self._mapper.seen_classes:
                continue
            segmentation = self._true_segmentation(entry)
            if segmentation is None:
                self.num_left_out += 1
                continue
            kept = {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
            unseen.append({**kept, "segmentation": segmentation})
            overlaps.append(self._overlaps[entry["id"]])
        if not unseen:
            return None
        example = self._mapper(image)
        size = tuple(example["image"].shape[-2:])
        # As the mapper transforms objects with a mask: the resize of testing is all there is.
        resize = T.TransformList([T.ResizeTransform(image["height"], image["width"], *size)])
        unseen = [utils.transform_instance_annotations(x, resize, size) for x in unseen]
        is_polygon = all(isinstance(x["segmentation"], list) for x in unseen)
        mask_format = self._mask_format if is_polygon else "bitmask"
        truth = utils.annotations_to_instances(unseen, size, mask_format)
        has_area = truth.gt_boxes.nonempty(threshold=1e-5)  # as the mapper judges
        self.num_left_out += int((~has_area).sum())
        truth = truth[has_area]
        if len(truth) == 0:
            return None
        truth.gt_has_mask = torch.ones(len(truth), dtype=torch.bool)
        rois = Instances(size, gt_boxes=truth.gt_boxes, gt_classes=truth.gt_classes)
        rois.proposal_boxes = truth.proposal_boxes = truth.gt_boxes
        union = example["instances"].gt_exclusion_masks.tensor
        rois.gt_exclusion_masks = ImageMask(union, len(rois))
        inputs = {"image": example["image"], "file_name": image["file_name"]}
        return inputs, rois, truth, list(itertools.compress(overlaps, has_area))

    def _true_segmentation(self, entry: dict) -> list | dict | None:
        # RLEs compressed, for that is what Detectron2 transforms; None where there is no pixel.
        if is_from_model(entry) or not has_mask(entry):
            return None
        if isinstance(entry["segmentation"], list):
            return valid_polygons(entry["segmentation"])
        rle = self._coco.annToRLE(entry)
        return rle if mask_util.area(rle) > 0 else None


def _make_generators(cfg: CfgNode, methods: Sequence[str]) -> dict[str, PseudoMaskGenerator]:
    settings = cfg.MODEL.PSEUDO_MASK
    generators = {}
    for method in methods:
        crf = None
        if method == "crf":
            try:
                crf = DenseCRF.from_config(settings.CRF)
            except ImportError as error:
                logger.warning(f"Pseudo masks by 'crf' are left out: {error}")
                continue
        generators[method] = PseudoMaskGenerator(
            method=method,
            threshold=settings.THRESHOLD,
            clip_to_box=settings.CLIP_TO_BOX,
            exclude_seen=settings.EXCLUDE_SEEN,
            crf=crf,
        )
    return generators


@torch.no_grad()
def _predict(
    model: GeneralizedRCNN, inputs: dict, rois: Instances
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Run both heads as in training, but in evaluation mode.

    Returns:
        The teacher's probabilities, shape (R, M_t, M_t); the student's in the channel of each
        ROI's class, shape (R, M, M); the pixels, shape (1, 3, H, W), RGB in 0-255.
    """
    heads = model.roi_heads
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    teacher_logits, student_logits, _ = heads.compute_mask_logits(features, [rois])
    return teacher_logits.sigmoid(), student_logits.sigmoid(), heads.to_rgb(images.tensor)


def _soft_ious(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    # (R, M, M) each, in [0, 1] -> (R,).
    masks, truth = masks.double().flatten(1), truth.double().flatten(1)
    unions = torch.maximum(masks, truth).sum(dim=1)
    return torch.minimum(masks, truth).sum(dim=1) / unions.clamp(min=1e-9)


def _summarize(overlaps: np.ndarray, ious: np.ndarray, bins: list[OverlapBin]) -> dict:
    def mean(values: np.ndarray) -> float | None:
        return float(values.mean()) if len(values) > 0 else None

    rows = []
    for x in bins:
        selected = ious[x.contains(overlaps)]
        row = {"low": x.low, "high": x.high, "num_gt": len(selected), "mask_iou": mean(selected)}
        rows.append(row)
    return {"mask_iou": mean(ious), "overlap_bins": rows}
