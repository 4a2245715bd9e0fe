"""ContrastMask's prior by its parts, where its gradients go, and its edge cases."""

import dataclasses

import numpy as np
import pytest
import torch
from contrast_reference import cosine, loss_by_hand
from detectron2.config import get_cfg
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling.mask_loss import crop_gt_masks
from teacher_student_mask.modeling.priors import KeptBoxFeatures, ROIContext, build_mask_prior
from teacher_student_mask.modeling.priors.class_activation import normalize_per_roi, raw_cam_of
from teacher_student_mask.modeling.priors.contrast_sets import sets_of_cams, sets_of_masks
from teacher_student_mask.modeling.priors.contrastive import (
    ContrastivePrior,
    attend_by_cosine,
    ramp,
)
from teacher_student_mask.modeling.priors.contrastive_loss import contrastive_loss

CHANNELS, SIDE, FINE = 4, 6, 12


def test_attention_against_loops():
    e = torch.rand(2, 3, 4, 4, dtype=torch.float64) - 0.3
    actual = attend_by_cosine(e).numpy()
    for n in range(2):
        cells = e[n].reshape(3, 16).T.numpy()
        for i in range(16):
            weights = np.exp([cosine(cells[i], x) for x in cells])
            expected = (weights / weights.sum()) @ cells
            assert np.allclose(actual[n, :, i // 4, i % 4], expected, atol=1e-6)


def test_attention_of_nothing_and_of_zeros():
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    attend_by_cosine(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    zeros = torch.zeros(1, 3, 4, 4, requires_grad=True)
    out = attend_by_cosine(zeros)
    out.square().sum().backward()
    assert not out.any() and zeros.grad.isfinite().all()


def test_ramp():
    assert [ramp(i * 10, 10) for i in range(7)] == [0.25, 0.25, 0.5, 0.75, 1, 1, 1]
    assert ramp(29, 10) == 0.5 and ramp(30, 10) == 0.75


def make_prior(**kwargs):
    torch.manual_seed(0)
    pooler = ROIPooler(FINE, (0.25,), 0, "ROIAlignV2")
    arguments = {"in_channels": CHANNELS, "out_channels": CHANNELS, "pooler": pooler}
    return ContrastivePrior(**arguments | {"num_conv": 2, "conv_dim": 5} | kwargs)


def make_context(
    has_mask=(True, False, True), field="proposal_boxes", constant=False, own_boxes=False
):
    """
    One image of 64 x 64 with a ROI for each entry; masks are disks, or noise without a mask.

    In training a background ROI is sampled before them. With ``own_boxes`` the mask heads' ROIs
    are as many others, which are not among the sampled ones, as with TRAIN_ON_GT_BOXES.
    """
    n = len(has_mask)
    generator = torch.Generator().manual_seed(1)
    instances = Instances((64, 64))
    corners = torch.rand(n, 2, generator=generator) * 20
    instances.set(field, Boxes(torch.cat([corners, corners + 30], dim=1)))
    classes = "gt_classes" if field == "proposal_boxes" else "pred_classes"
    instances.set(classes, torch.arange(n) % 2)
    if n > 0 and field == "proposal_boxes":
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        disks = [(y - c[1] - 15) ** 2 + (x - c[0] - 15) ** 2 < 100 for c in corners]
        instances.gt_masks = BitMasks(torch.stack(disks))
        instances.gt_has_mask = torch.tensor(has_mask)
    maps = torch.rand(n + 1, 3, 7, 7, generator=generator)
    if constant:
        maps = torch.ones_like(maps)
    features = torch.randn(1, CHANNELS, 16, 16, generator=generator).requires_grad_()
    torch.manual_seed(1)
    classifier = nn.Linear(3, 3)
    if field == "pred_boxes":
        return ROIContext([instances], [features], KeptBoxFeatures(maps[1:], classifier))
    # As Detectron2's sampler: background carries the other fields of any object.
    sampled = instances[torch.arange(n + 1).sub(1).clamp(min=0)] if n else Instances((64, 64))
    boxes = torch.cat([torch.tensor([[30.0, 2, 62, 40]]), instances.proposal_boxes.tensor])
    sampled.proposal_boxes = Boxes(boxes)
    sampled.gt_classes = torch.cat([torch.tensor([2]), instances.gt_classes])
    sampled.box_features = maps.requires_grad_()
    kept = KeptBoxFeatures(maps[1:], classifier)
    if own_boxes:
        instances.proposal_boxes = Boxes(instances.proposal_boxes.tensor + 1)
        maps = torch.rand(n, 3, 7, 7, generator=generator)
        kept = KeptBoxFeatures(maps.requires_grad_(), classifier)
    return ROIContext([instances], [features], kept, [sampled])


def sampled_maps(context):
    """Of the background ROI, then of the others; with gradient."""
    return context.sampled[0].box_features


def run_prior(prior, context, features=None, iteration=0):
    n = len(context.instances[0])
    features = torch.zeros(n, CHANNELS, SIDE, SIDE) if features is None else features
    torch.manual_seed(2)
    with EventStorage(iteration):
        return prior(features, context)


def test_prior_by_its_parts():
    prior, context = make_prior().eval(), make_context(field="pred_boxes")
    features = torch.randn(3, CHANNELS, SIDE, SIDE)
    out, losses = run_prior(prior, context, features)
    assert losses == {}
    pooled = prior.pooler(context.feature_maps, [context.instances[0].pred_boxes])
    encoded = prior.encoder(pooled)
    assert encoded.shape == (3, 5, FINE, FINE) and encoded.min() >= 0
    y = F.interpolate(attend_by_cosine(encoded), (SIDE, SIDE), mode="bilinear")
    weight = prior.fuse.weight[:, :, 0, 0]
    expected = features + torch.einsum("oc,rcij->roij", weight, y) + prior.fuse.bias[:, None, None]
    for n, label in enumerate([0, 1, 0]):
        row = context.kept.classifier.weight[label]
        cam = (context.kept.maps[n] * row[:, None, None]).sum(0)
        # First resized, then normalised: the largest value is 1 whatever the grid.
        cam = F.interpolate(cam[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
        expected[n] += (cam - cam.min()) / (cam.max() - cam.min())
    assert torch.allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("own_boxes", [False, True])
def test_where_gradients_go(stop_gradient, own_boxes):
    prior = make_prior(stop_gradient=stop_gradient)
    context = make_context(own_boxes=own_boxes)
    sampled, own = sampled_maps(context), context.kept.maps
    out, losses = run_prior(prior, context)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward(retain_graph=True)
    # The mask loss trains the encoder, and the box head through the map, but not the backbone.
    assert prior.encoder[0].weight.grad.any() and prior.fuse.weight.grad.any()
    assert (sampled.grad is None) == (stop_gradient or own_boxes)
    if own_boxes:
        assert (own.grad is None) == stop_gradient
    else:
        assert stop_gradient or not sampled.grad[0].any() and sampled.grad[1:].any()
    assert context.kept.classifier.weight.grad is None
    assert context.feature_maps[0].grad is None and prior.projector[0].weight.grad is None
    for x in (sampled, own, *prior.parameters()):
        if x.is_leaf:
            x.grad = None
    # The contrastive loss trains its own head alone.
    losses["loss_mask_contrast"].backward()
    assert sampled.grad is None and not (own_boxes and own.grad is not None)
    assert context.kept.classifier.weight.grad is None and context.feature_maps[0].grad is None
    assert prior.projector[0].weight.grad.any() and prior.encoder[0].weight.grad.any()
    assert prior.fuse.weight.grad is None


def contexts_with_other_rois(everything=None):
    """The same sampled ROIs with other ROIs of the mask heads; how many, and if none is sampled."""
    everything = everything or make_context()
    (rois,), maps = everything.instances, everything.kept.maps
    for rows in ([], [1], [2, 0], [0, 1, 2]):
        kept = KeptBoxFeatures(maps[rows], everything.kept.classifier)
        # Indexed by a tensor, as an empty list selects nothing.
        chosen = [rois[torch.tensor(rows, dtype=torch.int64)]]
        yield dataclasses.replace(everything, instances=chosen, kept=kept), len(rows), False
    others = make_context(own_boxes=True)
    kept = KeptBoxFeatures(others.kept.maps, everything.kept.classifier)
    yield dataclasses.replace(everything, instances=others.instances, kept=kept), 3, True


def test_the_loss_is_of_all_sampled_foreground_whatever_the_mask_heads_see():
    """Once it saw the ROIs of the mask heads alone, with TRAIN_ON_GT_BOXES no proposal."""
    prior, context = make_prior(key_share=1.0), make_context()
    with torch.no_grad():
        # Of the ROI without a mask: high in one half, low in the other.
        sampled_maps(context)[2] = (torch.arange(7) < 3).float()
    (foreground,) = context.instances
    boxes = [foreground.proposal_boxes]
    projections = prior.projector(prior.encoder(prior.pooler(context.feature_maps, boxes)))
    cams = []
    for n, label in enumerate([0, 1, 0]):
        row = context.kept.classifier.weight[label]
        cam = (sampled_maps(context)[n + 1] * row[:, None, None]).sum(0)
        cam = F.interpolate(cam[None, None], (FINE, FINE), mode="bilinear")[0, 0]
        cams.append((cam - cam.min()) / (cam.max() - cam.min() + 1e-4))
    masks = foreground.gt_masks.crop_and_resize(foreground.proposal_boxes.tensor, FINE)
    sets = sets_of_masks(masks).where(foreground.gt_has_mask, sets_of_cams(torch.stack(cams)))
    # All three take part, the one without a mask, too.
    assert sets.have_enough(5).all()
    expected = loss_by_hand(projections.detach().numpy(), sets) * 0.1 / 4
    for other, *_ in contexts_with_other_rois(context):
        loss = run_prior(prior, other)[1]["loss_mask_contrast"]
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_background_takes_no_part():
    prior, context = make_prior(), make_context()
    expected, expected_losses = run_prior(prior, context)
    (sampled,) = context.sampled
    sampled.proposal_boxes.tensor[0] = torch.tensor([0.0, 0, 20, 20])
    sampled.gt_masks.tensor[0] = True
    with torch.no_grad():
        sampled.box_features[0] = 5
    out, losses = run_prior(prior, context)
    assert torch.equal(out, expected) and losses == expected_losses


def test_training_and_inference_give_the_same_features():
    prior = make_prior()
    for context, n, _ in contexts_with_other_rois():
        features = torch.randn(n, CHANNELS, SIDE, SIDE)
        out, _ = run_prior(prior.train(), context, features)
        expected, losses = run_prior(prior.eval(), context, features)
        assert losses == {} and torch.allclose(out, expected, atol=1e-5)


def test_objects_of_two_classes_in_one_box_have_the_maps_of_their_classes():
    """Bug: in training the second had the class activation map of the first's class."""
    context, features = make_context((True, True)), torch.randn(2, CHANNELS, SIDE, SIDE)
    assert context.instances[0].gt_classes.tolist() == [0, 1]
    with torch.no_grad():
        # One box has one map of the box head, too.
        context.instances[0].proposal_boxes.tensor[1] = context.instances[0].proposal_boxes.tensor[
            0
        ]
        context.sampled[0].proposal_boxes.tensor[2] = context.sampled[0].proposal_boxes.tensor[1]
        sampled_maps(context)[2] = sampled_maps(context)[1]
        prior = make_prior()
        out, _ = run_prior(prior.train(), context, features)
        expected, _ = run_prior(prior.eval(), context, features)
    torch.testing.assert_close(out, expected)
    added = out - features
    assert (added[0] - added[1]).abs().max() > 0.1


def test_nothing_is_computed_twice():
    prior, calls = make_prior(), {}
    for name in ("pooler", "encoder", "projector", "fuse"):
        module = getattr(prior, name)
        calls[name] = []
        module.register_forward_hook(lambda m, i, out, rows=calls[name]: rows.append(len(out)))
    for context, n, are_others in contexts_with_other_rois():
        run_prior(prior, context)
        assert calls["encoder"] == calls["pooler"] == ([3, 3] if are_others else [3])
        assert calls["projector"] == [3] and calls["fuse"] == [n]
        for rows in calls.values():
            rows.clear()


@pytest.mark.parametrize("official", [False, True])
def test_official_denominator_and_share_of_the_keys_reach_the_loss(official):
    prior, context = make_prior(official_denominator=official, loss_weight=2.0), make_context()
    values = {}
    for share in (0.3, 1.0):
        seen = []
        hook = prior.projector.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
        prior.key_share = share
        loss = run_prior(prior, context)[1]["loss_mask_contrast"]
        hook.remove()
        (foreground,) = context.instances
        kept = KeptBoxFeatures(sampled_maps(context)[1:], context.kept.classifier)
        cam = F.interpolate(raw_cam_of([foreground], kept), (FINE, FINE), mode="bilinear")
        masks = crop_gt_masks([foreground], FINE, torch.device("cpu")) > 0.5
        by_cam = sets_of_cams(normalize_per_roi(cam)[:, 0])
        sets = sets_of_masks(masks).where(foreground.gt_has_mask, by_cam)
        for other in (False, True):
            torch.manual_seed(2)
            expected = contrastive_loss(seen[0], sets, share, other).item() * 2.0 / 4
            assert (loss.item() == pytest.approx(expected, rel=1e-5)) == (other == official)
        values[share] = loss.item()
    assert values[0.3] != pytest.approx(values[1.0], rel=1e-3)


def test_weight_and_schedule_of_the_loss():
    prior, context = make_prior(loss_weight=0.1, epoch_iters=10), make_context()
    values = []
    for iteration in (0, 25, 40, 400):
        _, losses = run_prior(prior, context, iteration=iteration)
        values.append(losses["loss_mask_contrast"].item())
    assert values[0] > 0
    assert [x / values[0] for x in values] == pytest.approx([1, 2, 4, 4])
    prior.loss_weight = 0.3
    _, losses = run_prior(prior, context)
    assert losses["loss_mask_contrast"].item() / values[0] == pytest.approx(3)


def test_masks_of_rois_without_one_do_not_count():
    prior = make_prior()
    context = make_context()
    expected = run_prior(prior, context)[1]["loss_mask_contrast"]
    # Row 0 is background, 1 and 3 have a mask.
    masks = context.sampled[0].gt_masks.tensor
    masks[2] = torch.rand(64, 64) < 0.5
    assert torch.equal(run_prior(prior, context)[1]["loss_mask_contrast"], expected)
    masks[1] = masks[1].roll(9, dims=0)
    assert run_prior(prior, context)[1]["loss_mask_contrast"] != expected


def test_rois_without_a_mask_take_part_by_their_map():
    prior, context = make_prior(), make_context((False, False))
    with torch.no_grad():
        # Left half high, or low, and the other half the other way.
        maps = sampled_maps(context)
        maps.copy_((torch.arange(7) < 3).float().expand_as(maps))
    loss = run_prior(prior, context)[1]["loss_mask_contrast"]
    assert loss > 0
    with torch.no_grad():
        maps.copy_(maps.flip(3))
    assert run_prior(prior, context)[1]["loss_mask_contrast"] != loss


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN_N", ""])
@pytest.mark.parametrize("has_mask", [(), (False,), (False, False), (True,)])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("own_boxes", [False, True])
def test_few_rois_and_constant_maps(norm, has_mask, constant, own_boxes):
    prior = make_prior(norm=norm)
    context = make_context(has_mask, constant=constant, own_boxes=own_boxes)
    out, losses = run_prior(prior, context)
    assert out.shape == (len(has_mask), CHANNELS, SIDE, SIDE) and out.isfinite().all()
    assert losses["loss_mask_contrast"].isfinite()
    (out.square().sum() + losses["loss_mask_contrast"]).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(x.isfinite().all() for x in prior.buffers())
    if constant and not any(has_mask):
        # Nothing is high, nothing to compare.
        assert losses["loss_mask_contrast"] == 0


def test_half_precision():
    prior, context = make_prior(), make_context()
    expected = run_prior(prior, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, losses = run_prior(prior, context)
        half, _ = run_prior(prior, context, torch.zeros(3, CHANNELS, SIDE, SIDE).bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(out, expected[0], atol=0.1)
    loss = losses["loss_mask_contrast"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected[1]["loss_mask_contrast"].item(), rel=0.02)


def test_prior_is_built_from_the_config():
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.MODEL.ROI_MASK_PRIOR.NAME = "ContrastivePrior"
    shapes = {f"p{k}": ShapeSpec(channels=256, stride=2**k) for k in (2, 3, 4, 5)}
    shape = ShapeSpec(channels=256, height=14, width=14)
    prior = build_mask_prior(cfg, shape, shapes)
    convs = [x for x in prior.encoder if isinstance(x, nn.Conv2d)]
    assert len(convs) == 8 and all(x.weight.shape == (256, 256, 3, 3) for x in convs)
    assert [type(x.norm) for x in prior.projector[:2]] == [NaiveSyncBatchNorm] * 2
    assert prior.pooler.output_size == (28, 28) and prior.pooler.min_level == 2
    assert prior.needs_box_features
    assert (prior.loss_weight, prior.epoch_iters, prior.key_share) == (0.1, 7330, 0.3)
    assert prior.official_denominator is False
    for key, value, message in (
        ("NUM_CONV", 0, "NUM_CONV is 0; allowed: 1 or more"),
        ("EPOCH_ITERS", 0, "EPOCH_ITERS is 0; allowed: 1 or more"),
        ("KEY_SHARE", 1.5, "KEY_SHARE is 1.5; allowed: above 0, up to 1"),
    ):
        wrong = cfg.clone()
        wrong.MODEL.ROI_MASK_PRIOR.CONTRAST[key] = value
        with pytest.raises(ValueError, match=message):
            build_mask_prior(wrong, shape, shapes)


def test_missing_box_features_are_named():
    context = make_context()
    with pytest.raises(ValueError, match='ROI_BOX_HEAD.NAME to "FeatureMapBoxHead"'):
        run_prior(make_prior(), ROIContext(context.instances, context.feature_maps))
    with pytest.raises(ValueError, match="in training give ROIContext.sampled"):
        run_prior(make_prior(), dataclasses.replace(context, sampled=None))
    too_few = KeptBoxFeatures(context.kept.maps[:2], context.kept.classifier)
    with pytest.raises(ValueError, match="2 box features for 3 ROIs"):
        run_prior(make_prior().eval(), dataclasses.replace(context, kept=too_few))
