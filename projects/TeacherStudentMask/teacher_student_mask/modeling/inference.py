"""Masks on boxes that are given, not detected."""

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .grabcut import GrabCutRCNN

__all__ = ["GTBoxInference", "has_teacher", "predict_masks_on_boxes"]


class GTBoxInference(nn.Module):
    """
    Run a model's mask head on the ground-truth boxes and classes (``TEST.GT_BOXES``).

    Every object becomes one detection with score 1, so AP then measures the masks alone. The
    inputs must have ``instances`` with ``gt_boxes`` and ``gt_classes``.
    """

    def __init__(self, model: nn.Module):
        """``model`` is a :class:`GeneralizedRCNN`, also in a :class:`DistributedDataParallel`."""
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As :meth:`GeneralizedRCNN.forward` in inference, in the frame of the original image."""
        detected = []
        for inputs in batched_inputs:
            targets = inputs["instances"]
            boxes = targets.gt_boxes.tensor.clone()
            detected.append(_detections(targets.image_size, boxes, targets.gt_classes))
        return self.model.inference(batched_inputs, detected_instances=detected)


def has_teacher(model: nn.Module) -> bool:
    """Whether a model has the paper's pair of mask heads, one of which runs at inference."""
    return hasattr(model.roi_heads, "teacher_mask_head")


@torch.no_grad()
def predict_masks_on_boxes(
    model: GeneralizedRCNN, inputs: dict, boxes: torch.Tensor, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Run the backbone once and all mask heads on given boxes and classes; nothing is detected.

    Args:
        model: in evaluation mode.
        inputs: of the model, one image.
        boxes: float, shape (R, 4), XYXY in the frame of ``inputs["image"]``; not changed.
        classes: int64, shape (R,), contiguous ids.

    Returns:
        Probabilities in the channel of each box's class, shape (R, M, M) over the box, on the
        model's device: "student", the only head of most models, and "teacher" where there is one;
        M may differ between the two.

    Raises:
        ValueError: a model without a mask head, or :class:`GrabCutRCNN`, which does not use one.
    """
    if isinstance(model, GrabCutRCNN) or not model.roi_heads.mask_on:
        raise ValueError("No mask probabilities: the model has no mask head, or is GrabCutRCNN.")
    image_size, roi_heads = tuple(inputs["image"].shape[-2:]), model.roi_heads
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    boxes, classes = boxes.to(model.device), classes.to(model.device)

    def run() -> torch.Tensor:
        given = [_detections(image_size, boxes, classes)]
        (found,) = roi_heads.forward_with_given_boxes(features, given)
        return found.pred_masks[:, 0]

    if not has_teacher(model):
        return {"student": run()}
    probs, chosen = {}, roi_heads.test_mask_head
    try:
        for roi_heads.test_mask_head in ("student", "teacher"):
            probs[roi_heads.test_mask_head] = run()
    finally:
        roi_heads.test_mask_head = chosen
    return probs


def _detections(
    image_size: tuple[int, int], boxes: torch.Tensor, classes: torch.Tensor
) -> Instances:
    instances = Instances(image_size)
    instances.pred_boxes, instances.pred_classes = Boxes(boxes), classes
    instances.scores = torch.ones_like(boxes[:, 0])
    return instances
