"""ContrastMask's loss against numpy loops, and its edge cases."""

import math

import numpy as np
import pytest
import torch
from contrast_reference import cosine, loss_by_hand, nce_by_hand

from teacher_student_mask.modeling.priors import contrastive_loss as loss_module
from teacher_student_mask.modeling.priors.contrast_sets import (
    PixelSets,
    sets_of_cams,
    sets_of_masks,
)
from teacher_student_mask.modeling.priors.contrastive_loss import (
    contrastive_loss,
    nce,
    similarity,
)

FINE = 12


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


@pytest.mark.parametrize("which", range(4))
def test_four_pixels_in_a_set_are_too_few_and_five_enough(which):
    """In any of the four sets of keys; ContrastMask's limit."""
    for num_pixels in (4, 5):
        cells = torch.arange(36).view(1, 6, 6) // 9
        keys = [cells == k for k in range(4)]
        keys[which] = keys[which] & (keys[which].flatten().cumsum(0).view(1, 6, 6) <= num_pixels)
        assert [int(x.sum()) for x in keys].count(9) == 3 and keys[which].sum() == num_pixels
        sets = PixelSets(*keys, keys[0] | keys[1], keys[2] | keys[3])
        projections = torch.randn(1, 3, 6, 6, requires_grad=True)
        loss = contrastive_loss(projections, sets, 1.0)
        loss.backward()
        assert (loss.item() != 0) == bool(projections.grad.any()) == (num_pixels == 5)


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
