"""How good the pseudo masks of unseen objects are where their true masks are known."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from tqdm import tqdm

from ..evaluation import OverlapBin
from ..evaluation import overlap_bins as to_overlap_bins
from ..modeling import (
    PSEUDO_MASK_METHODS,
    DenseCRF,
    PseudoMaskGenerator,
    TeacherStudentROIHeads,
)
from ..modeling.mask_targets import crop_gt_masks, crop_pixels
from .trained_model import find_test_dataset, load_config, load_model
from .unseen_objects import UnseenObjectReader

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
        ValueError: an argument, the config, the weights or the dataset is wrong or lacking, or the
            model has no teacher.
    """
    methods = tuple(dict.fromkeys(methods))
    _check_arguments(methods, max_images)
    bins = to_overlap_bins(overlap_bins)
    cfg = load_config(config_file, weights, opts)
    dataset = find_test_dataset(cfg)
    generators = _make_generators(cfg, methods)
    model, _ = load_model(cfg)
    if not isinstance(model.roi_heads, TeacherStudentROIHeads):
        raise ValueError(
            f"{config_file}: MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}, which makes no "
            "pseudo masks; give the config of a model with TeacherStudentROIHeads."
        )
    reader = UnseenObjectReader(cfg, dataset)
    images = reader.images[:max_images]

    start = time.perf_counter()
    overlaps: list[float] = []
    ious: dict[str, list[float]] = {method: [] for method in generators}
    mask_side = None
    for image in tqdm(images, desc=f"{dataset.name}, pseudo masks", unit="image"):
        objects = reader.read(image)
        if objects is None:
            continue
        rois = objects.rois.to(model.device)
        teacher_probs, student_probs, pixels = _predict(model, objects.inputs, rois)
        mask_side = student_probs.shape[-1]
        truth = crop_gt_masks([objects.truth], mask_side, model.device)
        roi_images = None
        if any(x.needs_images for x in generators.values()):
            roi_images = crop_pixels(pixels, [rois.proposal_boxes], mask_side)
        for method, generator in generators.items():
            masks = generator(teacher_probs, student_probs, [rois], roi_images)
            ious[method] += _soft_ious(masks, truth).tolist()
        overlaps += objects.overlaps
    seconds = time.perf_counter() - start
    reader.log_left_out()
    logger.info(
        f"Measured the pseudo masks of {len(overlaps)} objects in {len(images)} images of "
        f"{dataset.name} in {seconds:.0f} s, {seconds / max(1, len(images)):.3f} s an image"
    )
    return {
        "num_objects": len(overlaps),
        "mask_side": mask_side,
        "methods": {
            method: _summarize(np.array(overlaps), np.array(values), bins)
            for method, values in ious.items()
        },
    }


def _check_arguments(methods: tuple, max_images: int | None) -> None:
    if not methods or set(methods) - set(PSEUDO_MASK_METHODS):
        raise ValueError(
            f"methods is {methods!r}; allowed: one or more of {', '.join(PSEUDO_MASK_METHODS)}."
        )
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images is {max_images}; it must be at least 1, or None for all.")


def _make_generators(cfg: CfgNode, methods: Iterable[str]) -> dict[str, PseudoMaskGenerator]:
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

    Args:
        inputs: of the model, one image.
        rois: ``proposal_boxes`` and ``gt_classes``, on the model's device.

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
    rows = []
    for x in bins:
        selected = ious[x.contains(overlaps)]
        row = {"low": x.low, "high": x.high, "num_gt": len(selected), "mask_iou": _mean(selected)}
        rows.append(row)
    return {"mask_iou": _mean(ious), "overlap_bins": rows}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) > 0 else None
