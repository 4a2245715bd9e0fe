"""Evaluation on subsets of classes and objects, independent of how a model was trained."""

from .coco_evaluation import PartiallySupervisedCOCOEvaluator
from .overlap import compute_overlaps
from .results_table import comparison_table, results_table

__all__ = [
    "PartiallySupervisedCOCOEvaluator",
    "comparison_table",
    "compute_overlaps",
    "results_table",
]
