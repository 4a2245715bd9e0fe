"""Masks on ground-truth boxes, which tells the mask head from the detector."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["GTBoxInference"]


class GTBoxInference(nn.Module):
    """
    Run a model's mask head on the ground-truth boxes and classes (``TEST.GT_BOXES``).

    Every object becomes one detection with score 1, so AP then measures the masks alone. The
    inputs must have ``instances`` with ``gt_boxes`` and ``gt_classes``, as
    :class:`TeacherStudentDatasetMapper` gives them when ``TEST.GT_BOXES`` is set.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: a :class:`GeneralizedRCNN`, alone or in a :class:`DistributedDataParallel`.
        """
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: as for :class:`GeneralizedRCNN`, with ``instances``.

        Returns:
            As :meth:`GeneralizedRCNN.forward` in inference: ``instances`` in the frame of the
            original image.

        Raises:
            ValueError: an input without ``instances``.
        """
        for inputs in batched_inputs:
            if "instances" not in inputs:
                raise ValueError(
                    f"{inputs.get('file_name')}: TEST.GT_BOXES needs ground-truth boxes in the "
                    "inputs; build the test loader with TeacherStudentDatasetMapper."
                )
        detected = [self._as_detections(inputs["instances"]) for inputs in batched_inputs]
        return self.model.inference(batched_inputs, detected_instances=detected)

    @staticmethod
    def _as_detections(targets: Instances) -> Instances:
        detections = Instances(targets.image_size)
        detections.pred_boxes = Boxes(targets.gt_boxes.tensor.clone())
        detections.pred_classes = targets.gt_classes
        detections.scores = torch.ones(len(targets))
        return detections
