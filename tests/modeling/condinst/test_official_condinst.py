"""
What the official code computes (AdelaiDet at 36721221, torch 2.11.0) on inputs made by a formula.

Sum and norm stand for large tensors. Where this project differs on purpose, the test says so.
"""

import dataclasses

import pytest
import torch
from detectron2.structures import Boxes, Instances

from teacher_student_mask.modeling.box_supervision import (
    BoxSupervision,
    color_similarity,
    pairwise_sums,
    projection_loss,
)
from teacher_student_mask.modeling.condinst.condinst import _select, _to_image
from teacher_student_mask.modeling.condinst.fcos import FCOS, FCOSOutput
from teacher_student_mask.modeling.condinst.masks import (
    MaskBranch,
    aligned_bilinear,
    predict_planes,
)
from teacher_student_mask.modeling.condinst.planes import box_losses
from teacher_student_mask.modeling.condinst.targets import Grid, assign_objects, make_plane_targets

STRIDES = (8, 16, 32, 64, 128)
SIZES = (64, 128, 256, 512)
# Of an image of 64 x 96.
SHAPES = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
GRID = Grid.of(SHAPES, STRIDES, "cpu")
# Two are identical, two of one area, and two smaller than a stride.
TIES = [[2, 8, 42, 40], [2, 8, 42, 40], [14, 12, 46, 36], [60.5, 10.25, 90.75, 58]]
TIES += [[56, 20, 88, 40], [64, 16, 84, 48], [2, 42, 8, 52], [60, 50, 64, 54]]
FIRST = [[5.25, 6.5, 40.0, 44.75], [50.0, 10.0, 89.5, 50.25]]
LEVELS = [
    [*FIRST, [0, 0, 96, 64], [70.5, 30.5, 88.25, 52]],
    [[8, 12.5, 60.75, 60], [30, 2, 94, 30]],
]


def f(shape, k, scale=1.0, shift=0.0):
    i = torch.arange(torch.Size(shape).numel())
    values = (i * i * 3571 + i * 7919 + k * 997) % 10007
    return (values.double() / 10007 * 2 - 1).reshape(shape) * scale + shift


