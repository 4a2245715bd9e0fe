"""Where each gradient comes from when a model made some of the masks, and the student's targets."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from detectron2.utils.events import EventStorage
from roi_heads_factory import (
    HALF_EMPTY,
    NO_OBJECT,
    NONE_SEEN,
    NONE_UNSEEN,
    SIZE,
    make_features,
    make_heads,
    make_images,
    make_proposals,
    plain_proposals,
    polygon_of,
    targets_of,
)

from teacher_student_mask import ImageMask, PartiallySupervisedROIHeads
from teacher_student_mask.modeling.box_supervision import BoxSupervision
from teacher_student_mask.modeling.pseudo_mask import PseudoMaskGenerator, generate_pseudo_masks
from teacher_student_mask.modeling.student_targets import make_student_targets
from teacher_student_mask.modeling.training_rois import has_external_mask_of
from teacher_student_mask.structures import SparseMasks

SIDE = 28
# Of two images: a human mask, a model's, none; none, a model's.
BATCH = [
    ([[4, 4, 30, 30], [20, 20, 50, 56], [6, 30, 34, 60]], [0, 2, 1], [True, False, False]),
    ([[8, 10, 40, 30], [30, 8, 60, 44]], [1, 0], [False, False]),
]
EXTERNAL = {0: [1], 1: [1]}
KINDS = pytest.mark.parametrize("kind", ["polygon", "bitmask"])


def triangle(box):
    """A mask of the upper left half of a box, as a model might make."""
    return polygon_of(box, corner=True)


def stripe(box):
    x0, y0, x1, y1 = box
    middle = (x0 + x1) / 2
    return polygon_of([x0, y0, middle, y1])


def add_external(targets, external=EXTERNAL, shape=triangle, kind="polygon"):
    """Give objects of images a model's mask, as the mapper does."""
    for number, x in enumerate(targets):
        rows = torch.full((len(x),), -1)
        chosen = external.get(number, [])
        rows[chosen] = torch.arange(len(chosen))
        x.gt_has_external_mask = rows >= 0
        if chosen:
            masks = PolygonMasks([shape(x.gt_boxes.tensor[i].tolist()) for i in chosen])
            if kind == "bitmask":
                masks = BitMasks.from_polygon_masks(masks, SIZE, SIZE)
            x.gt_external_masks = SparseMasks(masks, rows)
    return targets


def run(heads, targets, iteration=0, features=None):
    """Losses of the mask branch on given proposals, and what was logged."""
    heads.train()
    torch.manual_seed(0)
    features = features or make_features(len(targets))
    with EventStorage(iteration) as storage:
        losses = heads._forward_mask(features, make_proposals(targets))
        return losses, {k: v[0] for k, v in storage.latest().items()}, features["p2"]


def gradients(heads, targets, **options):
    """Of each loss, to each mask head and to the features."""
    losses, _, features = run(heads, targets, **options)
    found = {}
    for name, loss in losses.items():
        inputs = {"features": features}
        inputs.update(heads.named_parameters())
        inputs = {k: v for k, v in inputs.items() if k == "features" or "mask_head" in k}
        grads = torch.autograd.grad(loss, inputs.values(), allow_unused=True, retain_graph=True)
        found[name] = {k: g for k, g in zip(inputs, grads) if g is not None}
    return found


