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
    TaskMetrics,
    find_candidate_pairs,
    subset_metrics,
)

__all__ = [
    "AREA_RANGES",
    "IOU_THRESHOLDS",
    "METRICS",
    "Matches",
    "ObjectRegions",
    "OverlapBin",
    "PartiallySupervisedCOCOEvaluator",
    "PrecisionOfSubsets",
    "Subset",
    "TaskMetrics",
    "boundary_iou",
    "comparison_table",
    "compute_overlaps",
    "count_pixels",
    "find_candidate_pairs",
    "find_object_regions",
    "overlap_bins",
    "results_table",
    "subset_metrics",
    "warn_of_many_objects",
]
