"""
ROI heads, mask heads, losses and pseudo masks.

Letters used in shapes throughout: N images in the batch; R ROIs over the batch; C foreground
classes; M side of a mask in cells (28, or 56); D feature channels; H, W height and width of an
image.
"""

from .dense_crf import DenseCRF
from .feature_map_box_head import FeatureMapBoxHead, TwoBranchBoxHead
from .grab_cut import GrabCutRCNN, grab_cut
from .gt_boxes import GTBoxInference
from .hourglass_mask_head import HourglassMaskHead
from .mask_head import MaskRCNNConvMultiUpsampleHead, build_teacher_mask_head
from .priors import ROI_MASK_PRIOR_REGISTRY
from .pseudo_mask import PSEUDO_MASK_METHODS, PseudoMaskGenerator, generate_pseudo_masks
from .roi_heads import PartiallySupervisedROIHeads
from .teacher_student_roi_heads import TeacherStudentROIHeads
from .weight_transfer_mask_head import WeightTransferMaskHead

__all__ = [
    "DenseCRF",
    "FeatureMapBoxHead",
    "GTBoxInference",
    "GrabCutRCNN",
    "HourglassMaskHead",
    "MaskRCNNConvMultiUpsampleHead",
    "PSEUDO_MASK_METHODS",
    "PseudoMaskGenerator",
    "PartiallySupervisedROIHeads",
    "ROI_MASK_PRIOR_REGISTRY",
    "TeacherStudentROIHeads",
    "TwoBranchBoxHead",
    "WeightTransferMaskHead",
    "build_teacher_mask_head",
    "generate_pseudo_masks",
    "grab_cut",
]
