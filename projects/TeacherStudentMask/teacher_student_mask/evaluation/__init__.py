"""Evaluation on subsets of classes and objects, independent of how a model was trained."""

from .average_precision import (
    AREA_RANGES,
    PrecisionOfSubsets,
    Subset,
    at_iou,
    mean_percent,
    subset_metrics,
)
from .bootstrap import percentile_intervals, resample_images
from .boundary_iou import boundary_iou, boundary_region
from .coco_evaluation import PartiallySupervisedCOCOEvaluator
from .false_positives import (
    TIE_RULES,
    ObjectRegions,
    PixelCounts,
    count_pixels,
    find_object_regions,
)
from .matching import IOU_THRESHOLDS, CandidatePairs, Matches, find_candidate_pairs
from .overlap import OverlapBin, compute_overlaps, overlap_bins
from .results_table import METRICS, comparison_table, results_table

__all__ = [
    "AREA_RANGES",
    "CandidatePairs",
    "IOU_THRESHOLDS",
    "METRICS",
    "Matches",
    "ObjectRegions",
    "OverlapBin",
    "PartiallySupervisedCOCOEvaluator",
    "PixelCounts",
    "PrecisionOfSubsets",
    "Subset",
    "TIE_RULES",
    "at_iou",
    "boundary_iou",
    "boundary_region",
    "comparison_table",
    "compute_overlaps",
    "count_pixels",
    "find_candidate_pairs",
    "find_object_regions",
    "mean_percent",
    "overlap_bins",
    "percentile_intervals",
    "resample_images",
    "results_table",
    "subset_metrics",
]