def is_same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("kind, teacher_deconv", [("polygon", 1), ("bitmask", 2)])
@pytest.mark.parametrize("use", ["alone", "mean", "ignore"])
@pytest.mark.parametrize("iteration", [0, 10], ids=["before the gate", "after"])
def test_the_teachers_gradients_never_depend_on_it(kind, use, iteration, teacher_deconv):
    heads = make_heads(warmup_iters=10, external_masks=use, teacher_deconv=teacher_deconv)
    results = []
    for shape in (triangle, stripe, None):
        targets = targets_of(BATCH)
        if shape is not None:
            add_external(targets, shape=shape, kind=kind)
        results.append(gradients(heads, targets, iteration=iteration))
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
def test_the_students_gradient_is_that_of_the_bce_to_the_external_mask(has_target):
    """Autograd of a loss written out by hand, on the ROIs that have a target."""
    heads = make_heads(warmup_iters=10, pseudo_masks=PseudoMaskGenerator(exclude_seen=False))
    targets = targets_of([([[8, 10, 40, 30]], [1], [False])])
    add_external(targets, {0: [0]} if has_target else {})
    features = make_features(1)
    found = gradients(heads, targets, features=features)["loss_mask"]
    rois = make_proposals(targets)
    logits = heads.compute_mask_logits(features, rois)[1]
    boxes = rois[0].proposal_boxes.tensor
    mask = PolygonMasks([triangle([8, 10, 40, 30])] * 2).crop_and_resize(boxes, SIDE).float()
    centres = (np.arange(SIDE) + 0.5) / SIDE
    for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        xs, ys = x0 + centres * (x1 - x0), y0 + centres * (y1 - y0)
        inside = ((ys >= 10) & (ys <= 30))[:, None] & ((xs >= 8) & (xs <= 40))[None]
        mask[k] *= torch.from_numpy(inside)
    loss = -(mask * logits.sigmoid().log() + (1 - mask) * (1 - logits.sigmoid()).log()).mean()
    (expected,) = torch.autograd.grad(loss * has_target, heads.mask_head.predictor.weight)
    torch.testing.assert_close(found["mask_head.predictor.weight"], expected)
    assert expected.any() == has_target


def random_inputs(num_rois, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rois, SIDE, SIDE, generator=generator) * 2 for _ in range(2)]


def rois_of(targets):
    return make_proposals(targets)


def numpy_mean(teacher, student, external, method, inside, excluded):
    """The target of one ROI for "mean", written out."""
    p_t, p_s = 1 / (1 + np.exp(-teacher)), 1 / (1 + np.exp(-student))
    q = (p_t + external) / 2
    if method == "interact":
        mask = (q + p_s) / 2 >= 0.5
    elif method == "threshold":
        mask = q >= 0.5
    else:
        mask = q
    return mask * inside * ~excluded


@KINDS
@pytest.mark.parametrize("method", ["none", "threshold", "interact"])
def test_mean_is_numpys(kind, method):
    targets = add_external(targets_of(BATCH), kind=kind)
    rois = rois_of(targets)
    teacher, student = random_inputs(10)
    made, has_target, _ = make_student_targets(
        torch.zeros(10, SIDE, SIDE),
        rois,
        teacher,
        student,
        PseudoMaskGenerator(method=method),
        external="mean",
    )
    assert has_target.all()
    # Two ROIs an object: row 1 of each image.
    checked = 0
    for image, offset in ((0, 2), (1, 8)):
        x = rois[image][2:4]
        boxes, gt_boxes = x.proposal_boxes.tensor.numpy(), x.gt_boxes.tensor.numpy()
        for k in range(2):
            external = PolygonMasks([triangle(gt_boxes[k].tolist())]).crop_and_resize(
                x.proposal_boxes.tensor[k : k + 1], SIDE
            )
            if kind == "bitmask":
                external = BitMasks.from_polygon_masks(
                    PolygonMasks([triangle(gt_boxes[k].tolist())]), SIZE, SIZE
                ).crop_and_resize(x.proposal_boxes.tensor[k : k + 1], SIDE)
            centres = (np.arange(SIDE, dtype=np.float32) + np.float32(0.5)) / np.float32(SIDE)
            (x0, y0, x1, y1), (gx0, gy0, gx1, gy1) = boxes[k], gt_boxes[k]
            xs, ys = x0 + centres * (x1 - x0), y0 + centres * (y1 - y0)
            inside = ((ys >= gy0) & (ys <= gy1))[:, None] & ((xs >= gx0) & (xs <= gx1))[None]
            excluded = x.gt_exclusion_masks[k].crop_and_resize(
                x.proposal_boxes.tensor[k : k + 1], SIDE
            )
            expected = numpy_mean(
                teacher[offset + k].numpy(),
                student[offset + k].numpy(),
                external[0].numpy(),
                method,
                inside,
                excluded[0].numpy(),
            )
            np.testing.assert_allclose(made[offset + k].numpy(), expected, atol=1e-6)
            checked += expected.any()
    assert checked


