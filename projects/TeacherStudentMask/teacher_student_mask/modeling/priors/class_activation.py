"""OPMask's prior: where in a ROI the box classifier sees the ROI's class."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import nn
from torch.nn import functional as F

from .build import ROI_MASK_PRIOR_REGISTRY, KeptBoxFeatures, ROIContext

__all__ = [
    "ClassActivationPrior",
    "cam_of",
    "class_activation_maps",
    "normalize_per_roi",
    "raw_cam_of",
]


def class_activation_maps(
    maps: torch.Tensor,
    classifier_weight: torch.Tensor,
    classes: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Class activation map of each ROI for one class, Eq. (9) of the paper: F_ij W_cls + b_cls.

    With ``bias`` its mean over the cells is the logit of the class, Eq. (8). OPMask leaves the bias
    out; :func:`normalize_per_roi` removes it anyway.

    Args:
        maps: shape (R, C, h, w), the box head's features F.
        classifier_weight: shape (K + 1, C); a row per class, then background.
        classes: int64, shape (R,), the class of each ROI; only its map is computed.
        bias: shape (K + 1,).

    Returns:
        shape (R, 1, h, w), logits; gradient flows to all but ``classes``.

    Raises:
        ValueError: not one class per map.
    """
    if len(classes) != len(maps):
        raise ValueError(f"{len(maps)} box features for {len(classes)} ROIs; give one for each.")
    rows = classifier_weight[classes].to(maps.dtype)
    cams = torch.einsum("rchw,rc->rhw", maps, rows)[:, None]
    return cams if bias is None else cams + bias[classes][:, None, None, None]


def normalize_per_roi(cam: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """
    Min-max normalisation of each ROI's map.

    OPMask's code adds 1e-4 to the map instead, which cancels: a constant map becomes NaN there.

    Args:
        cam: shape (R, 1, h, w).
        eps: added to the range, so that 0 / 0 cannot occur, neither here nor in the gradient.

    Returns:
        shape (R, 1, h, w), in [0, 1]; zeros where a map is constant.
    """
    low = cam.amin(dim=(1, 2, 3), keepdim=True)
    high = cam.amax(dim=(1, 2, 3), keepdim=True)
    return (cam - low) / (high - low + eps)


def raw_cam_of(instances: list[Instances], kept: KeptBoxFeatures) -> torch.Tensor:
    """
    The class activation map of each ROI for its class, as :func:`class_activation_maps` gives it.

    Args:
        instances: one per image, R rows in all, with ``pred_classes``, or else ``gt_classes``.
        kept: of these R rows.

    Returns:
        shape (R, 1, h, w), logits without bias; gradient flows to ``kept.maps``, not to the
        classifier.
    """
    classes = torch.cat(
        [x.pred_classes if x.has("pred_classes") else x.gt_classes for x in instances]
    )
    return class_activation_maps(kept.maps, kept.classifier.weight.detach(), classes)


def cam_of(instances: list[Instances], kept: KeptBoxFeatures) -> torch.Tensor:
    """
    The maps that :class:`ClassActivationPrior` adds, before it resizes them.

    Args:
        instances, kept: as for :func:`raw_cam_of`.

    Returns:
        shape (R, 1, h, w), in [0, 1]; gradient flows to ``kept.maps``, not to the classifier.
    """
    return normalize_per_roi(raw_cam_of(instances, kept))


@ROI_MASK_PRIOR_REGISTRY.register()
class ClassActivationPrior(nn.Module):
    """
    Adds the class activation map of each ROI to all channels of its mask features, as OPMask.

    The class is the matched object's in training, the predicted one at inference. Which
    boxes the maps are of is the caller's choice; OPMask's are the proposals, at inference too,
    where the mask features are those of the refined boxes.
    """

    needs_box_features = True

    @configurable
    def __init__(self, *, stop_gradient: bool = False):
        """
        Args:
            stop_gradient: mask losses do not train the box head's convolutions through the maps.
                They never train its classifier.
        """
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
        Args:
            mask_features: shape (R, D, S, S); not changed.
            context: its ``instances`` and ``kept``, see :func:`cam_of`.

        Returns:
            shape (R, D, S, S), the features plus the maps, bilinearly resized; no losses.

        Raises:
            ValueError: ``context.kept`` is None, or not of R rows.
        """
        if context.kept is None:
            raise ValueError(
                "ClassActivationPrior needs the box head's feature maps of the ROIs: set "
                'MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead" or "TwoBranchBoxHead".'
            )
        cam = cam_of(context.instances, context.kept)
        if self.stop_gradient:
            cam = cam.detach()
        cam = F.interpolate(
            cam, size=mask_features.shape[-2:], mode="bilinear", align_corners=False
        )
        return mask_features + cam.to(mask_features.dtype), {}
