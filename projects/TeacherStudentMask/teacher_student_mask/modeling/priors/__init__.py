"""Mask-feature priors, one file each, built by name."""

from .build import (
    ROI_MASK_PRIOR_REGISTRY,
    KeptBoxFeatures,
    ROIContext,
    build_mask_prior,
    shape_with_prior,
)
from .class_activation import ClassActivationPrior, cam_of
from .commonality_parsing import CommonalityParsingPrior
from .contrastive import ContrastivePrior
from .shape_propagation import ShapePropagationPrior

__all__ = [
    "ClassActivationPrior",
    "CommonalityParsingPrior",
    "ContrastivePrior",
    "KeptBoxFeatures",
    "ROIContext",
    "ROI_MASK_PRIOR_REGISTRY",
    "ShapePropagationPrior",
    "build_mask_prior",
    "cam_of",
    "shape_with_prior",
]
