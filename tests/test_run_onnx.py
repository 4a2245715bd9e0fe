"""The example program for onnxruntime, against DefaultPredictor and Detectron2's pasting."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_students import write_small_student

from teacher_student_mask.cli.main import main

run_onnx = pytest.importorskip(
    "teacher_student_mask.run_onnx", reason="onnxruntime is not installed"
)


@pytest.mark.slow
def test_on_a_real_image_it_is_the_predictor(tmp_path, coco_root):
    threshold = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.45]
    cfg = write_small_student(tmp_path, "teacher_student.yaml", *threshold)
    options = ["--config-file", tmp_path / "config.yaml", "--output-dir", tmp_path / "exported"]
    assert main(["export", *map(str, options), "--formats", "onnx"]) == 0
    detector = run_onnx.OnnxDetector(tmp_path / "exported")
    predictor, count = DefaultPredictor(cfg), 0
    for path in sorted(Path(coco_root, "val2017").glob("*.jpg"))[:4]:
        image = np.asarray(Image.open(path).convert("RGB"))
        expected = predictor(image[:, :, ::-1])["instances"]
        boxes, scores, classes, found = detector(image)
        count += len(expected)
        assert np.array_equal(classes, expected.pred_classes.numpy())
        # Ten times the graph's: the boxes are scaled up from 64 pixels to 640.
        np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=1e-2)
        np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-4)
        masks = expected.pred_masks.numpy()
        assert found.shape == masks.shape
        assert (found != masks).sum() <= 1e-4 * masks.size
    assert count > 0


number = st.floats(-40, 80, width=32)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(number, number, st.floats(0.5, 90), st.floats(0.5, 90)), max_size=3),
    st.integers(0, 1000),
)
def test_pasting_is_detectron2s(corners, seed):
    boxes = [(max(x, 0), max(y, 0), min(x + w, 60), min(y + h, 50)) for x, y, w, h in corners]
    boxes = [b for b in boxes if b[2] - b[0] > 0.1 and b[3] - b[1] > 0.1]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    probs = np.random.default_rng(seed).random((len(boxes), 28, 28), dtype=np.float32)
    found = run_onnx.paste_masks(probs, boxes, 50, 60)
    assert found.shape == (len(boxes), 50, 60) and found.dtype == bool
    expected = paste_masks_in_image(
        torch.as_tensor(probs), Boxes(torch.as_tensor(boxes)), (50, 60), threshold=0.5
    ).numpy()
    # A probability of 0.5 up to rounding may fall on either side.
    assert (found != expected).sum() <= 2 * len(boxes)
