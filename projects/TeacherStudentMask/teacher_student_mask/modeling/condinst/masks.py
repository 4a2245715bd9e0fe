"""CondInst's mask branch and its mask heads, whose weights a controller makes for each object."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import nn
from torch.nn import functional as F

from .targets import Grid

__all__ = ["Controller", "MaskBranch", "aligned_bilinear", "features_at", "predict_planes"]

# Channels of the mask branch, and of the mask heads' hidden layers.
_NUM_CHANNELS, _WIDTH = 16, 8
# (inputs, outputs) of a mask head's layers; the first has the relative coordinates, too.
_LAYERS = ((_NUM_CHANNELS + 2, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, 1))
_NUM_PARAMETERS = [(i + 1) * o for i, o in _LAYERS]  # 152, 72, 9


def aligned_bilinear(planes: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Enlarge planes (N, K, h, w) bilinearly: cell k of the result lies at (k - factor // 2) / factor
    of the old cells, nothing changes beyond the outermost of these.
    """
    if factor == 1:
        return planes
    height, width = planes.shape[-2:]
    size = (factor * height + 1, factor * width + 1)
    repeated = F.pad(planes, [0, 1, 0, 1], mode="replicate")
    enlarged = F.interpolate(repeated, size=size, mode="bilinear", align_corners=True)
    shift = factor // 2
    enlarged = F.pad(enlarged, [shift, 0, shift, 0], mode="replicate")
    return enlarged[..., : factor * height, : factor * width]


class MaskBranch(nn.Module):
    """
    Features of all objects, at the stride of the finest level: 16 channels from three levels, each
    brought to one width and one size and added, then four convolutions.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        in_features: Sequence[str],
        strides: Sequence[int],
        width: int = 128,
        norm: str = "BN",
    ):
        """
        Args:
            in_channels: of all levels.
            in_features, strides: names of the levels, fine to coarse, and their strides in pixels.
            width: channels of the convolutions.
            norm: see :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self.in_features, self.strides = tuple(in_features), tuple(strides)

        def conv(num_inputs: int) -> Conv2d:
            own = get_norm(norm, width)
            layer = Conv2d(
                num_inputs, width, 3, padding=1, bias=not norm, norm=own, activation=F.relu
            )
            nn.init.kaiming_uniform_(layer.weight, a=1)
            return layer

        self.refine = nn.ModuleList([conv(in_channels) for _ in in_features])
        layers = [conv(width) for _ in range(4)]
        self.tower = nn.Sequential(*layers, nn.Conv2d(width, _NUM_CHANNELS, 1))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        names = cfg.MODEL.CONDINST.IN_FEATURES
        return {
            "in_channels": input_shape[names[0]].channels,
            "in_features": names,
            "strides": [input_shape[name].stride for name in names],
            "width": cfg.MODEL.CONDINST.CONV_DIM,
            "norm": cfg.MODEL.CONDINST.NORM,
        }

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Maps of ``in_features``, (N, D, H, W) each -> (N, 16, h, w) of the finest."""
        total = 0
        for name, stride, layer in zip(self.in_features, self.strides, self.refine):
            total = total + aligned_bilinear(layer(features[name]), stride // self.strides[0])
        return self.tower(total)


def features_at(
    towers: Sequence[torch.Tensor], grid: Grid, images: torch.Tensor, locations: torch.Tensor
) -> torch.Tensor:
    """
    What a 3x3 convolution sees at R locations, zeros around the maps.

    Args:
        towers: of each level of ``grid``, shape (N, D, H, W).
        images, locations: int64, shape (R,): positions in the batch and in the grid.

    Returns:
        shape (R, D * 9), in the order of a convolution's weights.
    """
    steps, levels = torch.arange(3, device=images.device), grid.levels[locations]
    parts, rows = [], []
    for level, tower in enumerate(towers):
        of_level = (levels == level).nonzero()[:, 0]
        cells = locations[of_level] - grid.starts[level]
        width = grid.shapes[level][1]
        y = (torch.div(cells, width, rounding_mode="floor")[:, None] + steps)[:, :, None]
        x = (cells % width)[:, None, None] + steps[:, None].T[None]
        padded = F.pad(tower, [1, 1, 1, 1]).permute(0, 2, 3, 1)
        patches = padded[images[of_level][:, None, None], y, x]
        parts.append(patches.permute(0, 3, 1, 2).flatten(1))
        rows.append(of_level)
    return torch.cat(parts)[torch.cat(rows).argsort()]


class Controller(nn.Module):
    """
    A 3x3 convolution, computed where it is needed, that makes the weights of a mask head.

    Without classes all come from weights that objects of any class share, as CondInst has it. With
    classes the last layer, or all layers, come from weights of the object's class.
    """

    def __init__(self, in_channels: int, num_classes: int = 0, all_layers: bool = False):
        """
        Args:
            in_channels: D, of the features.
            num_classes: C; 0 = class-agnostic.
            all_layers: whether the classes have their own weights for all layers.
        """
        super().__init__()
        num_of_class = 0
        if num_classes > 0:
            num_of_class = sum(_NUM_PARAMETERS) if all_layers else _NUM_PARAMETERS[-1]
        num_shared = sum(_NUM_PARAMETERS) - num_of_class
        self.shared = nn.Linear(9 * in_channels, num_shared) if num_shared else None
        self.by_class = None
        if num_of_class:
            weights = torch.empty(num_classes, num_of_class, 9 * in_channels)
            self.by_class = nn.Parameter(nn.init.normal_(weights, std=0.01))
            self.bias_by_class = nn.Parameter(torch.zeros(num_classes, num_of_class))
        if self.shared is not None:
            nn.init.normal_(self.shared.weight, std=0.01)
            nn.init.zeros_(self.shared.bias)

    def forward(self, features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: shape (R, D * 9), of :func:`features_at`.
            classes: int64, shape (R,); what a class-agnostic controller does not look at.

        Returns:
            shape (R, 233), layer after layer, each its weights, then its biases.
        """
        parts = [] if self.shared is None else [self.shared(features)]
        if self.by_class is not None:
            own = torch.bmm(self.by_class[classes], features[:, :, None])[:, :, 0]
            parts.append(own + self.bias_by_class[classes])
        return torch.cat(parts, dim=1)


