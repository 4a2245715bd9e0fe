"""CondInst on FCOS: BoxInst, and BoxInst with the paper's teacher and student."""

from .backbone import build_fcos_resnet_fpn_backbone, build_fcos_timm_fpn_backbone
from .condinst import CondInst, TeacherStudentCondInst

__all__ = [
    "CondInst",
    "TeacherStudentCondInst",
    "build_fcos_resnet_fpn_backbone",
    "build_fcos_timm_fpn_backbone",
]
