"""Mask probabilities of every mask head on boxes that somebody else has drawn."""

from __future__ import annotations

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Boxes, Instances

from .grab_cut import GrabCutRCNN
from .teacher_student_roi_heads import TeacherStudentROIHeads

__all__ = ["predict_masks_on_boxes"]

# Bounds the memory of the mask heads in images with very many objects.
_MAX_ROIS = 128


@torch.no_grad()
def predict_masks_on_boxes(
    model: GeneralizedRCNN, inputs: dict, boxes: torch.Tensor, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Run the backbone once and all mask heads on given boxes and classes; nothing is detected.

    Args:
        model: in evaluation mode.
        inputs: of the model, one image.
        boxes: float, shape (R, 4), XYXY in the frame of ``inputs["image"]``, which may be a resized
            image; not changed.
        classes: int64, shape (R,), contiguous ids.

    Returns:
        Probabilities in the channel of each box's class, on the model's device, shape (R, M, M)
        over the box: "student", and "teacher" where the model has
        :class:`TeacherStudentROIHeads`; M may differ between the two. The head of any other model
        is its "student".

    Raises:
        ValueError: a model without a mask head, or :class:`GrabCutRCNN`, which does not use one.
    """
    _check_has_mask_probabilities(model)
    image_size = tuple(inputs["image"].shape[-2:])
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    boxes, classes = boxes.to(model.device), classes.to(model.device)
    chunks = [
        _predict(model.roi_heads, features, image_size, boxes[i : i + _MAX_ROIS], part)
        for i, part in zip(range(0, max(1, len(boxes)), _MAX_ROIS), _split(classes))
    ]
    return {head: torch.cat([x[head] for x in chunks]) for head in chunks[0]}


def _check_has_mask_probabilities(model: GeneralizedRCNN) -> None:
    if isinstance(model, GrabCutRCNN):
        raise ValueError(
            "GrabCutRCNN has no mask probabilities: its masks come from the pixels of the image, "
            "not from a mask head, even where it has one. tools/grabcut_masks.py gives GrabCut's "
            "masks to the objects of a COCO json."
        )
    if not model.roi_heads.mask_on:
        raise ValueError(
            "The model has no mask head (MODEL.MASK_ON is False), so it has no mask probabilities; "
            "give one that was trained with MODEL.MASK_ON True."
        )


def _split(classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return classes.split(_MAX_ROIS) if len(classes) else (classes,)


def _predict(
    heads,
    features: dict[str, torch.Tensor],
    image_size: tuple[int, int],
    boxes: torch.Tensor,
    classes: torch.Tensor,
) -> dict[str, torch.Tensor]:
    instances = Instances(image_size)
    if isinstance(heads, TeacherStudentROIHeads):
        instances.proposal_boxes, instances.gt_classes = Boxes(boxes), classes
        teacher, student, _ = heads.compute_mask_logits(features, [instances])
        return {"student": student.sigmoid(), "teacher": teacher.sigmoid()}
    instances.pred_boxes, instances.pred_classes = Boxes(boxes), classes
    instances.scores = torch.ones_like(boxes[:, 0])
    (result,) = heads.forward_with_given_boxes(features, [instances])
    return {"student": result.pred_masks[:, 0]}