def predict_planes(
    parameters: torch.Tensor,
    features: torch.Tensor,
    images: torch.Tensor,
    points: torch.Tensor,
    scales: torch.Tensor,
    stride: int,
    factor: int,
) -> torch.Tensor:
    """
    Run each object's own mask head on the features of its image.

    Args:
        parameters: shape (R, 233), of :class:`Controller`.
        features: shape (N, 16, h, w), of :class:`MaskBranch`.
        images: int64, shape (R,): positions in the batch.
        points: shape (R, 2), the locations in pixels, from which coordinates are measured.
        scales: shape (R,), pixels that are 1 in these coordinates.
        stride: of ``features`` in pixels.
        factor: by which the result is finer.

    Returns:
        Logits, shape (R, h * factor, w * factor), over the whole padded image.
    """
    height, width = features.shape[-2:]
    grid = Grid.of([(height, width)], [stride], features.device).points
    # Shape (R, 2, h * w).
    relative = ((points[:, None] - grid) / scales[:, None, None]).transpose(1, 2)
    x = torch.cat([relative.to(features.dtype), features.flatten(2)[images]], dim=1)
    for i, (own, (inputs, outputs)) in enumerate(
        zip(parameters.split(_NUM_PARAMETERS, dim=1), _LAYERS)
    ):
        weights = own[:, : inputs * outputs].unflatten(1, (outputs, inputs))
        x = torch.baddbmm(own[:, inputs * outputs :, None], weights, x)
        if i < len(_LAYERS) - 1:
            x = x.relu()
    # Not unflatten(), which a graph for ONNX would keep the sizes of.
    return aligned_bilinear(x.reshape(-1, 1, height, width), factor)[:, 0]
