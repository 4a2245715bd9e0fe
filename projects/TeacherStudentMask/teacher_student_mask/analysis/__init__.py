"""Why a model fails on unseen, overlapped objects: measurements on result files, and a report."""

from .measure import Analysis, Settings, analyze
from .objects import ObjectTable
from .report import write_report

__all__ = ["Analysis", "ObjectTable", "Settings", "analyze", "write_report"]
