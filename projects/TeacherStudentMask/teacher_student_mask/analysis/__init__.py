"""Why a model fails on unseen, overlapped objects: measurements on result files, and a report."""

from .analysis import Analysis, analyze
from .ground_truth import load_ground_truth
from .input_checks import InputError, InputWarning
from .measurement import Settings
from .objects import ObjectTable
from .report import write_report
from .result_files import load_results
from .statistics import Bootstrap

__all__ = [
    "Analysis",
    "Bootstrap",
    "InputError",
    "InputWarning",
    "ObjectTable",
    "Settings",
    "analyze",
    "load_ground_truth",
    "load_results",
    "write_report",
]
