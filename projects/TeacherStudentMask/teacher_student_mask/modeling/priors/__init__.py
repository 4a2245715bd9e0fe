"""Mask-feature priors, one file each, built by name."""

from .build import ROI_MASK_PRIOR_REGISTRY, KeptBoxFeatures, ROIContext, build_mask_prior
from .class_activation import ClassActivationPrior, cam_of

__all__ = [
    "ClassActivationPrior",
    "KeptBoxFeatures",
    "ROIContext",
    "ROI_MASK_PRIOR_REGISTRY",
    "build_mask_prior",
    "cam_of",
]
