"""ContrastMask's sets, loss and prior against loops in numpy; where its gradients go."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from teacher_student_mask.modeling.priors import ROIContext
from teacher_student_mask.modeling.priors.contrastmask import (
    ContrastivePrior,
    TwoBranchBoxHead,
    attend_by_cosine,
    contrastive_loss,
    ramp,
    sample_pixels,
    sets_of_cams,
    sets_of_masks,
)

ROI_SHAPE = ShapeSpec(channels=8, height=7, width=7)
CHANNELS, SIDE, FINE = 4, 6, 12


def test_two_branches_by_their_layers():
    head = TwoBranchBoxHead(ROI_SHAPE, conv_widths=[5, 12])
    assert head.output_shape == ShapeSpec(channels=12)
    state = head.state_dict()

    def conv(x, name):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return nn.functional.conv2d(x, weight, bias, padding=1).relu()

    for x in head.parameters():
        if x.dim() == 1:  # biases start at 0
            nn.init.normal_(x)
    x = torch.randn(4, 8, 7, 7)
    shared = conv(conv(x, "shared.conv1"), "shared.conv2")
    class_maps, box_maps = head(x)
    assert torch.allclose(class_maps, conv(shared, "class_branch.conv1"), atol=1e-5)
    expected = conv(conv(shared, "box_branch.conv1"), "box_branch.conv2")
    assert torch.allclose(box_maps, expected, atol=1e-5)


def reference(mask):
    """easy+, hard+, easy-, hard- of one mask, pixel by pixel."""
    rows, columns = np.gradient(mask.astype(float))
    edge = (rows != 0) | (columns != 0)
    points = np.argwhere(edge)
    band = np.zeros_like(mask)
    for i, j in np.ndindex(mask.shape):
        band[i, j] = any(math.dist((i, j), p) < 2 for p in points)
    hard = band & ~edge
    return mask & ~hard, hard & mask, ~(mask | band), hard & ~mask


def random_masks(seed, side=9):
    """Blobs, noise, an empty and a full mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    cy, cx, r = rng.uniform(0, side, 3)
    masks = [(y - cy) ** 2 + (x - cx) ** 2 < r**2, rng.random((side, side)) < 0.5]
    return np.stack([*masks, np.zeros((side, side), bool), np.ones((side, side), bool)])


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6))
def test_sets_of_masks_against_loops(seed):
    masks = random_masks(seed)
    sets = sets_of_masks(torch.from_numpy(masks))
    for n, mask in enumerate(masks):
        for actual, expected in zip(sets[:4], reference(mask)):
            assert np.array_equal(actual[n].numpy(), expected)
    assert np.array_equal(sets[4:].numpy(), [masks, ~masks])


