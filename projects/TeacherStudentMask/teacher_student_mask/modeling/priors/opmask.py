"""OPMask: a box head that keeps its map, and where in a ROI it sees the ROI's class, as a prior."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)
from detectron2.structures import Instances
from torch import nn
from torch.nn import functional as F

from ..mask_targets import classes_of
from . import ROI_MASK_PRIOR_REGISTRY, ROIContext

__all__ = [
    "ClassActivationPrior",
    "FeatureMapBoxHead",
    "PooledFastRCNNOutputLayers",
    "class_activation_maps",
    "normalize_per_roi",
]


@ROI_BOX_HEAD_REGISTRY.register()
class FeatureMapBoxHead(FastRCNNConvFCHead):
    """
    OPMask's box head: 3x3 convolutions only; the output is the map F of Eq. (8), not flattened.

    ROI features (R, D, h, w) become (R, C, h, w), with C the last of the widths and values >= 0.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_widths: Sequence[int], conv_norm: str = ""):
        """
        Args:
            input_shape: of the ROI features.
            conv_widths: ``MODEL.ROI_BOX_HEAD.CONV_WIDTHS`` of config.py.
            conv_norm: any norm of :func:`detectron2.layers.get_norm`, before each ReLU.
        """
        super().__init__(input_shape, conv_dims=list(conv_widths), fc_dims=[], conv_norm=conv_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {
            "input_shape": input_shape,
            "conv_widths": cfg.MODEL.ROI_BOX_HEAD.CONV_WIDTHS,
            "conv_norm": cfg.MODEL.ROI_BOX_HEAD.NORM,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """The input of the predictor's linear layers: C, after pooling over h and w."""
        return ShapeSpec(channels=super().output_shape.channels)


class PooledFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Detectron2's box predictor on a feature map, Eq. (8) of the paper: GAP(F) W + b.

    Its predictions are (scores, deltas, maps), with the maps that the scores are pooled from; the
    parent's other methods take the first two of these. Parameters are named as the parent's.
    """

    def forward(
        self, maps: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Of the output of :class:`FeatureMapBoxHead`, (R, C, h, w), or of :class:`TwoBranchBoxHead`,
        two such maps: scores, (R, K + 1), deltas, (R, 4 K) or (R, 4), and the (first) map.
        """
        maps = maps if isinstance(maps, tuple) else (maps,)
        pooled = [x.mean(dim=(2, 3)) for x in maps]
        return self.cls_score(pooled[0]), self.bbox_pred(pooled[-1]), maps[0]

    def inference(
        self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """As the parent's; detections also have ``box_features``, their proposals' maps."""
        *predictions, maps = predictions
        detections, kept = super().inference(predictions, proposals)
        for x, rows, own in zip(detections, kept, maps.split([len(x) for x in proposals])):
            x.box_features = own[rows]
        return detections, kept


def class_activation_maps(
    maps: torch.Tensor, classifier_weight: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """
    Class activation map of each ROI for one class, Eq. (9) of the paper without its bias: F_ij W.

    With the bias its mean over the cells is the logit of the class, Eq. (8). OPMask leaves it out;
    :func:`normalize_per_roi` removes it anyway.

    Args:
        maps: shape (R, C, h, w), the box head's features F.
        classifier_weight: shape (K + 1, C); a row per class, then background.
        classes: int64, shape (R,), the class of each ROI.

    Returns:
        shape (R, 1, h, w), logits.
    """
    rows = classifier_weight[classes].to(maps.dtype)
    return torch.einsum("rchw,rc->rhw", maps, rows)[:, None]


def normalize_per_roi(cam: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """
    Min-max normalisation of each ROI's map, (R, 1, h, w), to [0, 1]; zeros where one is constant.

    ``eps`` is added to the range, against 0 / 0 here and in the gradient. OPMask's code adds it to
    the map, where it cancels: a constant map becomes NaN there.
    """
    low = cam.amin(dim=(1, 2, 3), keepdim=True)
    high = cam.amax(dim=(1, 2, 3), keepdim=True)
    return (cam - low) / (high - low + eps)


@ROI_MASK_PRIOR_REGISTRY.register()
class ClassActivationPrior(nn.Module):
    """
    Adds the class activation map of each ROI to all channels of its mask features, as OPMask.

    The class is the matched object's in training, the predicted one at inference. In
    OPMask the maps are of the proposals, at inference too; the features are of refined boxes.
    """

    needs_class_maps = True

    @configurable
    def __init__(self, *, stop_gradient: bool = False):
        """``stop_gradient``: mask losses do not train the box head's convolutions by the maps."""
        super().__init__()
        self.stop_gradient = stop_gradient

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
    ) -> dict:
        return {"stop_gradient": cfg.MODEL.ROI_MASK_PRIOR.STOP_GRADIENT}

    def forward(
        self, mask_features: torch.Tensor, context: ROIContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        As ``ROI_MASK_PRIOR_REGISTRY`` says: the features plus the maps, bilinearly resized. Of
        ``context`` it needs ``instances``, ``class_maps`` and ``classifier``.
        """
        weight = context.classifier.weight.detach()
        classes = classes_of(context.instances)
        cam = normalize_per_roi(class_activation_maps(context.class_maps, weight, classes))
        if self.stop_gradient:
            cam = cam.detach()
        cam = F.interpolate(cam, size=mask_features.shape[-2:], mode="bilinear")
        return mask_features + cam.to(mask_features.dtype), {}
