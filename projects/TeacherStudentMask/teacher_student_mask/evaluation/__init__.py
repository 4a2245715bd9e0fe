"""Evaluation on subsets of classes and objects, independent of how a model was trained."""

from .coco_evaluation import PartiallySupervisedCOCOEvaluator, results_table, warn_of_many_objects
from .overlap import compute_overlaps, overlap_bins
from .subset_ap import find_candidate_pairs
from .tasks import (
    MASK_TASKS,
    METRICS,
    TaskMetrics,
    compare_with_yardsticks,
    draw_yardsticks,
    tasks_with_objects,
    yardstick_results,
)

__all__ = [
    "MASK_TASKS",
    "METRICS",
    "PartiallySupervisedCOCOEvaluator",
    "TaskMetrics",
    "compare_with_yardsticks",
    "compute_overlaps",
    "draw_yardsticks",
    "find_candidate_pairs",
    "overlap_bins",
    "results_table",
    "tasks_with_objects",
    "warn_of_many_objects",
    "yardstick_results",
]
