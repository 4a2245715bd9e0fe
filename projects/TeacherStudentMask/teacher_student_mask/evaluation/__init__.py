"""Evaluation on subsets of classes and objects, independent of how a model was trained."""

from .coco_evaluation import (
    PartiallySupervisedCOCOEvaluator,
    comparison_table,
    results_table,
    warn_of_many_objects,
)
from .overlap import OverlapBin, compute_overlaps, overlap_bins
from .pixel_errors import ObjectRegions, boundary_iou, count_pixels, find_object_regions
from .subset_ap import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    METRICS,
    Matches,
    PrecisionOfSubsets,
    Subset,
    find_candidate_pairs,
    subset_metrics,
)
from .tasks import MASK_TASKS, TaskMetrics, tasks_with_objects
from .yardsticks import compare_with_yardsticks, draw_yardsticks, yardstick_results

__all__ = [
    "AREA_RANGES",
    "IOU_THRESHOLDS",
    "MASK_TASKS",
    "METRICS",
    "Matches",
    "ObjectRegions",
    "OverlapBin",
    "PartiallySupervisedCOCOEvaluator",
    "PrecisionOfSubsets",
    "Subset",
    "TaskMetrics",
    "boundary_iou",
    "compare_with_yardsticks",
    "comparison_table",
    "compute_overlaps",
    "count_pixels",
    "draw_yardsticks",
    "find_candidate_pairs",
    "find_object_regions",
    "overlap_bins",
    "results_table",
    "subset_metrics",
    "tasks_with_objects",
    "warn_of_many_objects",
    "yardstick_results",
]
