"""Pictures of objects: where colours and masks come to lie."""

import numpy as np
import pytest
import supervision as sv

from teacher_student_mask.drawing import annotations_to_detections, draw_instances


def test_annotations_in_all_forms():
    annotations = [
        {"bbox": [1, 1, 2, 2], "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]},
        {"bbox": [0, 0, 2, 1], "segmentation": {"size": [4, 5], "counts": [0, 1, 3, 1, 15]}},
        {"bbox": [1.5, 0, 3, 4], "segmentation": []},
        {"bbox": [0, 0, 5, 4]},
    ]
    detections = annotations_to_detections(annotations, (4, 5), [2, 0, 1, 1])
    assert detections.xyxy.tolist()[2] == [1.5, 0, 4.5, 4]
    assert detections.class_id.tolist() == [2, 0, 1, 1]
    expected = np.zeros((4, 4, 5), dtype=bool)
    expected[0, 1:3, 1:3] = expected[1, 0, :2] = True
    np.testing.assert_array_equal(detections.mask, expected)
    assert len(annotations_to_detections([], (4, 5), [])) == 0


@pytest.mark.parametrize("size", [(20, 30), (500, 600)])
def test_masks_are_filled_and_boxes_are_not(size):
    image = np.zeros((*size, 3), dtype=np.uint8)
    mask = np.zeros((2, *size), dtype=bool)
    mask[0, 2:10, 2:10] = True
    boxes = np.array([[2, 2, 10, 10], [14, 2, 26, 16]], dtype=np.float32)
    detections = sv.Detections(xyxy=boxes, mask=mask, class_id=np.array([0, 1]))
    picture = draw_instances(image, detections, colors=["#009e73", "#d55e00"])
    scale = 14 if size[0] == 20 else 1  # ceil(400 / 30)
    assert picture.shape == (scale * size[0], scale * size[1], 3) and not image.any()
    red, green, blue = bytes.fromhex("009e73")
    np.testing.assert_allclose(
        picture[6 * scale, 6 * scale], [blue / 2, green / 2, red / 2], atol=1
    )
    assert not picture[9 * scale, 20 * scale].any()
    assert picture[9 * scale, 14 * scale].any()


def test_labels_need_no_mask_and_no_object():
    image = np.full((400, 400, 3), 90, dtype=np.uint8)
    boxes = np.array([[0, 20, 30, 40]], dtype=np.float32)
    one = sv.Detections(xyxy=boxes, class_id=np.array([3]))
    plain = draw_instances(image, one)
    labelled = draw_instances(image, one, ["cät 猫 97%"])
    assert (plain != labelled).any() and plain.shape == image.shape
    np.testing.assert_array_equal(draw_instances(image, sv.Detections.empty(), []), image)
