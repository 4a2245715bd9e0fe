"""Checks of COCO annotations and images: what would break training or evaluation, and where."""

from .annotation_checks import check_annotations
from .annotation_report import AnnotationReport, ClassCounts, Finding

__all__ = ["AnnotationReport", "ClassCounts", "Finding", "check_annotations"]
