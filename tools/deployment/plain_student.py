"""The student of our models as a plain Detectron2 Mask R-CNN: its config and its weights."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import ROI_BOX_HEAD_REGISTRY, ROI_MASK_HEAD_REGISTRY, build_model
from detectron2.structures import Instances
from torch import nn

from inference.setup import UsageError

__all__ = ["changed_keys", "export_plain", "largest_difference", "plain_config", "plain_model"]

# Ours -> what computes the same in Detectron2, where it can.
ROI_HEADS = {
    "TeacherStudentROIHeads": "StandardROIHeads",
    "PartiallySupervisedROIHeads": "StandardROIHeads",
}
MASK_HEADS = {"MaskRCNNConvMultiUpsampleHead": "MaskRCNNConvUpsampleHead"}
# Whose modules a plain model may have.
PACKAGES = ("torch", "detectron2", "fvcore")
# Boxes and scores are those of the same operations. Of the masks our heads compute one class each,
# and add the products of the last layer in another order: 2e-5 for a ResNet-50 with large weights.
TOLERANCE = 1e-4
NUM_CHECKS, CHECK_SIDE = 3, 320


def plain_config(cfg: CfgNode) -> CfgNode:
    """
    The values of a config for Detectron2's own keys.

    Args:
        cfg: with this project's keys; not changed.

    Returns:
        A config with Detectron2's keys alone, whose ROI heads and mask head are Detectron2's where
        they compute the same as ours.

    Raises:
        UsageError: what the student computes depends on one of our keys.
    """
    plain = get_cfg()
    _copy_values(cfg, plain)
    if cfg.MODEL.ROI_MASK_PRIOR.NAME:
        raise UsageError(
            f"MODEL.ROI_MASK_PRIOR.NAME is {cfg.MODEL.ROI_MASK_PRIOR.NAME!r}; a plain Mask R-CNN "
            "has no mask prior."
        )
    mask_head = plain.MODEL.ROI_MASK_HEAD
    if mask_head.NAME in MASK_HEADS and cfg.MODEL.ROI_MASK_HEAD.NUM_DECONV != 1:
        raise UsageError(
            f"MODEL.ROI_MASK_HEAD.NUM_DECONV is {cfg.MODEL.ROI_MASK_HEAD.NUM_DECONV}; the mask "
            "head of a plain Mask R-CNN has one deconvolution."
        )
    mask_head.NAME = MASK_HEADS.get(mask_head.NAME, mask_head.NAME)
    heads = {
        "ROI_MASK_HEAD": (ROI_MASK_HEAD_REGISTRY, mask_head.NAME),
        "ROI_BOX_HEAD": (ROI_BOX_HEAD_REGISTRY, plain.MODEL.ROI_BOX_HEAD.NAME),
    }
    for key, (registry, name) in heads.items():
        package = registry.get(name).__module__.partition(".")[0]
        if package != "detectron2":
            raise UsageError(
                f"MODEL.{key}.NAME is {name!r}, a class of {package}, which a plain Mask R-CNN "
                "does not have."
            )
    plain.MODEL.ROI_HEADS.NAME = ROI_HEADS.get(plain.MODEL.ROI_HEADS.NAME, "")
    if not plain.MODEL.ROI_HEADS.NAME:
        raise UsageError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}; what can be exported: "
            f"{', '.join(ROI_HEADS)}."
        )
    return plain


def _copy_values(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode):
            _copy_values(source[key], value)
        else:
            target[key] = source[key]


def plain_model(cfg: CfgNode, source: nn.Module) -> nn.Module:
    """
    Build Detectron2's model and give it the weights of ours.

    Args:
        cfg: of :func:`plain_config`.
        source: our model.

    Raises:
        UsageError: a part of the model is not Detectron2's, or the weights do not fit.
    """
    model = build_model(cfg).eval()
    for name, module in model.named_modules():
        package = type(module).__module__.partition(".")[0]
        if package not in PACKAGES:
            raise UsageError(
                f"{name} is a {type(module).__name__} of {package}, which a plain Mask R-CNN does "
                "not have."
            )
    weights = {
        name: x for name, x in source.state_dict().items() if "teacher_mask_head" not in name
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"The weights do not fit a plain Mask R-CNN: {error}") from error
    return model


@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module) -> tuple[float, int]:
    """
    Compare what two models find on random images.

    Returns:
        The largest difference of boxes in pixels, scores, and mask probabilities (infinity where
        the number or the classes of the objects differ), and the number of objects compared.
    """
    generator = torch.Generator().manual_seed(0)
    difference, count = 0.0, 0
    for _ in range(NUM_CHECKS):
        image = torch.rand(3, CHECK_SIDE, CHECK_SIDE, generator=generator) * 255
        a, b = (m.inference([{"image": image}], do_postprocess=False)[0] for m in (first, second))
        if len(a) != len(b) or not torch.equal(a.pred_classes, b.pred_classes):
            return float("inf"), count
        count += len(a)
        for x, y in zip(_values(a), _values(b)):
            if x.numel() > 0:
                difference = max(difference, (x - y).abs().max().item())
    return difference, count


def _values(instances: Instances) -> list[torch.Tensor]:
    return [instances.pred_boxes.tensor, instances.scores, instances.pred_masks]


def changed_keys(cfg: CfgNode, default: CfgNode) -> dict:
    """What differs from the defaults, nested; of another release of Detectron2 keys may differ."""
    changes = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            below = changed_keys(value, default[key])
            changes.update({key: below} if below else {})
        elif value != default[key]:
            changes[key] = value
    return changes


def export_plain(cfg: CfgNode, model: nn.Module, folder: Path) -> tuple[dict[str, bytes], str]:
    """
    Make the files of a plain Detectron2 model.

    Args:
        cfg, model: of the student; not changed.
        folder: where the files will be.

    Returns:
        What the files hold, by their names, and what was compared.

    Raises:
        UsageError: the model is none, or finds something else.
    """
    plain = plain_config(cfg)
    exported = plain_model(plain, model)
    predictors = [x.roi_heads.box_predictor for x in (model, exported)]
    thresholds = [x.test_score_thresh for x in predictors]
    # On the thresholds of the config a model may find nothing in noise.
    for predictor in predictors:
        predictor.test_score_thresh = 0.0
    difference, num_objects = largest_difference(model, exported)
    for predictor, threshold in zip(predictors, thresholds):
        predictor.test_score_thresh = threshold
    if not difference <= TOLERANCE:
        raise UsageError(
            f"The plain model finds something else on random images: a difference of "
            f"{difference:.1e}. Nothing was written."
        )
    plain.MODEL.WEIGHTS, plain.OUTPUT_DIR = str(folder / "model.pth"), get_cfg().OUTPUT_DIR
    changes = {"VERSION": plain.VERSION, **changed_keys(plain, get_cfg())}
    weights = io.BytesIO()
    torch.save({"model": exported.state_dict()}, weights)
    files = {"model.pth": weights.getvalue(), "config.yaml": CfgNode(changes).dump().encode()}
    return files, (
        f"The same {num_objects} objects on {NUM_CHECKS} random images (boxes in pixels, scores, "
        f"mask probabilities differ by at most {difference:.1e})."
    )
