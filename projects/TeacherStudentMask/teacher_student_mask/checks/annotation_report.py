"""What the checks of annotation files report: findings, and counts of the classes."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from tabulate import tabulate

__all__ = [
    "EMPTY",
    "NO_MASK",
    "ONLY_CROWDS",
    "AnnotationReport",
    "ClassCounts",
    "Finding",
    "printable",
    "short_repr",
]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5

# Values of findings about a list as a whole.
EMPTY, ONLY_CROWDS, NO_MASK = "empty", "nothing but crowds", "classes without any mask"

short_repr = reprlib.Repr()
short_repr.maxstring = short_repr.maxother = 60


def printable(text: str) -> str:
    """A text for logs: names of files may hold bytes that are no UTF-8, which no log takes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Finding:
    """One kind of problem of a file; as text it is one sentence."""

    # "error": training would stop or go wrong; "warning": the remedy says what it does
    severity: str
    file: str
    unit: str  # "image", "annotation", "category", or "" where it is the file as a whole
    field: str
    remedy: str  # what is allowed and what to do
    count: int  # of all
    examples: tuple[tuple[str, str], ...]  # (id, value) of the first

    def as_warning(self, *consequence: str) -> Finding:
        """The same as a warning, which says what becomes of it."""
        return replace(self, severity="warning", remedy="; ".join([self.remedy, *consequence]))

    def as_error(self) -> Finding:
        return replace(self, severity="error")

    @property
    def is_about_none(self) -> bool:
        """Whether a list is empty, or has nothing that counts."""
        return self.examples[0][1] in (EMPTY, ONLY_CROWDS, NO_MASK)

    def __str__(self) -> str:
        name, value = self.examples[0]
        where = f"{self.file}: {self.unit} {name}: " if self.unit else f"{self.file}: "
        names = ", ".join(name for name, _ in self.examples)
        more = ", ..." if self.count > len(self.examples) else ""
        others = f" ({self.count} in all: {names}{more})" if self.count > 1 else ""
        return printable(f"{where}{self.field!r} is {value}; {self.remedy}{others}.")


@dataclass
class ClassCounts:
    """What a file has of one class; objects that are no crowd have a mask or a box only."""

    name: str
    category_id: int
    is_seen: bool | None  # None where the seen classes were not given
    masks: int  # of humans
    boxes_only: int
    crowd: int
    rectangles: int  # masks that are the rectangle of their box: boxes exported as masks?
    dropped: dict[str, int]  # objects that training leaves out: reason -> number
    dropped_masks: dict[str, int]  # masks that it leaves out, the box stays: reason -> number
    model_masks: int = 0  # masks with "mask_source" "model"

    @property
    def num_objects(self) -> int:
        """All that is no crowd."""
        return self.masks + self.model_masks + self.boxes_only


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{num} ({reason})" for reason, num in counts.items()) or "-"


@dataclass
class AnnotationReport:
    """What :func:`check_annotations` found."""

    file: str
    num_images: int = 0
    num_annotations: int = 0
    findings: list[Finding] = field(default_factory=list)
    classes: list[ClassCounts] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        return [x for x in self.findings if x.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [x for x in self.findings if x.severity == "warning"]

    def log(self) -> None:
        """Log every finding: errors as errors, warnings as warnings."""
        for finding in self.findings:
            level = logging.ERROR if finding.severity == "error" else logging.WARNING
            logger.log(level, str(finding))

    def raise_on_error(self) -> None:
        """
        Log every finding.

        Raises:
            ValueError: the sentence of the first error, if there is one.
        """
        self.log()
        if self.errors:
            raise ValueError(str(self.errors[0]))

    def judged(self, judge: Callable[[Finding], Finding | None]) -> AnnotationReport:
        """A copy in which every finding is what `judge` makes of it; None: it is left out."""
        findings = [x for x in map(judge, self.findings) if x is not None]
        findings.sort(key=lambda finding: finding.severity)
        return replace(self, findings=findings)

    def class_table(self) -> str:
        """The counts of the classes as text, a row for each; some columns only if they say much."""
        has_model_masks = any(x.model_masks for x in self.classes)
        has_dropped_masks = any(x.dropped_masks for x in self.classes)
        rows = []
        for x in self.classes:
            split = {True: "seen", False: "unseen", None: "-"}[x.is_seen]
            left_out = [_reasons(x.dropped)]
            left_out += [_reasons(x.dropped_masks)] if has_dropped_masks else []
            masks = [x.masks, x.model_masks] if has_model_masks else [x.masks]
            numbers = [x.num_objects, *masks, x.boxes_only, x.crowd, x.rectangles]
            rows.append([x.name, split, *numbers, *left_out])
        masks = ["human masks", "model masks"] if has_model_masks else ["masks"]
        headers = ["class", "split", "objects", *masks, "boxes only", "crowd", "rectangles"]
        headers += ["left out", "masks left out"] if has_dropped_masks else ["left out"]
        # Names such as "1e3" are no numbers.
        return tabulate(rows, headers=headers, disable_numparse=[0])

    def to_dict(self) -> dict:
        """All of it in types that json has; "message" of a finding is its sentence."""
        findings = [asdict(x) | {"message": str(x)} for x in self.findings]
        return asdict(self) | {"findings": findings}

    def add(
        self,
        severity: str,
        unit: str,
        rows: list[dict],
        is_bad: Sequence[bool],
        field: str,
        remedy: str,
        describe: Callable[[int], str] | None = None,
    ) -> None:
        """
        Add a finding about those rows of a list that have the problem, if any has.

        Args:
            is_bad: shape (n,), one for each row.
            describe: from a row's index to its value as text; None: what the row has as `field`.
        """
        indices = np.flatnonzero(is_bad).tolist()
        if not indices:
            return
        examples = []
        for i in indices[:_MAX_EXAMPLES]:
            name = short_repr.repr(rows[i]["id"]) if "id" in rows[i] else f"number {i}"
            if describe is not None:
                value = describe(i)
            else:
                value = short_repr.repr(rows[i][field]) if field in rows[i] else "missing"
            examples.append((name, value))
        finding = Finding(severity, self.file, unit, field, remedy, len(indices), tuple(examples))
        self.findings.append(finding)

    def add_to_file(self, severity: str, field: str, value: str, remedy: str) -> None:
        """Add a finding about the file as a whole."""
        self.findings.append(Finding(severity, self.file, "", field, remedy, 1, (("", value),)))
