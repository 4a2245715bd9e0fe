"""Mask^X R-CNN's head against numpy loops, and where its box weights are and are not."""

import copy

import numpy as np
import pytest
import roi_heads_factory as factory
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import nn

from teacher_student_mask import PartiallySupervisedROIHeads
from teacher_student_mask.modeling import WeightTransferMaskHead

CLASSES, CHANNELS, BOX_FEATURES = 3, 6, 5


def make_predictor(agnostic=False):
    return FastRCNNOutputLayers(
        ShapeSpec(channels=BOX_FEATURES),
        box2box_transform=Box2BoxTransform((1, 1, 1, 1)),
        num_classes=CLASSES,
        cls_agnostic_bbox_reg=agnostic,
    )


def make_head(**kwargs):
    torch.manual_seed(0)
    shape = ShapeSpec(channels=CHANNELS, height=4, width=4)
    head = WeightTransferMaskHead(shape, num_classes=CLASSES, conv_dims=[8, 8], **kwargs)
    predictor = make_predictor()
    for layer in (predictor.cls_score, predictor.bbox_pred):
        nn.init.normal_(layer.weight)
    head.use_box_predictor(predictor)
    return head, predictor


def trunk(head, x):
    x = head.mask_fcn1(x)
    return head.deconv_relu(head.deconv(x))


@pytest.mark.parametrize("mlp_branch", [False, True])
def test_logits_against_loops(mlp_branch):
    head, predictor = make_head(mlp_branch=mlp_branch)
    nn.init.normal_(head.transfer[0].bias), nn.init.normal_(head.transfer[2].bias)
    x = torch.randn(2, CHANNELS, 4, 4)
    f = trunk(head, x).detach().numpy()
    scores, deltas = predictor.cls_score.weight, predictor.bbox_pred.weight
    a1, b1 = head.transfer[0].weight.detach().numpy(), head.transfer[0].bias.detach().numpy()
    a2, b2 = head.transfer[2].weight.detach().numpy(), head.transfer[2].bias.detach().numpy()
    expected = np.zeros((2, CLASSES, 8, 8))
    for c in range(CLASSES):
        rows = [scores[c]] + [deltas[4 * c + k] for k in range(4)]
        e = np.concatenate([row.detach().numpy() for row in rows])
        hidden = a1 @ e + b1
        hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
        w = a2 @ hidden + b2
        for n in range(2):
            for i in range(8):
                for j in range(8):
                    expected[n, c, i, j] = w @ f[n, :, i, j]
    if mlp_branch:
        nn.init.normal_(head.mlp.weight, std=0.1)
        weight, bias = head.mlp.weight.detach().numpy(), head.mlp.bias.detach().numpy()
        expected += np.stack([(weight @ y.ravel() + bias).reshape(1, 8, 8) for y in f])
    actual = head.layers(x)
    assert actual.shape == (2, CLASSES, 8, 8)
    assert np.allclose(actual.detach().numpy(), expected, atol=1e-4)


def test_the_background_row_and_its_gradient_do_not_count():
    head, predictor = make_head()
    x = torch.randn(1, CHANNELS, 4, 4)
    before = head.layers(x)
    with torch.no_grad():
        predictor.cls_score.weight[-1] += 5
        predictor.cls_score.bias += 5
        predictor.bbox_pred.bias += 5
    assert torch.equal(head.layers(x), before)
    with torch.no_grad():
        predictor.bbox_pred.weight[4 + 2] += 5  # of class 1
    changed = (head.layers(x) - before).abs().amax(dim=(0, 2, 3)) > 0
    assert changed.tolist() == [False, True, False]


def make_heads():
    torch.manual_seed(0)
    shape = ShapeSpec(channels=factory.CHANNELS, height=14, width=14)
    head = WeightTransferMaskHead(shape, num_classes=factory.NUM_CLASSES, conv_dims=[8, 8])
    return factory.make_heads(PartiallySupervisedROIHeads, mask_head=head)


def mask_loss(heads, features, targets):
    return factory.mask_losses(heads, targets, features)[0]["loss_mask"]


@pytest.mark.parametrize("batch", [factory.MIXED, factory.NONE_SEEN, factory.NO_OBJECT])
def test_mask_loss_trains_the_transfer_but_no_box_weight(batch):
    heads, features = make_heads(), factory.make_features(len(batch))
    mask_loss(heads, features, factory.targets_of(batch)).backward()
    for name, parameter in heads.named_parameters():
        if name.startswith("box_"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert bool(parameter.grad.any()) == (batch is factory.MIXED), name
    assert features["p2"].grad is not None


def test_each_box_parameter_is_registered_once():
    heads = make_heads()
    pointers = [x.data_ptr() for x in heads.state_dict().values()]
    assert len(set(pointers)) == len(pointers)


def test_a_copy_uses_the_box_weights_of_the_copy():
    heads = make_heads()
    other = copy.deepcopy(heads)
    x = torch.randn(2, factory.CHANNELS, 14, 14)
    before = heads.mask_head.layers(x)
    assert torch.equal(other.mask_head.layers(x), before)
    with torch.no_grad():
        other.box_predictor.cls_score.weight += 1
    assert not torch.allclose(other.mask_head.layers(x), before)
    assert torch.equal(heads.mask_head.layers(x), before)
    # Weights that are loaded, or moved to another type, are those it uses, too.
    heads.load_state_dict(other.state_dict())
    assert torch.equal(heads.mask_head.layers(x), other.mask_head.layers(x))
    assert heads.double().mask_head.layers(x.double()).dtype == torch.float64


def test_class_agnostic_box_heads_are_refused():
    head, _ = make_head()
    with pytest.raises(ValueError, match="CLS_AGNOSTIC_BBOX_REG to False"):
        head.use_box_predictor(make_predictor(agnostic=True))
