"""The objects that most need a human, first."""

from __future__ import annotations

import csv
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from completion.index import AnnotationIndex
from completion.parts import Parts, read_object
from completion.results import Results
from teacher_student_mask.engine import open_atomically

__all__ = ["COLUMNS", "write_ranking"]

COLUMNS = ("rank", "need", "annotation_id", "image_id", "file_name", "category_id", "class")
COLUMNS += ("x", "y", "width", "height", "score", "agreement", "overlap", "remark")


def write_ranking(index: AnnotationIndex, parts: Parts, results: Results, path: Path) -> int:
    """
    Write a csv with a row for each object that was to be given a mask, in the order of the need,
    see :func:`need_of`; those of equal need in the order of the json.

    Args:
        index, parts, results: of the run; objects of broken images are not in them.
        path: of the csv; replaced.

    Returns:
        The number of objects.

    Raises:
        WriteError: it could not be written; a file that was there before stays.
    """
    rows = np.flatnonzero(results.part_of >= 0)
    rows = rows[np.argsort(-results.needs[rows], kind="stable")]
    with ExitStack() as stack:
        streams = [stack.enter_context(open(x, "rb")) for x in parts.files()]
        writer = csv.writer(stack.enter_context(open_atomically(path)), lineterminator="\n")
        writer.writerow(COLUMNS)
        for rank, row in enumerate(rows.tolist(), start=1):
            record = read_object(streams[results.part_of[row]], int(results.offset_of[row]))
            writer.writerow([rank, f"{results.needs[row]:.4f}", *_cells(index, row, record)])
    return len(rows)


def _cells(index: AnnotationIndex, row: int, record: dict) -> list:
    annotation = index.read(index.annotation_spans[row])
    image = index.read(index.image_spans[index.image_of[row]])
    remark = record.get("problem", "")
    if not remark and record["is_fallback"]:
        remark = "fallback to box_fit"
    return [
        annotation.get("id"),
        image["id"],
        image["file_name"],
        record["category_id"],
        index.categories[record["category_id"]],
        *annotation["bbox"],
        record.get("score"),
        record.get("agreement"),
        record["overlap"],
        remark,
    ]