def test_sets_of_cams_by_hand():
    cam = torch.tensor([[[0.0, 0.05, 0.1], [0.5, 0.9, 0.91], [1.0, 0.099, 0.2]]])
    sets = sets_of_cams(cam)
    high = [[0, 0, 0], [0, 0, 1], [1, 0, 0]]
    low = [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert sets[:, 0].int().tolist() == [high, high, low, low, high, low]


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_a_share_of_the_pixels_is_drawn(seed, share):
    masks = torch.from_numpy(random_masks(seed, side=12))
    torch.manual_seed(seed)
    drawn = sample_pixels(masks, share)
    assert not (drawn & ~masks).any()
    for mask, x in zip(masks, drawn):
        assert int(x.sum()) == math.ceil(int(mask.sum()) * share)
    torch.manual_seed(seed)
    assert torch.equal(sample_pixels(masks, share), drawn)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def nce_by_hand(positives, negatives, t, official):
    total = 0.0
    for a in positives:
        own = math.exp(a) if official else math.exp(a / t)
        total -= math.log(math.exp(a / t) / (own + sum(math.exp(b / t) for b in negatives)))
    return total / len(positives)


def loss_by_hand(p, sets, official=False):
    """With all pixels as keys; p: (R, D, M, M)."""
    kept = [n for n in range(len(p)) if all(int(x[n].sum()) >= 5 for x in sets[:4])]

    def pixels(n, x):
        return [p[n, :, i, j] for i, j in np.argwhere(x[n].numpy())]

    def query(x):
        return np.mean([np.mean(pixels(n, x), axis=0) for n in kept], axis=0)

    keys = [[v for n in kept for v in pixels(n, x)] for x in sets[:4]]
    easy_in, hard_in, easy_out, hard_out = keys
    total = 0.0
    for q, (ea, eb), (ha, hb) in (
        (query(sets[4]), (easy_in, easy_out), (hard_in, hard_out)),
        (query(sets[5]), (easy_out, easy_in), (hard_out, hard_in)),
    ):
        for a, b, t in ((ea, eb, 0.3), (ha, hb, 0.7)):
            s_a, s_b = ([cosine(q, v - q) for v in x] for x in (a, b))
            total += nce_by_hand(s_a, s_b, t, official)
    return total


def some_sets(seed=0):
    """ROIs with a mask, by a map, and one with too few pixels."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(FINE), torch.arange(FINE), indexing="ij")
    disk = (y - 5) ** 2 + (x - 6) ** 2 < 14
    masks = torch.stack([disk, disk, torch.zeros_like(disk), x < 6])
    cams = torch.rand(4, FINE, FINE, generator=generator)
    has_mask = torch.tensor([True, False, True, True])[:, None, None]
    return torch.where(has_mask, sets_of_masks(masks), sets_of_cams(cams))


@pytest.mark.parametrize("official", [False, True])
def test_loss_against_loops(official):
    sets = some_sets()
    projections = torch.randn(4, 3, FINE, FINE, dtype=torch.float64, requires_grad=True)
    actual = contrastive_loss(projections, sets, 1.0, official)
    expected = loss_by_hand(projections.detach().numpy(), sets, official)
    assert actual.item() == pytest.approx(expected)
    actual.backward()
    moves = projections.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert moves.tolist() == [True, True, False, True]


def test_attention_against_loops():
    e = torch.rand(2, 3, 4, 4, dtype=torch.float64) - 0.3
    actual = attend_by_cosine(e).numpy()
    for n in range(2):
        cells = e[n].reshape(3, 16).T.numpy()
        for i in range(16):
            weights = np.exp([cosine(cells[i], x) for x in cells])
            expected = (weights / weights.sum()) @ cells
            assert np.allclose(actual[n, :, i // 4, i % 4], expected, atol=1e-6)


def test_initial_values_are_those_of_the_official_code():
    prior = make_prior(conv_dim=64, out_channels=128)
    # Kaiming's with fan out: normal with variance 2 / 128, no bias.
    assert prior.fuse.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert not prior.fuse.bias.any()
    # torch's linear layer: uniform up to 1 / sqrt(64), the bias, too.
    for x in prior.projector[-1].parameters():
        assert 0.9 / 8 < x.abs().max() <= 1 / 8


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
        return ROIContext([instances], [features], maps[1:], classifier)
    # As Detectron2's sampler: background carries the other fields of any object.
    sampled = instances[torch.arange(n + 1).sub(1).clamp(min=0)] if n else Instances((64, 64))
    boxes = torch.cat([torch.tensor([[30.0, 2, 62, 40]]), instances.proposal_boxes.tensor])
    sampled.proposal_boxes = Boxes(boxes)
    sampled.gt_classes = torch.cat([torch.tensor([2]), instances.gt_classes])
    sampled.box_features = maps.requires_grad_()
    own_maps = maps[1:]
    if own_boxes:
        instances.proposal_boxes = Boxes(instances.proposal_boxes.tensor + 1)
        own_maps = torch.rand(n, 3, 7, 7, generator=generator).requires_grad_()
    return ROIContext([instances], [features], own_maps, classifier, [sampled])


def sampled_maps(context):
    """Of the background ROI, then of the others; with gradient."""
    return context.sampled[0].box_features


def run_prior(prior, context, features=None):
    n = len(context.instances[0])
    features = torch.zeros(n, CHANNELS, SIDE, SIDE) if features is None else features
    torch.manual_seed(2)
    with EventStorage():
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
        row = context.classifier.weight[label]
        cam = (context.class_maps[n] * row[:, None, None]).sum(0)
        # First resized, then normalised: the largest value is 1 whatever the grid.
        cam = F.interpolate(cam[None, None], (SIDE, SIDE), mode="bilinear")[0, 0]
        expected[n] += (cam - cam.min()) / (cam.max() - cam.min())
    assert torch.allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("own_boxes", [False, True])
def test_where_gradients_go(stop_gradient, own_boxes):
    prior = make_prior(stop_gradient=stop_gradient)
    context = make_context(own_boxes=own_boxes)
    sampled, own = sampled_maps(context), context.class_maps
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
    assert context.classifier.weight.grad is None
    assert context.feature_maps[0].grad is None and prior.projector[0].weight.grad is None
    for x in (sampled, own, *prior.parameters()):
        if x.is_leaf:
            x.grad = None
    # The contrastive loss trains its own head alone.
    losses["loss_mask_contrast"].backward()
    assert sampled.grad is None and not (own_boxes and own.grad is not None)
    assert context.classifier.weight.grad is None and context.feature_maps[0].grad is None
    assert prior.projector[0].weight.grad.any() and prior.encoder[0].weight.grad.any()
    assert prior.fuse.weight.grad is None


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
        row = context.classifier.weight[label]
        cam = (sampled_maps(context)[n + 1] * row[:, None, None]).sum(0)
        # 7 -> 14 -> 28 cells in the official code.
        cam = F.interpolate(cam[None, None], (SIDE, SIDE), mode="bilinear")
        cam = F.interpolate(cam, (FINE, FINE), mode="bilinear")[0, 0]
        cams.append((cam - cam.min()) / (cam.max() - cam.min() + 1e-4))
    masks = foreground.gt_masks.crop_and_resize(foreground.proposal_boxes.tensor, FINE)
    sets = torch.where(
        foreground.gt_has_mask[:, None, None], sets_of_masks(masks), sets_of_cams(torch.stack(cams))
    )
    # All three take part, the one without a mask, too.
    assert (sets[:4].flatten(2).sum(2) >= 5).all()
    expected = loss_by_hand(projections.detach().numpy(), sets) * 0.1 / 4
    rows_of_mask_heads = [torch.tensor(x, dtype=torch.int64) for x in ([], [1], [2, 0], [0, 1, 2])]
    others = [(foreground[x], context.class_maps[x]) for x in rows_of_mask_heads]
    not_sampled = make_context(own_boxes=True)
    others.append((not_sampled.instances[0], not_sampled.class_maps))
    for rois, maps in others:
        other = dataclasses.replace(context, instances=[rois], class_maps=maps)
        features = torch.randn(len(other.instances[0]), CHANNELS, SIDE, SIDE)
        out, losses = run_prior(prior.train(), other, features)
        assert losses["loss_mask_contrast"].item() == pytest.approx(expected, rel=1e-4)
        _, losses = run_prior(prior, dataclasses.replace(other, sampled=None), features)
        assert losses == {}
        at_inference, losses = run_prior(prior.eval(), other, features)
        assert losses == {} and torch.allclose(out, at_inference, atol=1e-5)


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
