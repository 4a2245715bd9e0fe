"""The objects that most need a human, first."""

from __future__ import annotations

import csv
import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

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
        path: of the csv, in UTF-8; replaced. A lone surrogate, which UTF-8 does not have, is
            written as its escape: the six characters \\udce9.

    Returns:
        The number of objects.

    Raises:
        WriteError: it could not be written; a file that was there before stays.
    """
    rows = np.flatnonzero(results.part_of >= 0)
    rows = rows[np.argsort(-results.needs[rows], kind="stable")]
    with ExitStack() as stack:
        streams = [stack.enter_context(open(x, "rb")) for x in parts.files()]
        text = _HashedText(stack.enter_context(open_atomically(path, "wb")))
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for rank, row in enumerate(rows.tolist(), start=1):
            record = read_object(streams[results.part_of[row]], int(results.offset_of[row]))
            writer.writerow([rank, f"{results.needs[row]:.4f}", *_cells(index, row, record)])
        # Before it takes its name: a run that is killed in between finds it to be its own.
        parts.claim_ranking(text.digest.hexdigest())
    return len(rows)


class _HashedText:
    """Where the csv module writes: to a file, and into a checksum."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")
        self._stream.write(data)
        self.digest.update(data)


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