@pytest.mark.parametrize("method", ["none", "threshold", "interact", "box_fit"])
@pytest.mark.parametrize("use", ["alone", "mean", "ignore"])
def test_other_rois_have_the_targets_they_had(method, use):
    teacher, student = random_inputs(10)
    results = []
    for external in ({}, EXTERNAL):
        rois = rois_of(add_external(targets_of(BATCH), external))
        results.append(
            make_student_targets(
                torch.zeros(10, SIDE, SIDE),
                rois,
                teacher,
                student,
                PseudoMaskGenerator(method=method),
                external=use,
            )[0]
        )
    changed = (results[0] != results[1]).flatten(1).any(dim=1)
    is_external = torch.cat([has_external_mask_of(x) for x in rois])
    assert not changed[~is_external].any()
    assert changed[is_external].any() == (use != "ignore")


def test_the_finer_teacher_is_averaged_before_the_mean():
    rois = rois_of(add_external(targets_of(BATCH)))
    teacher, student = random_inputs(10)
    finer = teacher.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    zeros, generator = torch.zeros(10, SIDE, SIDE), PseudoMaskGenerator(method="none")
    made = [
        make_student_targets(zeros, rois, x, student, generator, external="mean")[0]
        for x in (teacher, finer)
    ]
    torch.testing.assert_close(*made)


def test_cleaning_applies_to_it():
    # The mask is all of the image; the box and the masks of other objects limit it.
    targets = targets_of(BATCH)
    add_external(targets, shape=lambda box: polygon_of([0, 0, SIZE, SIZE]))
    annotated = torch.zeros(SIZE, SIZE)
    annotated[25:40, 22:34] = 1
    targets[0].gt_exclusion_masks = ImageMask(annotated, 3)
    rois = rois_of(targets)
    teacher, student = random_inputs(10)
    for clip, exclude in ((True, True), (False, True), (True, False), (False, False)):
        generator = PseudoMaskGenerator(clip_to_box=clip, exclude_seen=exclude)
        made, has_target, _ = make_student_targets(
            torch.zeros(10, SIDE, SIDE), rois, teacher, student, generator, has_pseudo_masks=False
        )
        full = generate_pseudo_masks(
            torch.ones(2, SIDE, SIDE),
            torch.ones(2, SIDE, SIDE),
            method="threshold",
            roi_boxes=rois[0][2:4].proposal_boxes.tensor,
            gt_boxes=rois[0][2:4].gt_boxes.tensor,
            clip_to_box=clip,
            exclusion_masks=(
                rois[0][2:4].gt_exclusion_masks.crop_and_resize(
                    rois[0][2:4].proposal_boxes.tensor, SIDE
                )
                if exclude
                else None
            ),
        )
        assert torch.equal(made[2:4], full)
        assert bool((full == 0).any()) == (clip or exclude)
        assert has_target.tolist() == [True] * 4 + [False] * 4 + [True] * 2
        assert not made[4:8].any()


def test_scalars_tell_the_two_apart():
    heads = make_heads(warmup_iters=10)
    _, logged, _ = run(heads, add_external(targets_of(BATCH)), iteration=0)
    assert logged["external_mask/num_rois"] == 4 and "pseudo_mask/num_rois" not in logged
    assert 0 < logged["external_mask/fg_ratio"] < 1
    _, logged, _ = run(heads, add_external(targets_of(BATCH)), iteration=10)
    assert logged["external_mask/num_rois"] == logged["pseudo_mask/num_rois"] == 4
    _, logged, _ = run(heads, add_external(targets_of(BATCH), {}), iteration=10)
    assert not any(k.startswith("external_mask/") for k in logged)