def make_image(height, width, k):
    """RGB, blocks of four colours with small noise."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    block = (y // 16 + 2 * (x // 24) + k) % 4
    base = torch.tensor([[200, 30, 90], [60, 180, 40], [120, 118, 121], [20, 90, 220]])
    noise = [(7 * x + 5 * y + 3 * c + k) % (9 if c else 25) for c in range(3)]
    return torch.stack([base[block, c] + noise[c] for c in range(3)]).flip(0).float()


def make_output(k, shift=-2.0):
    def of(channels, offset, *args):
        maps = [f((2, channels, *s), k + offset + i, *args) for i, s in enumerate(SHAPES)]
        return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)

    return FCOSOutput(GRID, of(3, 0, 3.0, shift), of(4, 10, 1.5, 1.6), of(1, 20, 2.0)[..., 0], [])


def make_fcos(channels=8, norm="", num_conv=1, **kwargs):
    names = ["p3", "p4", "p5", "p6", "p7"]
    arguments = dict(in_channels=channels, in_features=names, strides=STRIDES, num_classes=3)
    return FCOS(**arguments, sizes=SIZES, norm=norm, num_conv=num_conv, **kwargs)


def assign(boxes_of_images, sizes=SIZES, centres=None):
    """Rows of all boxes of the batch, (N, L), and these boxes."""
    rows, offset = [], 0
    for boxes in boxes_of_images:
        boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
        own = (boxes[:, :2] + boxes[:, 2:]) / 2
        if centres is not None:
            own = centres[offset : offset + len(boxes)]
        found = assign_objects(GRID, boxes, own, sizes, radius=1.5)
        rows.append(torch.where(found >= 0, found + offset, -1))
        offset += len(boxes)
    every = [box for boxes in boxes_of_images for box in boxes]
    return torch.stack(rows), torch.tensor(every, dtype=torch.float64).reshape(-1, 4)


def check(tensor, total, norm, rel=2e-6):
    assert tensor.sum().item() == pytest.approx(total, rel=rel, abs=1e-6)
    assert tensor.norm().item() == pytest.approx(norm, rel=rel)


def test_location_targets():
    rows, _ = assign([TIES, []])
    own = rows[0] >= 0
    indices = [25, 26, 27, 28, 37, 38, 39, 40, 44, 45, 46, 56, 57, 58, 60, 68, 69, 70]
    assert own.nonzero()[:, 0].tolist() == indices
    assert rows[0][own].tolist() == [0, 2, 2, 2, 0, 2, 2, 2, 4, 4, 3, 4, 4, 3, 6, 3, 3, 3]
    assert (rows[1] == -1).all()
    rows, _ = assign(LEVELS, sizes=(16, 24, 40, 64))
    indices = [57, 58, 69, 70, 103, 112, 113, 120, 122, 125, 126]
    assert (rows[0] >= 0).nonzero()[:, 0].tolist() == indices
    assert rows[0][indices].tolist() == [3, 3, 3, 3, 0, 3, 3, 0, 1, 1, 2]
    assert rows[1].tolist() == [4 if i == 124 else -1 for i in range(len(GRID.points))]


@pytest.mark.parametrize(
    "boxes, classes, k, expected, official",
    [
        ([TIES, []], [2, 1, 0, 1, 2, 0, 1, 2], 100, (2.9463575, 0.6702245, 0.8209414), 0.6338159),
        (
            [TIES[2:6], TIES[:4]],
            [0, 1, 2, 0, 2, 1, 0, 1],
            200,
            (1.8597544, 0.7314076, 0.8762462),
            0.7,
        ),
        ([[], []], [], 100, (49.560043, 0.0, 0.0), 0.0),
    ],
)
def test_detection_losses(boxes, classes, k, expected, official):
    rows, every = assign(boxes)
    losses = make_fcos().losses(make_output(k), rows, every, torch.tensor(classes).long())
    names = ("loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr")
    assert [losses[name].item() for name in names] == pytest.approx(expected, rel=2e-6)
    # Theirs adds 1 to intersection and union, in squared strides; ours is GIoU as published.
    assert losses["loss_fcos_loc"].item() == pytest.approx(official, rel=0.1)


def test_detection_head():
    fcos = make_fcos(64, "GN", num_conv=4).double()
    parameters = []
    for x in [*fcos.cls_tower[::2], *fcos.bbox_tower[::2]]:
        parameters += [x.weight, x.bias, x.norm.weight, x.norm.bias]
    for x in (fcos.cls_logits, fcos.bbox_pred, fcos.ctrness):
        parameters += [x.weight, x.bias]
    with torch.no_grad():
        for k, x in enumerate(parameters, start=1):
            is_norm = k <= 32 and k % 4 == 3
            scale = (3 / 576) ** 0.5 if x.dim() == 4 else 0.3 if is_norm else 0.1
            x.copy_(f(x.shape, k, scale, float(is_norm)))
        fcos.scales.copy_(torch.cat([f((1,), 39 + i, 0.3, 1.0) for i in range(5)]))
    sizes = [(4, 6), (2, 3), (1, 2), (1, 1), (1, 1)]
    output = fcos({f"p{3 + i}": f((2, 64, *s), 60 + i) for i, s in enumerate(sizes)})
    check(output.logits[:, :24], -81.49636850, 8.78390556)
    check(output.distances[:, :24], 33.75274736, 5.72936903)
    check(output.distances[:, 24:30], 5.43059653, 1.68170943)
    centreness = [-0.44961997, -0.51778788, -0.39473181]
    assert output.centreness[0, :3].tolist() == pytest.approx(centreness)
    check(output.towers[0], 1255.04705993, 40.86138394)


def test_aligned_bilinear():
    ramp = torch.tensor([[0.0, 1, 2], [10, 11, 12]])[None, None]
    rows = [[0, 0, 0.5, 1, 1.5, 2], [5, 5, 5.5, 6, 6.5, 7], [10, 10, 10.5, 11, 11.5, 12]]
    assert aligned_bilinear(ramp, 2)[0, 0].tolist() == [rows[0], *rows]


def in_our_order(parameters):
    """Official: all weights, then all biases; here layer after layer."""
    w0, w1, w2, b0, b1, b2 = parameters.split([144, 64, 8, 8, 8, 1], dim=1)
    return torch.cat([w0, b0, w1, b1, w2, b2], dim=1)


def test_dynamic_mask_head():
    points = torch.tensor([[12.0, 20], [24, 8], [48, 16]])
    parameters = in_our_order(f((3, 233), 12, 0.6))
    images, features = torch.tensor([0, 1, 1]), f((2, 16, 6, 7), 11)
    features.requires_grad_()
    scales = torch.tensor([64.0, 128, 256])
    logits = predict_planes(parameters, features, images, points, scales, 8, 2)
    assert logits.shape == (3, 12, 14)
    check(logits, 11.66311155, 12.93785013)
    (gradient,) = torch.autograd.grad((logits * f((3, 12, 14), 13)).sum(), features)
    check(gradient, -1.73260489, 6.22247071)


def test_mask_branch():
    branch = MaskBranch(in_channels=256, in_features=["p3", "p4", "p5"], strides=[8, 16, 32])
    branch = branch.double().eval()
    with torch.no_grad():
        for k, (name, x) in enumerate(branch.state_dict().items(), start=1):
            if x.dim() == 4:
                x.copy_(f(x.shape, k, (3 / x[0].numel()) ** 0.5))
            elif name.endswith(("running_var", "norm.weight")):
                x.copy_(f(x.shape, k, 0.3, 1.0))
            elif x.dim() == 1:
                x.copy_(f(x.shape, k, 0.1))
    sizes = {"p3": (8, 12), "p4": (4, 6), "p5": (2, 3)}
    features = {name: f((2, 256, *s), 71 + i) for i, (name, s) in enumerate(sizes.items())}
    check(branch(features), -251.63903489, 14.73068173)


def test_projection_and_pairwise_terms():
    logits, boxes = f((3, 12, 14), 21, 4.0), torch.zeros(3, 12, 14, dtype=torch.bool)
    boxes[0, 2:9, 3:11] = boxes[1, 0:5, 8:14] = boxes[2, 6:12, 0:14] = True
    valid = torch.ones(1, 12, 14, dtype=torch.bool)
    valid[:, -2:], valid[:, :, -3:] = False, False
    similarity = color_similarity(f((1, 3, 12, 14), 27, 2.0), valid, 2)
    assert similarity.sum().item() == pytest.approx(242.44328504)
    assert projection_loss(logits, boxes).item() == pytest.approx(0.54869801)
    total, count = pairwise_sums(logits, similarity.expand(3, -1, -1, -1), boxes, 0.3, 2)
    pairwise = total / count
    assert pairwise.item() == pytest.approx(0.84037250)


def test_a_whole_step_of_boxinst():
    """Two images, padding, bottom rows, colours, selection, dynamic head, and both losses."""
    boxes = [[*FIRST, [20, 20, 70, 55]], [[8, 12.5, 60.75, 60]]]
    pixels, targets = torch.zeros(2, 3, 64, 96), []
    for i, (height, width, original) in enumerate(((60, 90, 120), (64, 72, 64))):
        pixels[i, :, :height, :width] = make_image(height, width, i)
        own, num = Instances((height, width)), len(boxes[i])
        own.gt_boxes, own.gt_classes = Boxes(torch.tensor(boxes[i])), torch.zeros(num).long()
        own.gt_has_mask = torch.zeros(num, dtype=torch.bool)
        own.gt_resize_factor = torch.full((num,), height / original)
        targets.append(own)
    supervision = BoxSupervision()
    planes = make_plane_targets(targets, (64, 96), 4, supervision.valid_sizes(targets))
    assert planes.valid.sum((1, 2)).tolist() == [308, 234]
    # Their box maps have the box rounded to whole pixels, and its centroid as centre.
    full = torch.zeros(4, 64, 96, dtype=torch.bool)
    for plane, (x0, y0, x1, y1) in zip(full, boxes[0] + boxes[1]):
        plane[int(y0) : int(y1 + 1), int(x0) : int(x1 + 1)] = True
    planes = dataclasses.replace(planes, box_masks=full[:, 2::4, 2::4])
    centres = torch.stack([x.nonzero().double().mean(0).flip(0) for x in full])
    rows, _ = assign(boxes, centres=centres)
    output = make_output(300)
    images, indices = _select(make_fcos().scores(output).amax(2), rows, max_locations=6)
    objects = rows[images, indices]
    assert objects.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    points = [(20, 36), (20, 20), (60, 36), (60, 28), (36, 36), (52, 28)]
    points += [(36, 28), (28, 36), (36, 44), (36, 36), (28, 44), (44, 44)]
    assert GRID.points[indices].tolist() == [list(x) for x in points]
    controller = [f((2, 233, *s), 330 + i, 0.6).flatten(2) for i, s in enumerate(SHAPES)]
    parameters = torch.cat(controller, dim=2)[images, :, indices]
    scales = torch.full((12,), 64.0)
    logits = predict_planes(
        in_our_order(parameters), f((2, 16, 8, 12), 350), images, GRID.points[indices], scales, 8, 2
    )
    check(logits, -750.08487505, 46.15817086)
    losses = box_losses(logits, objects, planes, pixels.floor(), 4, supervision, iteration=5000)
    assert losses["loss_mask_projection"].item() == pytest.approx(0.59819447, rel=2e-6)
    # Theirs rounds colours down to whole numbers.
    assert losses["loss_mask_pairwise"].item() == pytest.approx(0.31190322, rel=2e-3)


def test_detection():
    fcos = make_fcos(test_score_thresh=0.05**0.5)
    output = make_output(400, shift=-3.5)
    maps = {x: getattr(output, x).float() for x in ("logits", "distances", "centreness")}
    first, second = fcos.detect(dataclasses.replace(output, **maps), [(60, 90)] * 2)
    assert (len(first), len(second)) == (100, 99)
    assert first.scores.sum().item() == pytest.approx(39.456410, rel=1e-5)
    assert second.scores.sum().item() == pytest.approx(33.033064, rel=1e-5)
    assert first.pred_boxes.tensor.sum().item() == pytest.approx(13969.889, rel=1e-5)
    assert second.pred_boxes.tensor.sum().item() == pytest.approx(15973.283, rel=1e-5)
    assert (first.pred_classes.sum(), second.pred_classes.sum()) == (78, 101)


@pytest.mark.parametrize(
    "size, new_size, stride, areas",
    [
        ((30, 41), (45, 50), 4, [1089, 1160]),
        ((30, 41), (17, 23), 4, [188, 198]),
        ((32, 64), (32, 64), 4, [1052, 1070]),
        ((60, 100), (60, 100), 8, [3201, 2971, 3326]),
    ],
)
def test_masks_of_an_image(size, new_size, stride, areas):
    planes = f((3, 8, 16), 31, 2.0).sigmoid()
    masks = _to_image(planes, stride, size, new_size)
    assert masks.shape == (3, *new_size) and masks.dtype == torch.bool
    assert masks.sum((1, 2)).tolist()[: len(areas)] == areas
