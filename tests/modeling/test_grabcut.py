"""GrabCut in boxes: pictures with a known answer, degenerate boxes, and the model around it."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from teacher_student_mask.modeling import grab_cut

OPTS = ["MODEL.META_ARCHITECTURE", "GrabCutRCNN", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]


def picture(height=80, width=96, center=(40, 48), radius=20):
    """A bright disk on a dark noisy ground, and the disk."""
    rng = np.random.default_rng(0)
    image = rng.integers(20, 40, (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width]
    disk = (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2
    image[disk] = rng.integers(180, 220, (int(disk.sum()), 3))
    return image, disk


def full(shape, x0, y0, x1, y1):
    mask = np.zeros(shape[:2], dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("scale", [1, 6])
def test_the_disk_is_found(scale):
    # The larger picture is worked on in a smaller copy.
    image, disk = picture()
    image, disk = (x.repeat(scale, 0).repeat(scale, 1) for x in (image, disk))
    mask = grab_cut(image, [scale * x for x in (26, 18, 70, 62)])
    assert mask.dtype == bool and mask.shape == image.shape[:2]
    assert iou(mask, disk) > 0.97


@pytest.mark.parametrize(
    "box, expected",
    [
        ((30, 30, 37.95, 60), (30, 30, 38, 60)),  # under 8 pixels wide, though it touches 8
        ((88.5, 30, 400, 66), (88, 30, 96, 66)),  # 7.5 pixels in the image
        ((30.4, 30.9, 33.2, 32.1), (30, 30, 34, 33)),  # all pixels that it touches
        ((90, 70, 200, 200), (90, 70, 96, 80)),  # what is in the image
        ((50, 50, 50, 70), None),  # no width
        ((50, 50, 40, 70), None),  # less than none
        ((-40, -40, -10, -10), None),  # not in the image
        ((300, 300, 340, 340), None),
    ],
)
def test_degenerate_boxes(box, expected):
    image, _ = picture()
    mask = grab_cut(image, box)
    assert np.array_equal(mask, full(image.shape, *expected) if expected else mask & False)


@pytest.mark.parametrize("left, right", [(30, 38), (np.float32(30.01), np.float32(38.01))])
def test_boxes_of_8_pixels_go_to_opencv_and_its_error_gives_the_box(monkeypatch, left, right):
    calls = []

    def fail(*args):
        calls.append(args)
        raise cv2.error("no")

    monkeypatch.setattr(cv2, "grabCut", fail)
    image, _ = picture()
    mask = grab_cut(image, (left, 18, right, 62))
    assert np.array_equal(mask, full(image.shape, 30, 18, int(np.ceil(right)), 62)) and calls


def ambiguous_picture():
    """A disk a little brighter than the texture around it, where random numbers decide."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8), (5, 5), 0)
    y, x = np.mgrid[:60, :60]
    disk = (y - 30) ** 2 + (x - 30) ** 2 < 150
    image[disk] = np.clip(image[disk].astype(int) + [40, -30, 20], 0, 255)
    return image


def test_the_same_mask_whatever_came_before_and_in_whichever_thread():
    image = ambiguous_picture()
    boxes = [(10, 10, 50, 50), (8, 12, 50, 52), (14, 14, 46, 48)]
    expected = [grab_cut(image, box) for box in boxes]
    for seed in range(4):
        cv2.setRNGSeed(seed)
        order = list(zip(boxes, expected))[:: -1 if seed % 2 else 1]
        assert all(np.array_equal(grab_cut(image, box), mask) for box, mask in order)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda box: grab_cut(image, box), boxes))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_a_given_box_gets_the_mask_of_the_function(tiny_cfg):
    model = build_model(tiny_cfg(opts=[*OPTS, "MODEL.MASK_ON", False])).eval()
    image, disk = picture()
    tensor = torch.from_numpy(image).permute(2, 0, 1)

    def masks_of(tensor, height, width):
        inputs = {"image": tensor, "height": height, "width": width, "file_name": "a.png"}
        detected = Instances((80, 96))
        detected.pred_boxes = Boxes(torch.tensor([[26.0, 18, 70, 62], [0, 0, 9, 9]]))
        detected.pred_classes, detected.scores = torch.zeros(2, dtype=torch.int64), torch.ones(2)
        with torch.no_grad():
            (output,) = model.inference([inputs], [detected])
        return output["instances"].pred_masks.numpy()

    for pixels in (tensor, tensor.float()):
        assert np.array_equal(masks_of(pixels, 80, 96)[0], grab_cut(image, (26, 18, 70, 62)))
    # In a frame of twice the size the same, up to the outline.
    assert iou(masks_of(tensor, 160, 192)[0], disk.repeat(2, 0).repeat(2, 1)) > 0.9
