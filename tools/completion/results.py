"""All that the processes have made, put together: the finished json, and what there is to say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tabulate import tabulate

from coco_json.splicing import JsonRows, Piece, splice
from completion.entries import HUMAN_MASK, MODEL_MASK, TARGET
from completion.index import AnnotationIndex
from completion.parts import Parts, read_object
from teacher_student_mask.engine import open_atomically

__all__ = [
    "Results",
    "collect_results",
    "mean_agreement",
    "need_of",
    "summary_table",
    "write_completed",
]


@dataclass
class Results:
    """
    What has been made, without the masks: 14 bytes an annotation.

    Attributes:
        part_of, offset_of: shape (annotations of the json,), int16 and int64: the file and the
            place in it of each annotation's record; -1 where there is none.
        needs: likewise, float32: see :func:`need_of`; -1 where there is no record.
        counts: {(category id, what): number}; what is "made", "fallback" (among the made), "not
            made", "RLE instead", "with agreement" (among the made).
        sums: {(category id, "score" or "agreement"): sum over the made}.
        problems: {why no mask was made: number of objects}.
        num_unreadable: masks in the json that could not be read for the overlaps.
        num_images: images in which objects were to be given masks and that are finished.
        broken: {number of an image that could not be used: why}.
        seconds: of all processes together.
    """

    part_of: np.ndarray
    offset_of: np.ndarray
    needs: np.ndarray
    counts: Counter = field(default_factory=Counter)
    sums: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    num_unreadable: int = 0
    num_images: int = 0
    broken: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def empty(cls, num_annotations: int) -> Results:
        return cls(
            part_of=np.full(num_annotations, -1, np.int16),
            offset_of=np.full(num_annotations, -1, np.int64),
            needs=np.full(num_annotations, -1, np.float32),
        )

    def add_object(self, part: int, offset: int, record: dict) -> None:
        row, category = record["row"], record["category_id"]
        self.part_of[row], self.offset_of[row] = part, offset
        self.needs[row] = need_of(record)
        self.num_unreadable += record["num_unreadable"]
        if "problem" in record:
            self.counts[category, "not made"] += 1
            self.problems[record["problem"]] += 1
            return
        self.counts[category, "made"] += 1
        self.counts[category, "fallback"] += record["is_fallback"]
        self.counts[category, "RLE instead"] += record["is_rle_instead"]
        self.sums[category, "score"] += record["score"]
        if record["agreement"] is not None:
            self.counts[category, "with agreement"] += 1
            self.sums[category, "agreement"] += record["agreement"]


def need_of(record: dict) -> float:
    """
    How much an object needs a human, in [0, 1]: 1 - score * agreement.

    Without a second head it is 1 - score, and where no mask was made 1.
    """
    if "problem" in record:
        return 1.0
    agreement = record["agreement"]
    return 1.0 - record["score"] * (1.0 if agreement is None else agreement)


def collect_results(parts: Parts, index: AnnotationIndex) -> Results:
    """Read what all processes have done, record by record."""
    results = Results.empty(len(index.kinds))
    finished = np.zeros(len(index.image_spans), bool)
    for part, record, objects in parts.images():
        image = record["image"]
        results.seconds += record["seconds"]
        if finished[image]:
            continue
        if "broken" in record:
            results.broken[image] = record["broken"]
            continue
        finished[image] = True
        # Left out before, and repaired since.
        results.broken.pop(image, None)
        for offset, of_object in objects:
            results.add_object(part, offset, of_object)
    results.num_images = int(finished.sum())
    return results


def write_completed(
    index: AnnotationIndex,
    parts: Parts,
    results: Results,
    output: Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """
    Write the json with the masks that were made; every other byte is that of the input.

    Args:
        progress: called with the number of bytes that have been written since the last call.

    Raises:
        ValueError: the input is not what it was when the run began; nothing is written. Names it.
        WriteError: the disk is full, ...; a file that was there before stays.
    """
    rows = JsonRows(index.path)
    number, size = 0, 0
    with ExitStack() as stack:
        streams = [stack.enter_context(open(path, "rb")) for path in parts.files()]
        f = stack.enter_context(open_atomically(output, "wb"))
        for piece in rows:
            raw = piece.raw
            if piece.key == "annotations":
                if number < len(results.part_of) and results.part_of[number] >= 0:
                    stream = streams[results.part_of[number]]
                    record = read_object(stream, int(results.offset_of[number]))
                    if "problem" not in record:
                        raw = _completed(index, record, piece)
                number += 1
            f.write(raw)
            size += len(piece.raw)
            if progress is not None and size > 1 << 20:
                progress(size)
                size = 0
        if progress is not None:
            progress(size)
        if rows.sha256 != index.sha256:
            raise _changed(index)


def _completed(index: AnnotationIndex, record: dict, piece: Piece) -> bytes:
    # What the index has found to be an object is one, unless the file is another one now.
    try:
        return splice(piece.raw, _changes(record, piece.value))
    except (TypeError, ValueError) as error:
        raise _changed(index) from error


def _changed(index: AnnotationIndex) -> ValueError:
    return ValueError(f"{index.path} was changed during the run; begin anew (--restart).")


def _changes(record: dict, annotation: dict) -> dict:
    changes = {
        "segmentation": record["segmentation"],
        "area": record["area"],
        "score": record["score"],
        "mask_source": "model",
    }
    optional = {
        "teacher_student_agreement": record["agreement"],
        "mask_fallback": "box_fit" if record["is_fallback"] else None,
    }
    for key, value in optional.items():
        # Null in place of what an earlier run has left.
        if value is not None or key in annotation:
            changes[key] = value
    return changes


def mean_agreement(results: Results) -> float | None:
    """Of teacher and student over all masks that were made; None for a model with one head."""
    values = [results.sums[key] for key in results.sums if key[1] == "agreement"]
    number = sum(n for (_, what), n in results.counts.items() if what == "with agreement")
    return sum(values) / number if number else None


def summary_table(index: AnnotationIndex, results: Results) -> str:
    """Images, objects and time; then the objects of each class."""
    rows = [
        ["images with objects that lacked a mask", results.num_images + len(results.broken)],
        ["  of them left out because they are broken", len(results.broken)],
        ["seconds per image", _ratio(results.seconds, results.num_images)],
    ]
    rows += [[f"no mask: {why}", n] for why, n in results.problems.most_common()]
    if results.num_unreadable:
        rows.append(["masks that could not be read for the overlaps", results.num_unreadable])
    head = tabulate(
        rows, colalign=("left", "right"), disable_numparse=True, preserve_whitespace=True
    )

    table = [_class_row(index, results, [i], name) for i, name in index.categories.items()]
    # Objects of unknown categories are not lost from the sums.
    every = {i for i, _ in index.counts}
    table.append(_class_row(index, results, sorted(every), "all"))
    headers = ["class", "human masks kept", "model masks kept", "masks made", "with fallback"]
    headers += ["RLE instead", "without a mask", "mean score", "mean agreement"]
    return f"{head}\n{tabulate(table, headers=headers, disable_numparse=True)}"


def _class_row(index: AnnotationIndex, results: Results, ids: list[int], name: str) -> list:
    def count(what: str) -> int:
        return sum(results.counts[i, what] for i in ids)

    def kept(kind: int) -> int:
        return sum(index.counts[i, kind] for i in ids)

    made = count("made")
    sums = [sum(results.sums[i, what] for i in ids) for what in ("score", "agreement")]
    numbers = [made, count("fallback"), count("RLE instead"), kept(TARGET) - made]
    means = [_ratio(sums[0], made), _ratio(sums[1], count("with agreement"))]
    return [name, kept(HUMAN_MASK), kept(MODEL_MASK), *numbers, *means]


def _ratio(total: float, number: int) -> str:
    return f"{total / number:.3f}" if number else "-"
