"""Which losses and gradients reach teacher and student, and why the gate exists."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Boxes, PolygonMasks
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    MIXED,
    NONE_SEEN,
    NONE_UNSEEN,
    WITH_MODEL_MASKS,
    add_model_masks,
    make_features,
    make_heads,
    make_images,
    make_proposals,
    mask_losses,
    plain_proposals,
    polygon_of,
    targets_of,
    triangle,
)

from teacher_student_mask.modeling.box_supervision import BoxSupervision
from teacher_student_mask.modeling.mask_heads import select_label_channel
from teacher_student_mask.modeling.pseudo_masks import PseudoMaskGenerator


def grads(loss, head):
    return torch.autograd.grad(loss, list(head.parameters()), allow_unused=True, retain_graph=True)


def test_rois_without_a_mask_give_the_teacher_nothing():
    """The teacher's gradient is that of a batch from which the unseen objects are removed."""
    heads = make_heads()
    features = make_features(2)
    losses, _ = mask_losses(heads, targets_of(MIXED), features)
    seen_only = [([[4, 4, 30, 30]], [0], [True]), ([], [], [])]
    expected, _ = mask_losses(heads, targets_of(seen_only), features)
    for got, want in zip(
        grads(sum(losses.values()), heads.teacher_mask_head),
        grads(expected["loss_mask_teacher"], heads.teacher_mask_head),
    ):
        torch.testing.assert_close(got, want)
    losses, _ = mask_losses(heads, targets_of(NONE_SEEN))
    for got in grads(sum(losses.values()), heads.teacher_mask_head):
        assert not got.any()


@pytest.mark.parametrize("method", ["none", "threshold", "interact", "box_fit", "self"])
def test_student_loss_is_bce_to_gt_and_pseudo_masks(method):
    """Eq. (6), put together from the parts' own functions: one mean over all foreground ROIs."""
    heads = make_heads(method=method)
    features = make_features(2)
    # ROIs with a mask stand in the middle: what is computed in parts is put back in order.
    losses, _ = mask_losses(heads, targets_of(MIXED[::-1]), features)
    rois = make_proposals(targets_of(MIXED[::-1]))
    pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
    labels = torch.cat([x.gt_classes for x in rois])
    student = select_label_channel(heads.mask_head.layers(pooled), labels)
    teacher = heads.teacher_mask_head.layers(pooled)[:, 0]
    pseudo = PseudoMaskGenerator(method=method)(teacher.sigmoid(), student.sigmoid(), rois)
    gt = torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, 28).float() for x in rois])
    has_mask = torch.cat([x.gt_has_mask for x in rois])
    targets = torch.where(has_mask[:, None, None], gt, pseudo)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(student, targets)
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_the_loss_of_the_student_is_its_own():
    features, targets = make_features(2), targets_of(MIXED)

    def losses(**settings):
        return mask_losses(make_heads(**settings), targets, features)[0]

    interact, threshold = losses(), losses(method="threshold")
    assert interact["loss_mask"] != threshold["loss_mask"]
    dice = losses(student_loss="dice")
    assert dice["loss_mask"] == losses(mask_loss="dice")["loss_mask"] != interact["loss_mask"]
    assert dice["loss_mask_teacher"] == interact["loss_mask_teacher"]
    shared = losses(pseudo_masks=PseudoMaskGenerator(balance="share"))
    assert shared["loss_mask"] not in (interact["loss_mask"], threshold["loss_mask"])


def test_box_losses_are_the_teachers_on_rois_of_their_own_and_each_roi_counts_once():
    supervision, targets = BoxSupervision(warmup_iters=0), targets_of(MIXED)
    features = make_features(2)
    plain, _ = mask_losses(make_heads(mask_loss="dice"), targets, features)
    heads = make_heads(mask_loss="dice", box_supervision=supervision)
    losses, _ = mask_losses(heads, targets, features)
    assert losses["loss_mask"] == plain["loss_mask"]
    # Two of the six ROIs have a mask.
    torch.testing.assert_close(losses["loss_mask_teacher"], plain["loss_mask_teacher"] * 2 / 6)
    boxes = [[12.5, 11, 57.5, 64], [0, 5, 48, 35]]
    pooled = heads.mask_pooler([features["p2"]], [Boxes(torch.tensor([x])) for x in boxes])
    logits = heads.teacher_mask_head.layers(pooled)[:, 0]
    rois = supervision.rois_of(make_proposals(targets))
    expected = supervision(logits, rois, make_images(2).tensor, 0)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss * 4 / 6)


