"""
A reconstruction of CPMask's prior from the abstract of its publication; no code was released.

It builds the parts that the abstract names: supervised instance boundaries (commonality of shape)
and pairwise affinities of pixels (commonality of appearance). Widths, losses and weights are ours;
results of it are not results of CPMask.
"""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ConvTranspose2d, ShapeSpec
from torch import nn
from torch.nn import functional as F

from ..mask_targets import at_least_float32, crop_gt_masks, has_mask_of, select_rois
from . import ROI_MASK_PRIOR_REGISTRY, ROIContext, arguments_of, conv1x1, conv_stack

__all__ = [
    "AffinityBlock",
    "CommonalityParsingPrior",
    "affinity_loss",
    "boundary_loss",
    "boundary_of",
]


def boundary_of(masks: torch.Tensor) -> torch.Tensor:
    """
    The cells of masks (R, M, M), in {0, 1}, with a cell outside among their eight neighbours.

    These are the cells where a 3x3 Laplacian of the mask is positive, the boundary that BMask R-CNN
    is trained on. Outside the map there is no mask: it ends at the side of its box.
    """
    outside = F.pad(1 - masks, (1, 1, 1, 1), value=1.0)
    return masks * F.max_pool2d(outside[:, None], kernel_size=3, stride=1)[:, 0]


def boundary_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Mean binary cross entropy plus the mean over the ROIs of the Dice loss, smoothed by 1.

    Of logits and of targets in {0, 1}, both of shape (R, M, M). Without a ROI 0, but attached.
    """
    logits = at_least_float32(logits)
    if len(logits) == 0:
        return logits.sum() * 0
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets)
    probs, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = 2 * (probs * targets).sum(dim=1) + 1
    dice = 1 - overlap / (probs.sum(dim=1) + targets.sum(dim=1) + 1)
    return cross_entropy + dice.mean()


def affinity_loss(affinities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    Pairs of cells on one side of the mask should have a high affinity, other pairs a low one.

    Half the mean of -log sigmoid(a) over the pairs on one side plus half the mean of
    -log(1 - sigmoid(a)) over the others, of all ROIs together; a mean over nothing is 0.

    Args:
        affinities: shape (R, P, P), logits of the ordered pairs of P cells, a cell with itself too.
        masks: shape (R, P), in {0, 1}.
    """
    affinities = at_least_float32(affinities)
    same = (masks[:, :, None] == masks[:, None]).to(affinities.dtype)
    losses = F.binary_cross_entropy_with_logits(affinities, same, reduction="none")
    means = [(losses * x).sum() / x.sum().clamp(min=1) for x in (same, 1 - same)]
    return (means[0] + means[1]) / 2


class AffinityBlock(nn.Module):
    """Each cell of a ROI takes from the others by their affinity, a non-local block."""

    def __init__(self, channels: int, affinity_dim: int):
        super().__init__()
        self.query = conv1x1(channels, affinity_dim)
        self.key = conv1x1(channels, affinity_dim)
        self.value = conv1x1(channels, affinity_dim)
        self.output = conv1x1(affinity_dim, channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (R, D, S, S) plus what is taken; the affinities, (R, S * S, S * S), logits."""
        # Scaled before the product: in float16 the product could overflow.
        query = self.query(x).flatten(2) * self.query.out_channels**-0.5
        affinities = query.transpose(1, 2) @ self.key(x).flatten(2)
        shares = at_least_float32(affinities).softmax(dim=2).to(affinities.dtype)
        taken = self.value(x).flatten(2) @ shares.transpose(1, 2)
        return x + self.output(taken.unflatten(2, x.shape[2:])), affinities


@ROI_MASK_PRIOR_REGISTRY.register()
class CommonalityParsingPrior(nn.Module):
    """
    CPMask re-implemented from the abstract: boundaries and affinities shared by all classes.

    1. Four convolutions of the mask features see the boundary, at twice their resolution
       (``loss_boundary``); a 1x1 convolution fuses them with the mask features.
    2. :class:`AffinityBlock` on the result; its affinities learn which cells are on one side of the
       mask (``loss_affinity``).

    Both losses are those of the ROIs with a mask.
    """

    needs_class_maps = False

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dim: int = 256,
        affinity_dim: int = 128,
        boundary_weight: float = 1.0,
        affinity_weight: float = 1.0,
    ):
        """
        Args:
            input_shape: channels D and side S of the pooled mask features.
            conv_dim, affinity_dim: widths of the boundary's convolutions and of the affinities.
            boundary_weight, affinity_weight: of the two losses.
        """
        super().__init__()
        channels = input_shape.channels
        self.side = input_shape.height
        self.boundary_weight = boundary_weight
        self.affinity_weight = affinity_weight
        self.boundary_features = conv_stack([channels] + [conv_dim] * 4, relu_at_end=True)
        deconv = ConvTranspose2d(conv_dim, conv_dim, kernel_size=2, stride=2)
        weight_init.c2_msra_fill(deconv)
        predictor = Conv2d(conv_dim, 1, kernel_size=1)
        nn.init.normal_(predictor.weight, std=0.001)
        nn.init.zeros_(predictor.bias)
        self.boundary_predictor = nn.Sequential(deconv, nn.ReLU(), predictor)
        self.fuse = nn.Sequential(conv1x1(channels + conv_dim, channels), nn.ReLU())
        self.affinity = AffinityBlock(channels, affinity_dim)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
    ) -> dict:
        settings = cfg.MODEL.ROI_MASK_PRIOR.COMMONALITY_PARSING
        return {"input_shape": input_shape, **arguments_of(settings)}

    def forward(
        self, mask_features: torch.Tensor, context: ROIContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As ``ROI_MASK_PRIOR_REGISTRY`` says; needs ``context.instances`` for the losses alone."""
        boundary_features = self.boundary_features(mask_features)
        fused = self.fuse(torch.cat([mask_features, boundary_features], dim=1))
        enriched, affinities = self.affinity(fused)
        if not self.training or context.sampled is None:
            return enriched, {}
        has_mask = torch.cat([has_mask_of(x) for x in context.instances])
        rows = has_mask.nonzero().squeeze(1)
        rois = [select_rois(x, has_mask_of(x)) for x in context.instances]
        boundary_logits = self.boundary_predictor(boundary_features[rows])[:, 0]
        boundaries = boundary_of(crop_gt_masks(rois, boundary_logits.shape[-1], has_mask.device))
        masks = crop_gt_masks(rois, self.side, has_mask.device).flatten(1)
        return enriched, {
            "loss_boundary": boundary_loss(boundary_logits, boundaries) * self.boundary_weight,
            "loss_affinity": affinity_loss(affinities[rows], masks) * self.affinity_weight,
        }
