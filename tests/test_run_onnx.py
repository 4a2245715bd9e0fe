"""The masks of the program for onnxruntime; tests/test_exporters.py runs all of it."""

import numpy as np
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

run_onnx = pytest.importorskip(
    "teacher_student_mask.run_onnx", reason="onnxruntime is not installed"
)


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
