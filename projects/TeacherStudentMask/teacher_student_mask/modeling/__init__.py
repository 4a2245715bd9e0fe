"""
ROI heads, mask heads, losses and pseudo masks.

Letters used in shapes throughout: N images in the batch; R ROIs over the batch; C foreground
classes; M side of a mask in cells (28, or 56); D feature channels; H, W height and width of an
image.
"""

from .condinst.condinst import CondInst
from .crf import DenseCRF
from .grabcut import grab_cut
from .hourglass import HourglassMaskHead
from .inference import GTBoxInference, has_teacher, predict_masks_on_boxes
from .mask_heads import MaskRCNNConvMultiUpsampleHead
from .mask_x_rcnn import WeightTransferMaskHead
from .priors import ROI_MASK_PRIOR_REGISTRY, cpmask, shapeprop  # noqa: F401
from .priors.contrastmask import TwoBranchBoxHead
from .pseudo_masks import PSEUDO_MASK_METHODS, PseudoMaskGenerator, generate_pseudo_masks
from .roi_heads import PartiallySupervisedROIHeads, TeacherStudentROIHeads
from .timm_backbone import TimmBackbone

__all__ = [
    "CondInst",
    "DenseCRF",
    "GTBoxInference",
    "HourglassMaskHead",
    "MaskRCNNConvMultiUpsampleHead",
    "PSEUDO_MASK_METHODS",
    "PartiallySupervisedROIHeads",
    "PseudoMaskGenerator",
    "ROI_MASK_PRIOR_REGISTRY",
    "TeacherStudentROIHeads",
    "TimmBackbone",
    "TwoBranchBoxHead",
    "WeightTransferMaskHead",
    "generate_pseudo_masks",
    "grab_cut",
    "has_teacher",
    "predict_masks_on_boxes",
]
