"""COCO jsons: THE reader and checker, for training, evaluation, analysis and every command."""

from .checks import check_coco, classes_of, read_coco
from .files import DEEP_MODES, TRANSPOSED, open_atomically, orientation_of, read_json, write_json
from .masks import HUMAN, MODEL, forget_mask, has_mask, is_from_model, valid_polygons
from .report import ClassCounts, Finding, Report
from .results import load_ground_truth, load_results, prepare_ground_truth

__all__ = [
    "ClassCounts",
    "DEEP_MODES",
    "Finding",
    "HUMAN",
    "MODEL",
    "Report",
    "TRANSPOSED",
    "check_coco",
    "classes_of",
    "forget_mask",
    "has_mask",
    "is_from_model",
    "load_ground_truth",
    "load_results",
    "open_atomically",
    "orientation_of",
    "prepare_ground_truth",
    "read_coco",
    "read_json",
    "valid_polygons",
    "write_json",
]
