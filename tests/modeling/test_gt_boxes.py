"""Masks on ground-truth boxes: what the model is given, and what it is told when it is not."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from teacher_student_mask import GTBoxInference


class RecordingModel(torch.nn.Module):
    def inference(self, batched_inputs, detected_instances):
        self.given = detected_instances
        return "outputs"


def test_every_object_becomes_a_detection_with_score_one():
    model = RecordingModel()
    targets = Instances((20, 30), gt_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4], [5, 6, 9, 9]])))
    targets.gt_classes = torch.tensor([4, 0])
    assert GTBoxInference(model)([{"instances": targets}]) == "outputs"
    (detections,) = model.given
    assert detections.image_size == (20, 30)
    assert torch.equal(detections.pred_boxes.tensor, targets.gt_boxes.tensor)
    assert detections.pred_classes.tolist() == [4, 0]
    assert detections.scores.tolist() == [1, 1]


def test_inputs_without_ground_truth_are_refused_by_name():
    with pytest.raises(ValueError, match="a.jpg: TEST.GT_BOXES needs ground-truth boxes"):
        GTBoxInference(RecordingModel())([{"file_name": "a.jpg"}])
