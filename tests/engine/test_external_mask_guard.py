"""What the guard against masks of unseen objects makes of masks that a model made."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances, PolygonMasks, polygons_to_bitmask

from teacher_student_mask import ImageMask, TeacherStudentDatasetMapper
from teacher_student_mask.engine import UnseenMaskGuard
from teacher_student_mask.engine.unseen_mask_guard import find_unseen_masks

UNSEEN = 1  # contiguous id of the tiny dataset's class "cat"
SEEN = {0, 2}
SIZE = (60, 60)
L_SHAPE = [[10, 10, 50, 10, 50, 20, 20, 20, 20, 50, 10, 50]]
NOT_OF_MODEL = (
    UNSEEN,
    "gt_has_model_mask is True, but the training data have no mask of a model for it",
)


def masks_of(polygons):
    return PolygonMasks([[np.array(x, dtype=np.float64) for x in polygons]])


def external(num=1, class_id=UNSEEN):
    """Objects of a class in one place, each with a mask that a model made."""
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes([[10, 10, 50, 50]] * num)
    instances.gt_classes = torch.tensor([class_id] * num)
    instances.gt_masks = PolygonMasks(masks_of(L_SHAPE).polygons * num)
    instances.gt_has_mask = torch.zeros(num, dtype=torch.bool)
    instances.gt_exclusion_masks = ImageMask(torch.zeros(SIZE), num)
    instances.gt_has_model_mask = torch.ones(num, dtype=torch.bool)
    return instances


def test_what_the_data_call_a_models_mask_passes_and_no_more():
    assert find_unseen_masks(external(), SEEN, {UNSEEN: 1}) == []
    assert find_unseen_masks(external(), SEEN, {0: 1}) == [NOT_OF_MODEL]
    assert find_unseen_masks(external(), SEEN) == [NOT_OF_MODEL]
    assert find_unseen_masks(external(2), SEEN, {UNSEEN: 1}) == [NOT_OF_MODEL] * 2
    assert find_unseen_masks(external(2), SEEN, {UNSEEN: 2}) == []
    # Of seen classes no mask is secret.
    assert find_unseen_masks(external(class_id=0), SEEN) == []


def test_a_models_mask_among_the_exclusion_masks_is_found():
    instances = external()
    leaked = polygons_to_bitmask(masks_of(L_SHAPE).polygons[0], *SIZE)
    instances.gt_exclusion_masks = ImageMask(torch.from_numpy(leaked), 1)
    ((_, reason),) = find_unseen_masks(instances, SEEN, {UNSEEN: 1})
    assert "gt_exclusion_masks covers it" in reason


def mark(data):
    for x in data["annotations"]:
        if x["category_id"] == 17 and x["image_id"] == 2:
            x["mask_source"] = "model"


class Storage:
    def put_scalar(self, *args, **kwargs):
        pass


class FakeTrainer:
    iter, storage = 0, Storage()


def guard_of(cfg):
    guard = UnseenMaskGuard(cfg)
    guard.trainer = FakeTrainer()
    return guard


def test_our_mapper_passes_and_one_that_marks_human_masks_stops(tiny_cfg, make_tiny_coco):
    dataset = make_tiny_coco(mark)
    cfg = tiny_cfg(dataset=dataset)
    mapper = TeacherStudentDatasetMapper(cfg, True)
    images = DatasetCatalog.get(dataset.name)
    examples = [mapper(copy.deepcopy(x)) for x in images]
    assert sum(int(x["instances"].gt_has_model_mask.sum()) for x in examples) == 2
    guard = guard_of(cfg)
    guard._look_at(examples)
    assert guard.num_masks == 0 and guard.num_objects == 3
    # A mapper that says of every unseen mask that a model made it.
    for image in images:
        for x in image["annotations"]:
            if x["category_id"] == UNSEEN:
                x["mask_source"] = "model"
    examples = [mapper(x) for x in images]
    with pytest.raises(RuntimeError, match="1 masks of objects of unseen classes") as error:
        guard_of(cfg)._look_at(examples)
    assert "mixed.png" in str(error.value) and NOT_OF_MODEL[1] in str(error.value)
    # Or one that hides which image it is.
    for x in examples:
        del x["file_name"]
    with pytest.raises(RuntimeError, match="3 masks of objects of unseen classes"):
        guard_of(cfg)._look_at(examples)


def test_the_data_are_read_again_only_for_such_masks(tiny_cfg, make_tiny_coco, monkeypatch):
    dataset = make_tiny_coco()
    cfg = tiny_cfg(dataset=dataset)
    mapper = TeacherStudentDatasetMapper(cfg, True)
    examples = [mapper(x) for x in DatasetCatalog.get(dataset.name)]
    guard = guard_of(cfg)
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: 1 / 0)
    guard._look_at(examples)
    assert guard.num_masks == 0
