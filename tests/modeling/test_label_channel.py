"""One class's channel per ROI: the values and gradients of the whole prediction, without it."""

import pytest
import torch
from benchmark_parts import load_benchmark_part
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from roi_heads_factory import CHANNELS, NUM_CLASSES, mask_head
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from teacher_student_mask.modeling import HourglassMaskHead
from teacher_student_mask.modeling.label_channel import predict_label_channel

peak_memory = load_benchmark_part("memory").peak_memory

SHAPE = ShapeSpec(channels=CHANNELS, height=14, width=14)


def stock_head(num_classes=NUM_CLASSES, **kwargs):
    return MaskRCNNConvUpsampleHead(SHAPE, num_classes=num_classes, conv_dims=[8, 8], **kwargs)


def head_without_bias():
    head = stock_head()
    head.predictor.bias = None
    return head


def narrow_hourglass():
    return HourglassMaskHead(SHAPE, num_classes=NUM_CLASSES, depth=20, width=4)


class OwnLayers(MaskRCNNConvUpsampleHead):
    """A head whose layers do more than its modules."""

    def layers(self, x):
        return 2 * super().layers(x)


class OwnHead(BaseMaskRCNNHead):
    """A head that is not a sequence at all."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Conv2d(CHANNELS, NUM_CLASSES, 1)

    def layers(self, x):
        return self.predictor(x).relu()


class DoubledConv(nn.Conv2d):
    """A convolution of another class."""

    def forward(self, x):
        return 2 * super().forward(x)


def own_layers():
    return OwnLayers(SHAPE, num_classes=NUM_CLASSES, conv_dims=[8, 8])


def layers_of_the_instance():
    head = stock_head()
    stock_layers = head.layers
    head.layers = lambda x: 2 * stock_layers(x)
    return head


def another_last_layer():
    head = stock_head()
    head.add_module("last", nn.Tanh())
    return head


def another_predictor(make_predictor):
    head = stock_head()
    head.predictor = make_predictor(head.predictor)
    return head


def hooked(register):
    head = stock_head()
    register(head.predictor)
    return head


def double_forward(predictor):
    stock_forward = predictor.forward
    predictor.forward = lambda x: 2 * stock_forward(x)
    return predictor


def with_activation(predictor):
    predictor.activation = nn.Tanh()
    return predictor


def with_norm(predictor):
    predictor.norm = nn.BatchNorm2d(NUM_CLASSES).eval()
    nn.init.constant_(predictor.norm.weight, 3)
    return predictor


SEPARABLE = {
    "stock": stock_head,
    "normalised": lambda: stock_head(conv_norm="BN"),
    "one deconvolution": lambda: mask_head(NUM_CLASSES),
    "two deconvolutions": lambda: mask_head(NUM_CLASSES, num_deconv=2),
    "no bias": head_without_bias,
    "plain convolution": lambda: another_predictor(lambda _: nn.Conv2d(8, NUM_CLASSES, 1)),
}
WHOLE = {
    "class-agnostic": lambda: stock_head(1),
    "own layers": own_layers,
    "layers of the instance": layers_of_the_instance,
    "not a sequence": OwnHead,
    "hourglass": narrow_hourglass,
    "another last layer": another_last_layer,
    "3x3": lambda: another_predictor(lambda _: nn.Conv2d(8, NUM_CLASSES, 3, padding=1)),
    "padded": lambda: another_predictor(lambda _: nn.Conv2d(8, NUM_CLASSES, 1, padding=1)),
    "strided": lambda: another_predictor(lambda _: nn.Conv2d(8, NUM_CLASSES, 1, stride=2)),
    "grouped": lambda: another_predictor(lambda _: nn.Conv2d(8, 4, 1, groups=2)),
    "subclass": lambda: another_predictor(lambda _: DoubledConv(8, NUM_CLASSES, 1)),
    "wrapped": lambda: another_predictor(lambda p: nn.Sequential(p, nn.Tanh())),
    "parametrised": lambda: another_predictor(parametrizations.weight_norm),
    "own forward": lambda: another_predictor(double_forward),
    "activation": lambda: another_predictor(with_activation),
    "norm": lambda: another_predictor(with_norm),
    "hook after": lambda: hooked(lambda p: p.register_forward_hook(lambda m, x, y: 2 * y)),
    "hook before": lambda: hooked(lambda p: p.register_forward_pre_hook(lambda m, x: 2 * x[0])),
    "gradient hook": lambda: hooked(
        lambda p: p.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],))
    ),
    "early gradient hook": lambda: hooked(
        lambda p: p.register_full_backward_pre_hook(lambda m, dy: (2 * dy[0],))
    ),
}


def prepare(make_head):
    """The head with opinions (its predictor starts at almost 0), ROI features and labels."""
    torch.manual_seed(0)
    head = make_head()
    for name, parameter in head.named_parameters():
        if name.startswith("predictor"):
            nn.init.normal_(parameter)
    # A class twice, one not at all, and not in order.
    return head, torch.randn(4, CHANNELS, 14, 14), torch.tensor([2, 0, 2, 0])


def whole_prediction(head, features, labels):
    logits = head.layers(features)
    channels = labels if logits.shape[1] > 1 else torch.zeros_like(labels)
    return torch.stack([x[c] for x, c in zip(logits, channels)])


def values_and_gradients(function, head, features, labels):
    features = features.clone().requires_grad_()
    logits = function(head, features, labels)
    weight = torch.linspace(-1, 2, logits.numel()).reshape(logits.shape)
    inputs = {"features": features, **dict(head.named_parameters())}
    gradients = torch.autograd.grad((logits * weight).sum() / 1000, list(inputs.values()))
    return {"logits": logits, **dict(zip(inputs, gradients))}


@pytest.mark.parametrize("make_head", {**SEPARABLE, **WHOLE}.values(), ids=[*SEPARABLE, *WHOLE])
def test_values_and_gradients_are_those_of_the_whole_prediction(make_head):
    head, features, labels = prepare(make_head)
    names, before = list(head.state_dict()), [x.clone() for x in head.parameters()]
    expected = values_and_gradients(whole_prediction, head, features, labels)
    got = values_and_gradients(predict_label_channel, head, features, labels)
    for name, value in expected.items():
        assert got[name].shape == value.shape and value.any(), name
        scale = value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6 * max(scale, 1), msg=name)
    assert list(head.state_dict()) == names
    assert all(torch.equal(x, y) for x, y in zip(head.parameters(), before))


def predictor_runs(head, features, labels):
    """How often the whole last convolution ran; what counts it is no hook."""
    calls = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution" in str(function) and args[1].shape[0] == NUM_CLASSES:
                calls.append(args[1].shape)
            return function(*args, **(kwargs or {}))

    with Counting():
        predict_label_channel(head, features, labels)
    return len(calls)


@pytest.mark.parametrize("name", [*SEPARABLE, "own layers", "hook after", "wrapped"])
def test_the_other_channels_are_computed_only_where_they_must_be(name):
    runs = predictor_runs(*prepare({**SEPARABLE, **WHOLE}[name]))
    assert runs == (0 if name in SEPARABLE else 1)


def test_a_removed_hook_is_forgotten():
    head, features, labels = prepare(stock_head)
    handle = head.predictor.register_forward_hook(lambda m, x, y: 2 * y)
    assert predictor_runs(head, features, labels) == 1
    handle.remove()
    assert predictor_runs(head, features, labels) == 0


@pytest.mark.parametrize("layer", ["deconv", "deconv_relu"])
def test_hooks_of_the_other_layers_run(layer):
    head, features, labels = prepare(stock_head)
    shapes = []
    getattr(head, layer).register_forward_hook(lambda m, x, y: shapes.append(y.shape))
    predict_label_channel(head, features, labels)
    assert shapes == [(4, 8, 28, 28)]


def test_the_gradient_of_the_largest_map_is_held_once():
    head = MaskRCNNConvUpsampleHead(SHAPE, num_classes=NUM_CLASSES, conv_dims=[64, 64])
    features, labels = torch.randn(32, CHANNELS, 14, 14), torch.arange(32) % NUM_CLASSES

    def program(function):
        return lambda: function(head, features, labels).sum().backward()

    whole, one = (peak_memory(program(x), "cpu") for x in (whole_prediction, predict_label_channel))
    # Where the ReLU was cut is remembered instead: one byte for each number of four.
    assert whole - one > 0.7 * (32 * 64 * 28 * 28 * 4)


@pytest.mark.parametrize("make_head", [stock_head, WHOLE["class-agnostic"], narrow_hourglass])
def test_without_rois_every_parameter_gets_a_gradient_of_zero(make_head):
    head, features, labels = prepare(make_head)
    features = features[:0].requires_grad_()
    logits = predict_label_channel(head, features, labels[:0])
    assert logits.shape == (0, 28, 28)
    (logits.sum() * 0).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_classes_without_a_roi_get_a_gradient_of_zero():
    head, features, labels = prepare(stock_head)
    predict_label_channel(head, features, labels).sum().backward()
    assert head.predictor.weight.grad[[0, 2]].any() and head.predictor.bias.grad[[0, 2]].all()
    assert not head.predictor.weight.grad[1].any() and head.predictor.bias.grad[1] == 0


@pytest.mark.parametrize("make_head", [stock_head, head_without_bias], ids=["bias", "no bias"])
def test_autocast_gives_the_type_and_the_accuracy_of_the_convolution(make_head):
    head, features, labels = prepare(make_head)
    exact = whole_prediction(head, features, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole_prediction(head, features, labels)
        logits = predict_label_channel(head, features, labels)
    assert expected.dtype == logits.dtype == torch.bfloat16
    # Two roundings to 8 bits of numbers of this size.
    assert (logits - expected).abs().max() <= 2**-7 * exact.abs().max()
    logits.float().sum().backward()
    assert head.predictor.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_layouts_and_types(memory_format):
    head, features, labels = prepare(stock_head)
    head, features = head.double(), features.double()
    expected = whole_prediction(head, features, labels)
    head = head.to(memory_format=memory_format)
    logits = predict_label_channel(head, features.to(memory_format=memory_format), labels)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("label", [NUM_CLASSES, -NUM_CLASSES - 1])
@pytest.mark.parametrize("make_head", [stock_head, own_layers])
def test_labels_out_of_range_are_refused_as_by_indexing(make_head, label):
    head, features, labels = prepare(make_head)
    labels[1] = label
    with pytest.raises(IndexError, match="out of (bounds|range)"):
        predict_label_channel(head, features, labels)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # as of Detectron2's own code
@pytest.mark.parametrize("make_head", [stock_head, own_layers, WHOLE["class-agnostic"]])
def test_a_trace_has_the_whole_convolution_and_takes_other_numbers_of_rois(make_head):
    head, features, labels = prepare(make_head)
    for parameter in head.parameters():
        parameter.requires_grad_(False)
    traced = torch.jit.trace(lambda x, y: predict_label_channel(head, x, y), (features, labels))
    graph = str(traced.inlined_graph)
    assert graph.count("aten::_convolution") == 3 and "bmm" not in graph
    more, other_labels = torch.randn(7, CHANNELS, 14, 14), torch.tensor([1, 0, 2, 2, 1, 0, 1])
    for n in (7, 0):
        torch.testing.assert_close(
            traced(more[:n], other_labels[:n]),
            predict_label_channel(head, more[:n], other_labels[:n]),
        )


def test_an_exported_program_has_the_whole_convolution():
    class Module(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head = head

        def forward(self, features, labels):
            return predict_label_channel(self.head, features, labels)

    head, features, labels = prepare(stock_head)
    program = torch.export.export(Module(head).eval(), (features, labels))
    graph = str(program.graph)
    assert graph.count("conv2d") >= 2 and "bmm" not in graph
    torch.testing.assert_close(
        program.module()(features, labels), predict_label_channel(head, features, labels)
    )