@pytest.mark.parametrize("use", ["alone", "mean", "ignore"])
@pytest.mark.parametrize("batch", [NO_OBJECT, HALF_EMPTY, NONE_SEEN, NONE_UNSEEN])
@pytest.mark.parametrize("iteration", [0, 10], ids=["before the gate", "after"])
def test_every_batch_gives_every_loss_with_all_parameters_attached(use, batch, iteration):
    heads = make_heads(warmup_iters=10, external_masks=use).train()
    external = {k: [len(x[0]) - 1] for k, x in enumerate(batch) if x[2] and not x[2][-1]}
    targets = add_external(targets_of(batch), external)
    n = len(batch)
    with EventStorage(iteration):
        _, losses = heads(make_images(n), make_features(n), plain_proposals(n), targets)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_mask_teacher"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_the_only_head_takes_it_on_request_alone():
    batch = targets_of(BATCH)
    human = run(make_heads(PartiallySupervisedROIHeads, num_channels=1), batch)[0]["loss_mask"]
    results = {}
    for is_used in (False, True):
        heads = make_heads(
            PartiallySupervisedROIHeads, num_channels=1, train_on_external_masks=is_used
        )
        targets = add_external(targets_of(BATCH))
        results[is_used] = run(heads, targets)[0]["loss_mask"]
    assert torch.equal(results[False], human)
    assert not torch.equal(results[True], human)
    # Like ground truth: of the same shapes, marked as human ones.
    heads = make_heads(PartiallySupervisedROIHeads, num_channels=1, train_on_external_masks=True)
    as_human = targets_of(BATCH)
    for number, rows in EXTERNAL.items():
        x = as_human[number]
        for i in rows:
            x.gt_masks.polygons[i] = triangle(x.gt_boxes.tensor[i].tolist())
            x.gt_has_mask[i] = True
    torch.testing.assert_close(run(heads, as_human)[0]["loss_mask"], results[True])


def test_box_supervision_takes_it_for_an_object_without_a_mask():
    losses = []
    for is_used in (False, True):
        heads = make_heads(
            PartiallySupervisedROIHeads,
            num_channels=1,
            train_on_external_masks=is_used,
            box_supervision=BoxSupervision(warmup_iters=1),
        ).train()
        for external in ({}, EXTERNAL):
            n = len(BATCH)
            torch.manual_seed(0)
            with EventStorage(5):
                targets = add_external(targets_of(BATCH), external)
                features, images = make_features(n), make_images(n)
                losses.append(heads(images, features, plain_proposals(n), targets)[1])
    boxes = [{k: v for k, v in x.items() if "mask" in k and k != "loss_mask"} for x in losses]
    assert boxes[0] and all(x == boxes[0] for x in boxes[1:])


def test_a_teacher_that_would_train_on_it_is_refused():
    with pytest.raises(ValueError, match="TRAIN_ON_EXTERNAL_MASKS is True, but the teacher"):
        make_heads(train_on_external_masks=True)
    with pytest.raises(ValueError, match="EXTERNAL is 'both'; allowed: 'alone', 'mean', 'ignore'"):
        make_heads(external_masks="both")


def test_the_limit_of_rois_counts_it_as_one_without_a_mask():
    heads = make_heads(max_rois_without_mask=1).train()
    rois = make_proposals(add_external(targets_of(BATCH)))
    with EventStorage():
        kept = heads._select_training_rois(rois)
    assert [int(x.gt_has_mask.sum()) for x in kept] == [2, 0] and [len(x) for x in kept] == [3, 1]


def test_flags_without_masks_are_none():
    (x,) = add_external(targets_of(NONE_SEEN), {0: [1]})
    assert has_external_mask_of(x).tolist() == [False, True]
    # A human mask is never taken for a model's.
    x.gt_has_mask[1] = True
    assert not has_external_mask_of(x).any()
    x.gt_has_mask[1] = False
    x.remove("gt_external_masks")
    assert not has_external_mask_of(x).any()
