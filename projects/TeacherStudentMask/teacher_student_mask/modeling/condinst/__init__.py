"""CondInst on FCOS: BoxInst, and BoxInst with the paper's teacher and student."""

from . import backbone, condinst

__all__ = ["backbone", "condinst"]
