"""ContrastMask's prior and loss against numpy loops, and their edge cases."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.modeling.priors import KeptBoxFeatures, ROIContext, build_mask_prior
from teacher_student_mask.modeling.priors import contrastive_loss as loss_module
from teacher_student_mask.modeling.priors.contrast_sets import (
    PixelSets,
    sets_of_cams,
    sets_of_masks,
)
from teacher_student_mask.modeling.priors.contrastive import (
    ContrastivePrior,
    attend_by_cosine,
    ramp,
)
from teacher_student_mask.modeling.priors.contrastive_loss import (
    contrastive_loss,
    nce,
    similarity,
)

CHANNELS, SIDE, FINE = 4, 6, 12


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def nce_by_hand(positives, negatives, t, official):
    total = 0.0
    for a in positives:
        own = math.exp(a) if official else math.exp(a / t)
        total -= math.log(math.exp(a / t) / (own + sum(math.exp(b / t) for b in negatives)))
    return total / len(positives)


@pytest.mark.parametrize("official", [False, True])
def test_nce_by_hand(official):
    rng = np.random.default_rng(0)
    positives, negatives = rng.uniform(-1, 1, 5), rng.uniform(-1, 1, 7)
    actual = nce(torch.tensor(positives), torch.tensor(negatives), 0.3, official)
    assert actual.item() == pytest.approx(nce_by_hand(positives, negatives, 0.3, official))


def test_the_slip_of_the_official_code_makes_losses_below_zero():
    like, unlike = torch.tensor([1.0]), torch.tensor([-1.0])
    # -log(e^(1/.3) / (e^(1/.3) + e^(-1/.3))) = log(1 + e^(-2/.3)), and with e^1 in its place.
    assert nce(like, unlike, 0.3).item() == pytest.approx(math.log1p(math.exp(-2 / 0.3)), abs=1e-6)
    assert nce(like, unlike, 0.3, official_denominator=True) < -2


def test_similarity_is_of_keys_centred_by_the_query():
    rng = np.random.default_rng(0)
    q, keys = rng.normal(size=3), rng.normal(size=(5, 3))
    actual = similarity(torch.tensor(q), torch.tensor(keys))
    assert np.allclose(actual, [cosine(q, v - q) for v in keys])


def test_a_key_that_is_the_query_has_a_finite_gradient():
    query = torch.tensor([0.5, 1.0], requires_grad=True)
    similarity(query, query.detach().repeat(3, 1)).sum().backward()
    assert query.grad.isfinite().all() and query.grad.abs().max() <= 1e5


def loss_by_hand(p, sets, official=False):
    """With all pixels as keys; p: (R, D, M, M)."""
    kept = [n for n in range(len(p)) if all(int(x[n].sum()) >= 5 for x in sets.keys)]

    def pixels(n, x):
        return [p[n, :, i, j] for i, j in np.argwhere(x[n].numpy())]

    def query(x):
        return np.mean([np.mean(pixels(n, x), axis=0) for n in kept], axis=0)

    keys = [[v for n in kept for v in pixels(n, x)] for x in sets.keys]
    easy_in, hard_in, easy_out, hard_out = keys
    total = 0.0
    for q, (ea, eb), (ha, hb) in (
        (query(sets.inside), (easy_in, easy_out), (hard_in, hard_out)),
        (query(sets.outside), (easy_out, easy_in), (hard_out, hard_in)),
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
    return sets_of_masks(masks).where(torch.tensor([True, False, True, True]), sets_of_cams(cams))


@pytest.mark.parametrize("official", [False, True])
def test_loss_against_loops(official):
    sets = some_sets()
    assert sets.have_enough(5).tolist() == [True, True, False, True]
    projections = torch.randn(4, 3, FINE, FINE, dtype=torch.float64, requires_grad=True)
    actual = contrastive_loss(projections, sets, 1.0, official)
    expected = loss_by_hand(projections.detach().numpy(), sets, official)
    assert actual.item() == pytest.approx(expected)
    actual.backward()
    moves = projections.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert moves.tolist() == [True, True, False, True]


def test_gradient_of_the_loss(monkeypatch):
    monkeypatch.setattr(loss_module, "_MIN_PIXELS", 0)
    generator = torch.Generator().manual_seed(3)
    sets = PixelSets(*(torch.rand(2, 3, 3, generator=generator) < 0.6 for _ in range(6)))
    projections = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: contrastive_loss(p, sets, 1.0), (projections,))


def test_keys_are_drawn_with_the_generator_of_the_step():
    sets, projections = some_sets(), torch.randn(4, 3, FINE, FINE)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(contrastive_loss(projections, sets, 0.3).item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("num_rois", [0, 1, 3])
def test_no_roi_with_enough_pixels(num_rois):
    masks = torch.zeros(num_rois, FINE, FINE, dtype=torch.bool)
    projections = torch.full((num_rois, 3, FINE, FINE), 1e38, requires_grad=True)
    loss = contrastive_loss(projections, sets_of_masks(masks))
    assert loss.item() == 0
    loss.backward()
    assert projections.grad.shape == projections.shape and not projections.grad.any()


def test_projections_that_are_all_the_same():
    projections = torch.ones(4, 3, FINE, FINE, requires_grad=True)
    loss = contrastive_loss(projections, some_sets())
    loss.backward()
    assert loss.isfinite() and projections.grad.isfinite().all()


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


def make_context(has_mask=(True, False, True), field="proposal_boxes", constant=False):
    """One image of 64 x 64 with a ROI for each entry; masks are disks, or noise without a mask."""
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
    maps = torch.rand(n, 3, 7, 7, generator=generator)
    if constant:
        maps = torch.ones_like(maps)
    kept = KeptBoxFeatures(maps.requires_grad_(), nn.Linear(3, 3))
    features = torch.randn(1, CHANNELS, 16, 16, generator=generator).requires_grad_()
    return ROIContext([instances], [features], kept)


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
def test_where_gradients_go(stop_gradient):
    prior, context = make_prior(stop_gradient=stop_gradient), make_context()
    out, losses = run_prior(prior, context)
    weights = torch.randn(out.shape)
    (out * weights).sum().backward(retain_graph=True)
    # The mask loss trains the encoder, and the box head through the map, but not the backbone.
    assert prior.encoder[0].weight.grad.any() and prior.fuse.weight.grad.any()
    assert (context.kept.maps.grad is None) == stop_gradient
    assert context.kept.classifier.weight.grad is None
    assert context.feature_maps[0].grad is None and prior.projector[0].weight.grad is None
    for x in (context.kept.maps, *prior.parameters()):
        x.grad = None
    # The contrastive loss trains its own head alone.
    losses["loss_mask_contrast"].backward()
    assert context.kept.maps.grad is None and context.feature_maps[0].grad is None
    assert prior.projector[0].weight.grad.any() and prior.encoder[0].weight.grad.any()
    assert prior.fuse.weight.grad is None


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
    masks = context.instances[0].gt_masks.tensor
    masks[1] = torch.rand(64, 64) < 0.5
    assert torch.equal(run_prior(prior, context)[1]["loss_mask_contrast"], expected)
    masks[0] = masks[0].roll(9, dims=0)
    assert run_prior(prior, context)[1]["loss_mask_contrast"] != expected


def test_rois_without_a_mask_take_part_by_their_map():
    prior, context = make_prior(), make_context((False, False))
    with torch.no_grad():
        # Left half high, or low, and the other half the other way.
        context.kept.maps.copy_((torch.arange(7) < 3).float().expand_as(context.kept.maps))
    loss = run_prior(prior, context)[1]["loss_mask_contrast"]
    assert loss > 0
    with torch.no_grad():
        context.kept.maps.copy_(context.kept.maps.flip(3))
    assert run_prior(prior, context)[1]["loss_mask_contrast"] != loss


@pytest.mark.parametrize("norm", ["BN", "naiveSyncBN_N", ""])
@pytest.mark.parametrize("has_mask", [(), (False,), (False, False), (True,)])
@pytest.mark.parametrize("constant", [False, True])
def test_few_rois_and_constant_maps(norm, has_mask, constant):
    prior, context = make_prior(norm=norm), make_context(has_mask, constant=constant)
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
    assert prior.needs_box_features and prior.uses_rois_without_mask
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
