"""
ROI heads, mask heads, losses and pseudo masks.

Letters used in shapes throughout: N images in the batch; R ROIs over the batch; C foreground
classes; M side of a mask in cells (28, or 56); D feature channels; H, W height and width of an
image.
"""

from .condinst import (
    CondInst,
    TeacherStudentCondInst,
    build_fcos_resnet_fpn_backbone,
    build_fcos_timm_fpn_backbone,
)
from .crf import DenseCRF
from .grabcut import GrabCutRCNN, grab_cut
from .hourglass import HourglassMaskHead
from .inference import GTBoxInference, has_teacher, predict_masks_on_boxes
from .mask_heads import MaskRCNNConvMultiUpsampleHead, build_teacher_mask_head
from .mask_x_rcnn import WeightTransferMaskHead
from .priors import ROI_MASK_PRIOR_REGISTRY
from .priors.contrastmask import ContrastivePrior, TwoBranchBoxHead
from .priors.cpmask import CommonalityParsingPrior
from .priors.opmask import ClassActivationPrior, FeatureMapBoxHead
from .priors.shapeprop import ShapePropagationPrior
from .pseudo_masks import PSEUDO_MASK_METHODS, PseudoMaskGenerator, generate_pseudo_masks
from .roi_heads import PartiallySupervisedROIHeads, TeacherStudentROIHeads
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = [
    "ClassActivationPrior",
    "CommonalityParsingPrior",
    "CondInst",
    "ContrastivePrior",
    "DenseCRF",
    "FeatureMapBoxHead",
    "GTBoxInference",
    "GrabCutRCNN",
    "HourglassMaskHead",
    "MaskRCNNConvMultiUpsampleHead",
    "PSEUDO_MASK_METHODS",
    "PartiallySupervisedROIHeads",
    "PseudoMaskGenerator",
    "ROI_MASK_PRIOR_REGISTRY",
    "ShapePropagationPrior",
    "TeacherStudentCondInst",
    "TeacherStudentROIHeads",
    "TimmBackbone",
    "TwoBranchBoxHead",
    "WeightTransferMaskHead",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
    "build_teacher_mask_head",
    "build_timm_fpn_backbone",
    "generate_pseudo_masks",
    "grab_cut",
    "has_teacher",
    "predict_masks_on_boxes",
]