def test_all_channels_of_the_student_learn_on_request_as_eq_3_prints():
    """Channels of other classes have the target 0; summed over channels, a mean over the cells."""
    heads, targets = make_heads(student_loss="bce_all"), targets_of(MIXED)
    features = make_features(2)
    losses, _ = mask_losses(heads, targets, features)
    rois = make_proposals(targets)
    pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
    probs = heads.mask_head.layers(pooled).sigmoid().detach().double().numpy()
    labels = torch.cat([x.gt_classes for x in rois])
    alone = mask_losses(make_heads(), targets, features)[0]
    others = np.full(probs.shape[:2], True)
    others[np.arange(len(labels)), labels] = False
    expected = -np.log(1 - probs[others]).sum() / (len(labels) * 28 * 28)
    assert losses["loss_mask"].item() == pytest.approx(alone["loss_mask"].item() + expected)
    assert losses["loss_mask_teacher"] == alone["loss_mask_teacher"]


def test_before_the_gate_the_student_learns_from_masks_alone():
    heads = make_heads(warmup_iters=100)
    features = make_features(2)
    early, logged = mask_losses(heads, targets_of(MIXED), features, iteration=99)
    seen_only, _ = mask_losses(
        heads, targets_of([([[4, 4, 30, 30]], [0], [True]), ([], [], [])]), features, iteration=99
    )
    torch.testing.assert_close(early["loss_mask"], seen_only["loss_mask"])
    assert "pseudo_mask/fg_ratio" not in logged
    late, logged = mask_losses(heads, targets_of(MIXED), features, iteration=100)
    assert late["loss_mask"] != early["loss_mask"]
    assert 0 <= logged["pseudo_mask/fg_ratio"] <= 1
    assert 0 <= logged["pseudo_mask/agreement"] <= 1
    assert logged["pseudo_mask/num_rois"] == 4
    assert {"teacher_mask/accuracy", "student_mask/accuracy"} <= logged.keys()


def rows_of(head):
    """Numbers of ROIs of each of the next calls of a mask head, with whether gradient is on."""
    calls = []
    head.mask_fcn1.register_forward_pre_hook(
        lambda module, args: calls.append((len(args[0]), torch.is_grad_enabled()))
    )
    return calls


def test_no_head_runs_on_what_adds_nothing_to_its_loss():
    heads = make_heads(warmup_iters=10)
    teacher, student = rows_of(heads.teacher_mask_head), rows_of(heads.mask_head)
    # MIXED has 2 ROIs with a mask and 4 without.
    mask_losses(heads, targets_of(MIXED), iteration=9)
    assert teacher == [(2, True)] and student == [(2, True)]
    teacher.clear(), student.clear()
    mask_losses(heads, targets_of(MIXED), iteration=10)
    assert teacher == [(2, True), (4, False)] and student == [(6, True)]


def test_with_batch_statistics_all_rois_are_one_batch():
    heads = make_heads(warmup_iters=10)
    heads.teacher_mask_head.mask_fcn1.norm = torch.nn.BatchNorm2d(8)
    rows = rows_of(heads.teacher_mask_head)
    for iteration in (9, 10):
        mask_losses(heads, targets_of(MIXED), iteration=iteration)
    assert rows == [(6, True), (6, True)]


@pytest.mark.parametrize("limit, num_without_mask", [(0, 4), (1, 2), (3, 4)])
def test_rois_without_a_mask_can_be_capped_per_image(limit, num_without_mask):
    """MIXED has two images with two ROIs without a mask each."""
    heads = make_heads(max_rois_without_mask=limit)
    _, logged = mask_losses(heads, targets_of(MIXED))
    assert logged["pseudo_mask/num_rois"] == num_without_mask


def test_a_56_cell_teacher_learns_at_56_and_teaches_at_28():
    heads = make_heads(teacher_deconv=2, method="threshold")
    rois = make_proposals(targets_of(NONE_UNSEEN))
    features = make_features(1)
    losses, _ = mask_losses(heads, targets_of(NONE_UNSEEN), features)
    pooled = heads.mask_pooler([features["p2"]], [x.proposal_boxes for x in rois])
    logits = heads.teacher_mask_head.layers(pooled)
    assert logits.shape[-2:] == (56, 56)
    with EventStorage():
        assert torch.equal(losses["loss_mask_teacher"], mask_rcnn_loss(logits, rois))
    losses, _ = mask_losses(heads, targets_of(MIXED))
    assert losses["loss_mask"].isfinite()


