"""Deep mask heads: the hourglass networks of Deep-MAC, as a head of Mask R-CNN."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec, get_norm
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, BaseMaskRCNNHead
from detectron2.utils import comm
from torch import nn
from torch.nn import functional as F

__all__ = ["Hourglass", "HourglassMaskHead", "ResidualBlock"]

# {depth: (channels in multiples of the width, residual blocks)}, for each level and, last, for the
# smallest map.
_HOURGLASSES = {
    20: ((2, 2, 3), (1, 2, 2)),
    52: ((2, 2, 3, 3, 3, 4), (2, 2, 2, 2, 2, 4)),
    100: ((2, 2, 3, 3, 3, 4), (4, 4, 4, 4, 4, 8)),
}


@ROI_MASK_HEAD_REGISTRY.register()
class HourglassMaskHead(BaseMaskRCNNHead):
    """
    A mask head with an hourglass network of 20, 52 or 100 convolutions (Deep-MAC, ICCV 2021).

    ROI features (R, D, S, S) -> 3x3 convolution to ``width`` channels and a residual block to twice
    as many -> hourglass -> 3x3 convolution -> 2x2 deconvolution to ``width`` channels -> 1x1
    convolution -> logits (R, K, 2S, 2S). The depth counts the 3x3 convolutions on the longest way
    to the deconvolution. Every level of the hourglass halves the map, rounding up: 2 levels for a
    depth of 20, else 5. The gain over 4 convolutions was reported for training on ground-truth
    boxes (MODEL.ROI_MASK_HEAD.TRAIN_ON_GT_BOXES); with proposals expect less.

    The original normalises with "BN"; "GN" does not depend on how many ROIs a GPU has. Without a
    norm, the default, the residual branches start scaled down; otherwise 49 blocks would multiply
    the features by 10^4.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        depth: int = 52,
        conv_norm: str = "",
        width: int = 64,
        **kwargs,
    ):
        """
        Args:
            input_shape: of the ROI features.
            num_classes: K, the number of foreground classes; 1 = class-agnostic.
            depth: 20, 52 or 100, else ValueError.
            conv_norm: of :func:`detectron2.layers.get_norm`. "GN" needs a width of 32 or 64.
            width: channels of the first convolution, of which the others have multiples.
            **kwargs: of :class:`BaseMaskRCNNHead`.
        """
        if depth not in _HOURGLASSES:
            raise ValueError(f"A mask head's HOURGLASS is {depth!r}; allowed: 20, 52, 100.")
        super().__init__(**kwargs)
        # One process has nothing to synchronise.
        is_naive = conv_norm.startswith("naiveSyncBN") and comm.get_world_size() == 1
        norm = _RoiBatchNorm2d if conv_norm == "BN" or is_naive else conv_norm
        multiples, num_blocks = _HOURGLASSES[depth]
        channels = [width * multiple for multiple in multiples]
        self.stem = nn.Sequential(
            _make_conv(input_shape.channels, width, norm, activation=F.relu),
            ResidualBlock(width, channels[0], norm),
        )
        self.hourglass = Hourglass(channels, num_blocks, norm)
        self.output_conv = _make_conv(channels[0], channels[0], norm, activation=F.relu)
        self.deconv = ConvTranspose2d(
            channels[0], width, kernel_size=2, stride=2, bias=not conv_norm
        )
        self.deconv_norm = get_norm(norm, width) or nn.Identity()
        self.predictor = Conv2d(width, num_classes, kernel_size=1)

        weight_init.c2_msra_fill(self.deconv)
        # As Detectron2's mask heads: every pixel starts near a probability of 0.5.
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)
        if not conv_norm:
            # A branch adds a variance of its input's size: each block would double it. Divided by
            # the number n of blocks on the longest way, all of them make it (1 + 1/n)^n < e times
            # as large. There is one for every two convolutions but the first and last.
            for block in self.modules():
                if isinstance(block, ResidualBlock):
                    block.conv2.weight.data.mul_(((depth - 2) // 2) ** -0.5)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        settings = cfg.MODEL.ROI_MASK_HEAD
        return super().from_config(cfg, input_shape) | {
            "input_shape": input_shape,
            "num_classes": 1 if settings.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "depth": settings.HOURGLASS,
            "conv_norm": settings.NORM,
        }

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (R, K, 2S, 2S), of ROI features, (R, D, S, S); R may be 0."""
        x = self.output_conv(self.hourglass(self.stem(x)))
        return self.predictor(F.relu(self.deconv_norm(self.deconv(x))))


class Hourglass(nn.Module):
    """
    One level, around the next smaller one: skip path + upsampled (down, inner level, up).

    ``channels`` and ``num_blocks`` are of this level, all inner ones and the smallest map.
    """

    def __init__(self, channels: Sequence[int], num_blocks: Sequence[int], norm) -> None:
        super().__init__()
        outer, inner = channels[:2]
        n = num_blocks[0]
        self.skip = _make_blocks(outer, [outer] * n, norm)
        self.down = _make_blocks(outer, [inner] * n, norm, stride=2)
        if len(channels) > 2:
            self.inner = Hourglass(channels[1:], num_blocks[1:], norm)
        else:
            self.inner = _make_blocks(inner, [inner] * num_blocks[1], norm)
        self.up = _make_blocks(inner, [inner] * (n - 1) + [outer], norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of a map (R, c_k, S, S), one of the same shape."""
        skip = self.skip(x)
        up = self.up(self.inner(self.down(x)))
        # Cell i gets cell i // 2, which the stride put on cell 2 (i // 2), for odd sizes, too.
        return skip + F.interpolate(up, size=skip.shape[-2:], mode="nearest")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip path, a 1x1 convolution where shapes change."""

    def __init__(self, in_channels: int, out_channels: int, norm, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _make_conv(in_channels, out_channels, norm, stride, activation=F.relu)
        self.conv2 = _make_conv(out_channels, out_channels, norm)
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = _make_conv(in_channels, out_channels, norm, stride, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: shape (R, in_channels, S, S). Returns (R, out_channels, S', S')."""
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class _RoiBatchNorm2d(nn.BatchNorm2d):
    # One ROI on a map of one cell has no variance, and PyTorch raises: running statistics then.
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def _make_blocks(
    in_channels: int, out_channels: Sequence[int], norm, stride: int = 1
) -> nn.Sequential:
    # The first block has the stride.
    blocks = []
    for channels in out_channels:
        blocks.append(ResidualBlock(in_channels, channels, norm, 1 if blocks else stride))
        in_channels = channels
    return nn.Sequential(*blocks)


def _make_conv(
    in_channels: int, out_channels: int, norm, stride: int = 1, kernel_size: int = 3, **kwargs
) -> Conv2d:
    kwargs.update(padding=kernel_size // 2, bias=not norm, norm=get_norm(norm, out_channels))
    conv = Conv2d(in_channels, out_channels, kernel_size, stride, **kwargs)
    weight_init.c2_msra_fill(conv)
    return conv
