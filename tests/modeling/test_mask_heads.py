"""The mask head with several deconvolutions, and the teacher that is built from the registry."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import build_mask_head
from roi_heads_factory import mask_head
from torch import nn

from teacher_student_mask.modeling import build_teacher_mask_head
from teacher_student_mask.modeling.mask_heads import predict_label_channel, select_label_channel


def test_multi_upsample_head_extends_the_stock_head():
    one, two = mask_head(3), mask_head(3, num_deconv=2)
    assert set(two.state_dict()) - set(one.state_dict()) == {"deconv2.weight", "deconv2.bias"}
    x = torch.randn(2, 6, 14, 14)
    assert one.layers(x).shape == (2, 3, 28, 28)
    assert two.layers(x).shape == (2, 3, 56, 56)
    after_deconv = [layer for layer in two if not hasattr(layer, "weight")]
    assert len(after_deconv) == 2 and all(isinstance(x, nn.ReLU) for x in after_deconv)


@pytest.mark.parametrize("num_conv, num_deconv", [(4, 1), (12, 1), (4, 2)])
def test_teacher_is_class_agnostic_and_follows_its_own_keys(tiny_cfg, num_conv, num_deconv):
    cfg = tiny_cfg(num_classes=3)
    cfg.MODEL.TEACHER_MASK_HEAD.NUM_CONV = num_conv
    cfg.MODEL.TEACHER_MASK_HEAD.NUM_DECONV = num_deconv
    cfg.MODEL.TEACHER_MASK_HEAD.LOSS_WEIGHT = 0.25
    before = cfg.dump()
    shape = ShapeSpec(channels=6, height=14, width=14)
    teacher, student = build_teacher_mask_head(cfg, shape), build_mask_head(cfg, shape)
    x = torch.randn(2, 6, 14, 14)
    side = 28 * num_deconv
    assert teacher.layers(x).shape == (2, 1, side, side)
    assert student.layers(x).shape == (2, 3, 28, 28)
    assert sum(isinstance(layer, nn.Conv2d) for layer in teacher) == num_conv + 1
    assert teacher.loss_weight == 0.25
    assert cfg.dump() == before


def test_label_channel_is_selected_and_only_it_gets_gradient():
    logits = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 2, 2).requires_grad_()
    selected = select_label_channel(logits, torch.tensor([2, 0]))
    assert selected.tolist() == [[[8, 9], [10, 11]], [[12, 13], [14, 15]]]
    selected.sum().backward()
    expected = torch.zeros(2, 3, 2, 2)
    expected[0, 2] = expected[1, 0] = 1
    assert torch.equal(logits.grad, expected)
    # Class-agnostic logits have one channel for all labels.
    assert torch.equal(select_label_channel(logits[:, :1], torch.tensor([7, 3])), logits[:, 0])


@pytest.mark.parametrize("num_rois", [0, 5])
def test_one_channel_alone_is_that_of_all_channels_and_so_are_its_gradients(num_rois):
    head = mask_head(3, num_deconv=2)
    labels = torch.randint(0, 3, (num_rois,))
    results = []
    for predict in (
        predict_label_channel,
        lambda *x: select_label_channel(x[0].layers(x[1]), x[2]),
    ):
        features = torch.randn(num_rois, 6, 14, 14, generator=torch.Generator().manual_seed(0))
        features.requires_grad_()
        head.zero_grad()
        logits = predict(head, features, labels)
        logits.square().sum().backward()
        results.append([logits, features.grad, *(x.grad for x in head.parameters())])
    assert results[0][0].shape == (num_rois, 56, 56)
    for alone, of_all in zip(*results):
        torch.testing.assert_close(alone, of_all)
