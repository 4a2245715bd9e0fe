"""Deep-MAC's hourglass mask heads, against counts made from the description of the network."""

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from torch import nn

from teacher_student_mask.modeling.hourglass import Hourglass, HourglassMaskHead

DEPTHS = (20, 52, 100)
NORMS = ("", "BN", "GN")
# Channels and blocks of the levels and of the smallest map, as the authors' code has them.
CHANNELS = {20: [128, 128, 192], 52: [128, 128, 192, 192, 192, 256]}
CHANNELS[100] = CHANNELS[52]
BLOCKS = {20: [1, 2, 2], 52: [2, 2, 2, 2, 2, 4], 100: [4, 4, 4, 4, 4, 8]}


def make_head(depth=20, norm="BN", *, channels=6, num_classes=1, width=4, seed=0):
    # GN has 32 groups.
    width = 32 if norm == "GN" else width
    torch.manual_seed(seed)
    shape = ShapeSpec(channels=channels, height=14, width=14)
    return HourglassMaskHead(
        shape, num_classes=num_classes, depth=depth, conv_norm=norm, width=width
    )


def expected_counts(depth, channels_in, num_classes):
    """(3x3 convolutions, 1x1 shortcuts, parameters with BN or GN), level by level."""
    channels, blocks = CHANNELS[depth], BLOCKS[depth]
    num_3x3 = num_shortcuts = num_parameters = 0

    def conv(before, after, kernel):
        nonlocal num_3x3, num_shortcuts, num_parameters
        num_3x3 += kernel == 3
        num_shortcuts += kernel == 1
        num_parameters += before * after * kernel**2 + 2 * after  # no bias; scale and shift

    def block(before, after, has_stride=False):
        conv(before, after, 3)
        conv(after, after, 3)
        if has_stride or before != after:
            conv(before, after, 1)

    conv(channels_in, 64, 3)
    block(64, 128)
    for outer, inner, n in zip(channels, channels[1:], blocks):
        for _ in range(n):
            block(outer, outer)  # beside the smaller map
        block(outer, inner, has_stride=True)
        for _ in range(n - 1):
            block(inner, inner)
        for _ in range(n - 1):
            block(inner, inner)  # on the way up
        block(inner, outer)
    for _ in range(blocks[-1]):
        block(channels[-1], channels[-1])
    conv(128, 128, 3)
    num_parameters += 128 * 64 * 2 * 2 + 2 * 64  # deconvolution
    num_parameters += 64 * num_classes + num_classes
    return num_3x3, num_shortcuts, num_parameters


@pytest.mark.parametrize(
    "depth, num_levels, num_parameters", [(20, 2, 5.7e6), (52, 5, 23.6e6), (100, 5, 47.4e6)]
)
def test_counts_are_those_of_the_description(depth, num_levels, num_parameters):
    with torch.device("meta"):
        head = make_head(depth, channels=256, num_classes=80, width=64)
    convs = [x for x in head.modules() if isinstance(x, Conv2d) and x is not head.predictor]
    kernels = [x.kernel_size for x in convs]
    counts = (
        kernels.count((3, 3)),
        kernels.count((1, 1)),
        sum(p.numel() for p in head.parameters()),
    )
    assert counts == expected_counts(depth, 256, 80)
    assert counts[2] == pytest.approx(num_parameters, rel=0.01)
    assert sum(isinstance(x, Hourglass) for x in head.modules()) == num_levels


@pytest.mark.parametrize("size", [1, 7, 8])
def test_a_level_puts_each_cell_of_the_small_map_back_where_it_came_from(size):
    level = Hourglass([1, 1], [1, 1], "")
    level.skip = nn.Identity()
    level.inner = level.up = nn.Identity()

    class EveryOther(nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2]

    level.down = EveryOther()
    x = torch.arange(float(size * size)).reshape(1, 1, size, size)
    source = [2 * (i // 2) for i in range(size)]
    torch.testing.assert_close(level(x), x + x[:, :, source][:, :, :, source])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("depth", [20, 52])
def test_without_rois_every_parameter_gets_a_gradient_of_zero(depth, norm):
    head = make_head(depth, norm, num_classes=3)
    before = {name: value.clone() for name, value in head.named_buffers()}
    x = torch.zeros(0, 6, 14, 14, requires_grad=True)
    logits = head.layers(x)
    assert logits.shape == (0, 3, 28, 28)
    (logits.sum() * 0).backward()
    assert x.grad.shape == x.shape
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    for name, value in head.named_buffers():
        # Nothing is learned from nothing.
        if "num_batches_tracked" not in name:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", [*NORMS, "naiveSyncBN", "naiveSyncBN_N"])
def test_one_roi_on_a_map_of_one_cell_can_be_trained(norm):
    # PyTorch's batch normalisation raises there: "Expected more than 1 value per channel".
    head = make_head(52, norm)
    logits = head.layers(torch.randn(1, 6, 14, 14))
    assert logits.shape == (1, 1, 28, 28)
    logits.mean().backward()
    for name, value in [*head.named_buffers(), *((n, p.grad) for n, p in head.named_parameters())]:
        assert value.isfinite().all(), name
