"""Masks on boxes that are given: what the model gets, and the heads run by hand."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from teacher_student_mask import GTBoxInference
from teacher_student_mask.modeling import predict_masks_on_boxes

BOXES = torch.tensor([[4.0, 4, 30, 30], [20, 20, 50, 56], [0, 0, 64, 64]])
CLASSES = torch.tensor([2, 0, 1])


def make(tiny_cfg, name):
    torch.manual_seed(0)
    model = build_model(tiny_cfg(opts=["MODEL.ROI_HEADS.NAME", name])).eval()
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    return model, {"image": image}


@torch.no_grad()
@pytest.mark.parametrize("name", ["TeacherStudentROIHeads", "PartiallySupervisedROIHeads"])
def test_probabilities_are_those_of_the_heads(tiny_cfg, name):
    model, inputs = make(tiny_cfg, name)
    model.proposal_generator = None  # nothing is detected
    probs = predict_masks_on_boxes(model, inputs, BOXES, CLASSES)
    heads = model.roi_heads
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    pooled = heads.mask_pooler([features[f] for f in heads.mask_in_features], [Boxes(BOXES)])
    student = heads.mask_head.layers(pooled)[torch.arange(3), CLASSES].sigmoid()
    torch.testing.assert_close(probs["student"], student)
    assert ("teacher" in probs) == (name == "TeacherStudentROIHeads")
    if "teacher" in probs:
        teacher = heads.teacher_mask_head.layers(pooled)[:, 0].sigmoid()
        torch.testing.assert_close(probs["teacher"], teacher)


def test_the_head_at_test_stays_whatever_happens(tiny_cfg):
    model, inputs = make(tiny_cfg, "TeacherStudentROIHeads")
    model.roi_heads.teacher_mask_head = None
    with pytest.raises(AttributeError):
        predict_masks_on_boxes(model, inputs, BOXES, CLASSES)
    assert model.roi_heads.test_mask_head == "student"


def test_no_box_gives_no_row(tiny_cfg):
    for name in ("TeacherStudentROIHeads", "PartiallySupervisedROIHeads"):
        model, inputs = make(tiny_cfg, name)
        probs = predict_masks_on_boxes(model, inputs, BOXES[:0], CLASSES[:0])
        assert all(len(x) == 0 for x in probs.values())


@pytest.mark.parametrize(
    "architecture, mask_on, message",
    [
        ("GrabCutRCNN", False, "GrabCutRCNN"),
        ("GrabCutRCNN", True, "GrabCutRCNN"),  # bug: its head's masks as if they were GrabCut's
        ("GeneralizedRCNN", False, "no mask head"),
    ],
)
def test_models_without_mask_probabilities_are_refused(tiny_cfg, architecture, mask_on, message):
    opts = ["MODEL.META_ARCHITECTURE", architecture, "MODEL.MASK_ON", mask_on]
    model = build_model(tiny_cfg(opts=opts)).eval()
    with pytest.raises(ValueError, match=message):
        predict_masks_on_boxes(model, {"image": torch.zeros(3, 64, 64)}, BOXES, CLASSES)


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
