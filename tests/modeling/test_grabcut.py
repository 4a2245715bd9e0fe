"""GrabCut in boxes: pictures with a known answer, degenerate boxes, and the model around it."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from teacher_student_mask import GTBoxInference, TeacherStudentDatasetMapper
from teacher_student_mask.modeling import GrabCutRCNN, grab_cut

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


@pytest.fixture
def calls(monkeypatch):
    """The arguments of all calls of cv2.grabCut, as they were given; GrabCut itself runs."""
    calls, run = [], cv2.grabCut

    def record(image, labels, *rest):
        calls.append((image.copy(), labels.copy(), *rest))
        return run(image, labels, *rest)

    monkeypatch.setattr(cv2, "grabCut", record)
    return calls


@pytest.mark.parametrize(
    "left, right, runs",
    [
        (30, 38, True),  # 8 pixels wide
        (30, 37, False),
        (30.75, 37.25, False),  # 6.5 wide, though it touches 8 pixels
        (30.1, 38.05, False),  # 7.95; touches 9
        (np.float32(30.01), np.float32(38.01), True),  # 7.999998
        (88.5, 400, False),  # 7.5 pixels in the image, 8 touched
        (88, 400, True),
    ],
)
def test_boxes_under_8_pixels_are_their_own_masks(calls, left, right, runs):
    """Bug: the rule looked at the box rounded outwards, which let GrabCut into boxes of 6.5."""
    image, _ = picture(96, 96, (40, 34))
    mask = grab_cut(image, [left, 30, right, 66])
    assert len(calls) == runs
    if not runs:
        x0, x1 = max(0, int(left)), min(96, int(np.ceil(right)))
        assert np.array_equal(mask, full(image.shape, x0, 30, x1, 66))


@pytest.mark.parametrize(
    "box, expected",
    [
        ((30, 30, 37, 60), (30, 30, 37, 60)),  # 7 pixels wide
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


def test_an_error_of_opencv_gives_the_box(monkeypatch):
    def fail(*args):
        raise cv2.error("no")

    monkeypatch.setattr(cv2, "grabCut", fail)
    image, _ = picture()
    assert np.array_equal(grab_cut(image, (26, 18, 70, 62)), full(image.shape, 26, 18, 70, 62))


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


def test_masks_on_detected_and_on_given_boxes(tiny_cfg, tiny_coco):
    opts = [*OPTS, "MODEL.MASK_ON", False, "TEST.GT_BOXES", True, "INPUT.MIN_SIZE_TEST", 96]
    opts += ["TEST.DETECTIONS_PER_IMAGE", 3]
    cfg = tiny_cfg(opts=opts, dataset=tiny_coco)
    model = build_model(cfg).eval()
    assert isinstance(model, GrabCutRCNN)
    mapper = TeacherStudentDatasetMapper(cfg, is_train=False)
    loader = build_detection_test_loader(cfg, tiny_coco.name, mapper=mapper)
    with torch.no_grad():
        for inputs in loader:
            size = (inputs[0]["height"], inputs[0]["width"])
            for run in (model, GTBoxInference(model)):
                (output,) = run(inputs)
                instances = output["instances"]
                masks, boxes = instances.pred_masks, instances.pred_boxes.tensor
                assert masks.dtype == torch.bool and masks.shape == (len(instances), *size)
                for mask, box in zip(masks, boxes):
                    y, x = mask.nonzero().unbind(1)
                    assert len(x) > 0
                    assert box[0] - 1 < x.min() and x.max() < box[2] + 1
                    assert box[1] - 1 < y.min() and y.max() < box[3] + 1


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
