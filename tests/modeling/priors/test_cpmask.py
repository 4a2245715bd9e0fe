"""The reconstruction of CPMask against loops in numpy; which loss trains what; empty batches."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from roi_heads_factory import (
    CHANNELS,
    HALF_EMPTY,
    MIXED,
    NO_OBJECT,
    NONE_SEEN,
    make_context,
    mask_features_of,
)
from torch import nn

from teacher_student_mask.modeling.priors.cpmask import (
    AffinityBlock,
    CommonalityParsingPrior,
    affinity_loss,
)

SIDE = 5


def make_prior(seed=0, **kwargs):
    torch.manual_seed(seed)
    return CommonalityParsingPrior(
        ShapeSpec(channels=CHANNELS, height=SIDE, width=SIDE),
        **{"conv_dim": 7, "affinity_dim": 4, **kwargs},
    )


def has_mask_of(context):
    return torch.cat([x.gt_has_mask for x in context.instances])


def crops_of(context, side):
    """Masks of the ROIs that have one, cropped by Detectron2's own function."""
    crops = []
    for x in context.instances:
        x = x[x.gt_has_mask]
        if len(x):
            crops.append(x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, side).numpy())
    return np.concatenate(crops).astype(float)


def boundary_loss_in_numpy(logits, targets):
    probs = 1 / (1 + np.exp(-logits))
    cross_entropy = -(targets * np.log(probs) + (1 - targets) * np.log(1 - probs)).mean()
    dice = [
        1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        for p, t in zip(probs, targets, strict=True)
    ]
    return cross_entropy + np.mean(dice)


def affinity_loss_in_loops(affinities, masks):
    same, different = [], []
    for a, m in zip(affinities, masks, strict=True):
        for i in range(len(m)):
            for j in range(len(m)):
                prob = 1 / (1 + np.exp(-a[i, j]))
                if m[i] == m[j]:
                    same.append(-np.log(prob))
                else:
                    different.append(-np.log(1 - prob))
    return sum(0.5 * np.mean(x) for x in (same, different) if x)


def laplacian_boundary(mask):
    """Where 8 times a cell minus its eight neighbours, 0 outside, is above 0.1."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    total = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    return (9 * mask - total > 0.1).astype(float)


def test_affinity_loss_by_a_loop_over_pairs():
    affinities = np.random.default_rng(0).normal(size=(3, 6, 6)) * 2
    # The last ROI has no pair of different sides: a mean over ROIs would be another number.
    masks = np.array([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1]], float)
    for rows in (slice(3), slice(2, 3)):
        loss = affinity_loss(torch.tensor(affinities[rows]), torch.tensor(masks[rows]))
        expected = affinity_loss_in_loops(affinities[rows], masks[rows])
        assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_affinity_block_by_a_loop_over_cells():
    torch.manual_seed(0)
    block, x = AffinityBlock(3, 2).double(), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    result, affinities = block(x)

    def linear(conv, vector):
        return conv.weight.detach().numpy()[:, :, 0, 0] @ vector + conv.bias.detach().numpy()

    cells = x.flatten(2).numpy()
    for r in range(2):
        for i in range(6):
            query = linear(block.query, cells[r, :, i])
            keys = [linear(block.key, cells[r, :, j]) for j in range(6)]
            row = np.array([query @ key / np.sqrt(2) for key in keys])
            assert np.allclose(affinities[r, i].detach(), row)
            shares = np.exp(row) / np.exp(row).sum()
            values = [linear(block.value, cells[r, :, j]) for j in range(6)]
            taken = sum(s * v for s, v in zip(shares, values))
            expected = cells[r, :, i] + linear(block.output, taken)
            assert np.allclose(result.flatten(2)[r, :, i].detach(), expected)


def test_losses_of_a_batch_by_numpy():
    prior = make_prior(boundary_weight=0.5, affinity_weight=3.0).train()
    nn.init.normal_(prior.boundary_predictor[-1].weight)
    # The ROIs with a mask stand in the middle.
    context, outputs = make_context(MIXED[::-1]), {}
    prior.affinity.register_forward_hook(lambda m, i, o: outputs.update(affinities=o[1].detach()))
    hook = prior.boundary_features.register_forward_hook
    hook(lambda m, i, o: outputs.update(features=o.detach()))
    _, losses = prior(mask_features_of(context, SIDE), context)
    assert set(losses) == {"loss_boundary", "loss_affinity"}

    has_mask = has_mask_of(context)
    assert has_mask.any() and not has_mask.all()
    with torch.no_grad():
        logits = prior.boundary_predictor(outputs["features"])[has_mask][:, 0].numpy()
    targets = np.stack([laplacian_boundary(x) for x in crops_of(context, 2 * SIDE)])
    expected = 0.5 * boundary_loss_in_numpy(logits, targets)
    assert losses["loss_boundary"].item() == pytest.approx(expected, rel=1e-5)

    masks = crops_of(context, SIDE).reshape(-1, SIDE * SIDE)
    assert 0 < masks.mean() < 1
    expected = 3 * affinity_loss_in_loops(outputs["affinities"][has_mask].numpy(), masks)
    assert losses["loss_affinity"].item() == pytest.approx(expected, rel=1e-5)


def test_which_loss_trains_what():
    affinity = {f"affinity.{x}" for x in ("query", "key", "value", "output")}
    reached = {
        "loss_boundary": {"boundary_features", "boundary_predictor"},
        "loss_affinity": {"boundary_features", "fuse", "affinity.query", "affinity.key"},
        "mask heads": {"boundary_features", "fuse", *affinity},
    }
    for name, parts in reached.items():
        prior, context = make_prior().train(), make_context(MIXED)
        features = mask_features_of(context, SIDE)
        out, losses = prior(features, context)
        (out.square().sum() if name == "mask heads" else losses[name]).backward()
        found = set()
        for parameter_name, x in prior.named_parameters():
            if x.grad is not None and x.grad.any():
                path = parameter_name.split(".")
                found.add(".".join(path[: 2 if path[0] == "affinity" else 1]))
        assert found == parts, name
        # Both losses are those of the ROIs with a mask; the mask heads decide for themselves.
        rows = features.grad.flatten(1).any(dim=1)
        everywhere = torch.ones_like(rows)
        assert torch.equal(rows, everywhere if name == "mask heads" else has_mask_of(context))
        # The features are those pooled by the ROI heads.
        assert context.feature_maps[0].grad is None


@pytest.mark.parametrize("batch", [NONE_SEEN, NO_OBJECT, NO_OBJECT * 2, HALF_EMPTY])
def test_batches_without_masks_or_rois(batch):
    prior, context = make_prior().train(), make_context(batch)
    out, losses = prior(mask_features_of(context, SIDE), context)
    assert losses["loss_boundary"] == 0 and losses["loss_affinity"] == 0
    (out.sum() + sum(losses.values())).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    context.sampled = None
    assert prior(mask_features_of(context, SIDE), context)[1] == {}
    prior.eval()
    assert prior(mask_features_of(context, SIDE), context)[0].shape == out.shape