@pytest.mark.parametrize("test_mask_head", ["student", "teacher"])
def test_inference_runs_the_chosen_head_only(test_mask_head):
    heads = make_heads(test_mask_head=test_mask_head).eval()
    other = heads.teacher_mask_head if test_mask_head == "student" else heads.mask_head

    def fail(*args):
        raise AssertionError("this head must not run at inference")

    other.layers = fail
    with torch.no_grad():
        instances, _ = heads(make_images(2), make_features(2), plain_proposals(2))
    assert all(x.pred_masks.shape == (5, 1, 28, 28) for x in instances)


def gradients(heads, targets, iteration=0, features=None):
    """Of each loss, to each mask head and to the features."""
    features = features or make_features(len(targets))
    losses, _ = mask_losses(heads, targets, features, iteration)
    inputs = {k: x for k, x in heads.named_parameters() if "mask_head" in k}
    inputs["features"] = features["p2"]
    found = {}
    for name, loss in losses.items():
        values = torch.autograd.grad(loss, inputs.values(), allow_unused=True, retain_graph=True)
        found[name] = {k: g for k, g in zip(inputs, values) if g is not None}
    return found


def is_same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def stripe(box):
    x0, y0, x1, y1 = box
    return polygon_of([x0, y0, (x0 + x1) / 2, y1])


@pytest.mark.parametrize("bitmask, teacher_deconv", [(False, 1), (True, 2)])
@pytest.mark.parametrize("use", ["alone", "mean", "ignore"])
@pytest.mark.parametrize("iteration", [0, 10], ids=["before the gate", "after"])
def test_a_models_masks_change_no_gradient_of_the_teacher(bitmask, use, iteration, teacher_deconv):
    heads = make_heads(warmup_iters=10, external_masks=use, teacher_deconv=teacher_deconv)
    results = []
    for shape in (triangle, stripe, None):
        targets = targets_of(WITH_MODEL_MASKS, bitmask)
        if shape is not None:
            add_model_masks(targets, shape=shape)
        results.append(gradients(heads, targets, iteration))
    teachers = [x["loss_mask_teacher"] for x in results]
    assert any("teacher_mask_head" in k for k in teachers[0]) and "features" in teachers[0]
    assert not any(k.startswith("mask_head") for k in teachers[0])
    assert all(is_same(teachers[0], x) for x in teachers[1:])
    students = [x["loss_mask"] for x in results]
    assert not any(k.startswith("teacher") for k in students[0])
    is_used = use == "alone" or (use == "mean" and iteration == 10)
    for other in students[1:]:
        assert is_same(students[0], other) == (not is_used)


@pytest.mark.parametrize("has_target", [True, False])
def test_the_students_gradient_is_that_of_the_bce_to_a_models_mask(has_target):
    """Autograd of a loss written out by hand, on the ROIs that have a target."""
    heads = make_heads(warmup_iters=10, pseudo_masks=PseudoMaskGenerator(exclude_seen=False))
    targets = targets_of([([[8, 10, 40, 30]], [1], [False])])
    add_model_masks(targets, {0: [0]} if has_target else {})
    features = make_features(1)
    found = gradients(heads, targets, features=features)["loss_mask"]
    rois = make_proposals(targets)
    mask_features, _ = heads.compute_mask_features(features, rois)
    logits = heads.mask_head.layers(mask_features)[:, 1]
    boxes = rois[0].proposal_boxes.tensor
    mask = PolygonMasks([triangle([8, 10, 40, 30])] * 2).crop_and_resize(boxes, 28).float()
    centres = (np.arange(28) + 0.5) / 28
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        xs, ys = x0 + centres * (x1 - x0), y0 + centres * (y1 - y0)
        inside = ((ys >= 10) & (ys <= 30))[:, None] & ((xs >= 8) & (xs <= 40))[None]
        mask[k] *= torch.from_numpy(inside)
    loss = -(mask * logits.sigmoid().log() + (1 - mask) * (1 - logits.sigmoid()).log()).mean()
    (expected,) = torch.autograd.grad(loss * has_target, heads.mask_head.predictor.weight)
    torch.testing.assert_close(found["mask_head.predictor.weight"], expected)
    assert expected.any() == has_target


def test_a_pair_refuses_the_key_of_the_single_head(tiny_cfg):
    opts = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads"]
    opts += ["MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS", True]
    with pytest.raises(ValueError, match="PSEUDO_MASK.EXTERNAL"):
        build_model(tiny_cfg(opts=opts))
