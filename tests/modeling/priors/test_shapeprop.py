"""ShapeProp's prior against loops in numpy; which loss trains what; batches without anything."""

import dataclasses

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from roi_heads_factory import (
    CHANNELS,
    HALF_EMPTY,
    MIXED,
    NO_OBJECT,
    NONE_SEEN,
    NUM_CLASSES,
    STRIDE,
    make_context,
    mask_features_of,
)
from torch import nn

from teacher_student_mask.modeling.priors.shapeprop import (
    ShapePropagationPrior,
    pass_messages,
    relative_activation,
)

SIDE = 6
# Modules that a loss can reach, by the names of their parameters.
PARTS = {"activation", "classifier", "propagation", "message_weights", "encoder", "decoder"}
PARTS |= {"shape_encoder"}


def make_prior(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ShapePropagationPrior(
        ShapeSpec(channels=CHANNELS, height=SIDE, width=SIDE),
        pooler=ROIPooler(SIDE, (1 / STRIDE,), 2, "ROIAlignV2"),
        feature_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        **{"conv_dim": 5, "num_channels": 3, **kwargs},
    )


def parts_with_gradient(prior):
    return {
        name.split(".")[0]
        for name, x in prior.named_parameters()
        if x.grad is not None and x.grad.any()
    }


def one_step_in_a_loop(states, weights):
    result = np.zeros_like(states)
    num_rois, num_channels, height, width = states.shape
    for r, c, y, x in np.ndindex(num_rois, num_channels, height, width):
        total, norm = 0.0, 1e-5
        for k, (dy, dx) in enumerate((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
            weight = weights[r, c, k, y, x]
            norm += weight
            if 0 <= y + dy < height and 0 <= x + dx < width:
                total += weight * states[r, c, y + dy, x + dx]
        result[r, c, y, x] = total / norm
    return result


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_message_passing_is_that_of_a_loop_over_cells(num_steps):
    rng = np.random.default_rng(0)
    states, weights = rng.normal(size=(2, 3, 4, 5)), rng.random((2, 3, 9, 4, 5))
    result = pass_messages(torch.tensor(states), torch.tensor(weights), num_steps)
    for _ in range(num_steps):
        states = one_step_in_a_loop(states, weights)
    assert np.allclose(result, states, rtol=1e-12)


def test_relative_activation_by_hand():
    logits = torch.tensor([[[[-1.0, 2], [4, 0]]], [[[-3, -1], [-2, -9]]]], requires_grad=True)
    result = relative_activation(logits)
    expected = torch.tensor([[[[0, 0.5], [1, 0]]], [[[0.0, 0], [0, 0]]]])
    assert torch.allclose(result, expected, atol=1e-5) and result.max() < 1
    result.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits[0, 0, 0, 0] == -1  # not changed in place


def test_losses_of_a_batch_by_numpy():
    prior, context = make_prior(activation_weight=0.5, shape_weight=3.0).train(), make_context(
        MIXED
    )
    outputs = {}
    prior.decoder.register_forward_hook(lambda m, i, o: outputs.update(logits=o.detach()))
    _, losses = prior(mask_features_of(context, SIDE), context)
    assert set(losses) == {"loss_shape_activation", "loss_shape"}

    logits, expected = outputs["logits"][:, 0].numpy(), []
    rois = [x[i : i + 1] for x in context.instances for i in range(len(x))]
    for roi, z in zip(rois, logits, strict=True):
        if roi.gt_has_mask.item():
            mask = roi.gt_masks.crop_and_resize(roi.proposal_boxes.tensor, SIDE).numpy()[0]
            assert 0 < mask.mean() < 1
            expected.append(np.log1p(np.exp(-np.where(mask, z, -z))).mean())
    assert 0 < len(expected) < len(rois)
    assert losses["loss_shape"].item() == pytest.approx(3 * np.mean(expected), rel=1e-5)

    boxes = [x.proposal_boxes for x in context.sampled]
    features = prior.activation(prior.pooler(context.feature_maps, boxes))
    labels = torch.cat([x.gt_classes for x in context.sampled])
    assert (labels == NUM_CLASSES).sum() == 2
    scores = prior.classifier(features.permute(0, 2, 3, 1)).mean(dim=(1, 2)).log_softmax(1)
    expected = -scores[range(len(labels)), labels].mean()
    assert losses["loss_shape_activation"].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("is_training", [True, False])
def test_saliency_is_the_raw_map_of_the_class_with_its_bias(is_training):
    """The output of the 1x1 convolution as it is: neither normalised nor without the bias."""
    prior, context = make_prior().train(is_training), make_context(MIXED)
    nn.init.normal_(prior.classifier.bias, std=3)
    seen = {}
    prior.encoder.register_forward_hook(lambda m, i, o: seen.update(saliency=i[0].detach()))
    prior(mask_features_of(context, SIDE), context)
    boxes = [x.proposal_boxes for x in context.instances]
    features = prior.activation(prior.pooler(context.feature_maps, boxes)).detach().numpy()
    labels = torch.cat([x.gt_classes for x in context.instances]).numpy()
    assert len(set(labels)) == NUM_CLASSES
    weight, bias = (x.detach().numpy() for x in (prior.classifier.weight, prior.classifier.bias))
    expected = np.einsum("rdhw,rd->rhw", features, weight[labels]) + bias[labels][:, None, None]
    assert seen["saliency"].shape == (len(labels), 1, SIDE, SIDE)
    assert np.allclose(seen["saliency"][:, 0].numpy(), expected, atol=1e-4)


def test_which_loss_trains_what():
    reached = {
        "loss_shape_activation": {"activation", "classifier"},
        "loss_shape": PARTS - {"shape_encoder"},
        "mask heads": PARTS,
    }
    for name, parts in reached.items():
        prior, context = make_prior().train(), make_context(MIXED)
        features = mask_features_of(context, SIDE)
        out, losses = prior(features, context)
        (out.square().sum() if name == "mask heads" else losses[name]).backward()
        assert parts_with_gradient(prior) == parts, name
        # Nothing is detached from the backbone, and the pooled mask features pass by.
        assert context.feature_maps[0].grad.any(), name
        assert (features.grad is not None) == (name == "mask heads")
        rows = prior.classifier.weight.grad.any(dim=1).tolist()
        # Of the objects, 0 has a mask; 1 and 2 have none.
        assert rows == {"loss_shape": [True, False, False, False]}.get(
            name, [True, True, True, name == "loss_shape_activation"]
        )


def test_training_and_inference_give_the_same_features():
    context = make_context(MIXED)
    features = mask_features_of(context, SIDE)
    expected, losses = make_prior().eval()(features, context)
    assert losses == {}
    assert expected.shape == (len(features), CHANNELS + 5, SIDE, SIDE)
    assert torch.equal(expected[:, :CHANNELS], features)
    # By the rows of the sampled ROIs.
    out, _ = make_prior().train()(features, context)
    assert torch.allclose(out, expected, atol=1e-6)
    # By themselves, where not all of them were sampled, as with TRAIN_ON_GT_BOXES.
    fewer = dataclasses.replace(context, sampled=[x[:2] for x in context.sampled])
    out, _ = make_prior().train()(features, fewer)
    assert torch.allclose(out, expected, atol=1e-6)
    # Without losses, as for box supervision.
    out, losses = make_prior().train()(features, dataclasses.replace(context, sampled=None))
    assert losses == {} and torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("batch", [NONE_SEEN, NO_OBJECT, NO_OBJECT * 2, HALF_EMPTY])
@pytest.mark.parametrize("num_background", [0, 2])
def test_batches_without_masks_rois_or_anything_sampled(batch, num_background):
    prior, context = make_prior().train(), make_context(batch, num_background)
    out, losses = prior(mask_features_of(context, SIDE), context)
    assert losses["loss_shape"] == 0
    assert (losses["loss_shape_activation"] > 0) == any(len(x) for x in context.sampled)
    (out.sum() + sum(losses.values())).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    prior.eval()
    assert prior(mask_features_of(context, SIDE), context)[0].shape == out.shape
