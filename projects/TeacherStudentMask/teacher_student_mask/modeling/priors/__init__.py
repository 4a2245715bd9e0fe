"""Mask-feature priors, one file per paper, built by name."""

from .base import ROI_MASK_PRIOR_REGISTRY, ROIContext, build_mask_prior
from .contrastmask import ContrastivePrior, TwoBranchBoxHead
from .cpmask import CommonalityParsingPrior
from .opmask import (
    ClassActivationPrior,
    FeatureMapBoxHead,
    PooledFastRCNNOutputLayers,
    normalized_activation_maps,
)
from .shapeprop import ShapePropagationPrior

__all__ = [
    "ClassActivationPrior",
    "CommonalityParsingPrior",
    "ContrastivePrior",
    "FeatureMapBoxHead",
    "PooledFastRCNNOutputLayers",
    "ROIContext",
    "ROI_MASK_PRIOR_REGISTRY",
    "ShapePropagationPrior",
    "TwoBranchBoxHead",
    "build_mask_prior",
    "normalized_activation_maps",
]
