"""The mask head with several deconvolutions, and the channel of each label."""

import pytest
import torch
from detectron2.modeling import build_model
from roi_heads_factory import mask_head
from torch import nn

from teacher_student_mask.modeling.mask_heads import predict_label_channel, select_label_channel


def test_multi_upsample_head_extends_the_stock_head():
    one, two = mask_head(3), mask_head(3, num_deconv=2)
    assert set(two.state_dict()) - set(one.state_dict()) == {"deconv2.weight", "deconv2.bias"}
    x = torch.randn(2, 6, 14, 14)
    assert one.layers(x).shape == (2, 3, 28, 28)
    assert two.layers(x).shape == (2, 3, 56, 56)
    after_deconv = [layer for layer in two if not hasattr(layer, "weight")]
    assert len(after_deconv) == 2 and all(isinstance(x, nn.ReLU) for x in after_deconv)


def test_the_predictor_of_all_heads_starts_as_the_config_says(tiny_cfg):
    opts = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads", "MODEL.ROI_MASK_HEAD.CONV_DIM", 512]
    opts += ["MODEL.TEACHER_MASK_HEAD.CONV_DIM", 512, "MODEL.ROI_MASK_HEAD.PREDICTOR_INIT"]
    torch.manual_seed(0)
    for method, deviations in ("d2", (0.001, 0.001)), ("kaiming", ((2 / 3) ** 0.5, 2**0.5)):
        heads = build_model(tiny_cfg(opts=[*opts, method])).roi_heads
        for head, expected in zip((heads.mask_head, heads.teacher_mask_head), deviations):
            assert head.predictor.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not head.predictor.bias.any()


def test_a_head_without_a_predictor_starts_as_it_is(tiny_cfg):
    """Bug: "kaiming" raised AttributeError with Mask^X R-CNN's head."""
    opts, states = ["MODEL.ROI_MASK_HEAD.NAME", "WeightTransferMaskHead"], []
    for method in ("d2", "kaiming"):
        torch.manual_seed(0)
        cfg = tiny_cfg(opts=[*opts, "MODEL.ROI_MASK_HEAD.PREDICTOR_INIT", method])
        states.append(build_model(cfg).roi_heads.mask_head.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(*(x.values() for x in states)))


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
