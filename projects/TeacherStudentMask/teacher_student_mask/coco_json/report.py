"""
What COCO jsons and result files hold, what can be wrong with them, and how that is reported.

The types of the fields say which values are allowed, and ``RULES`` what types cannot say.
"""

from __future__ import annotations

import logging
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta
from tabulate import tabulate

from ..errors import InputError
from .masks import HUMAN, MAX_COORDINATE, MAX_PIXELS, MODEL

__all__ = [
    "RULES",
    "AnnotationRow",
    "CategoryRow",
    "ClassCounts",
    "EntryRow",
    "EvaluatedAnnotationRow",
    "Finding",
    "ImageRow",
    "Report",
    "Rule",
    "TrainingImageRow",
    "shorten",
]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5
# Classes of fewer objects are named, so many of them.
_FEW_OBJECTS, _MAX_NAMES = 5, 20

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def _allow(values: str, **limits) -> Meta:
    return Meta(extra={"allowed": values}, **limits)


_MAX_FLOAT = sys.float_info.max
# 64 bits, 1 or 1.0.
_Whole = Annotated[float, Meta(multiple_of=1, ge=-(2.0**63), lt=2.0**63)]
_Id = Annotated[_Whole, _allow("a whole number")]
_SIDE = f"a whole number of pixels from 1 to {MAX_COORDINATE}"
_Side = Annotated[float, _allow(_SIDE, multiple_of=1, ge=1, le=MAX_COORDINATE)]
_Position = Annotated[float, Meta(ge=-MAX_COORDINATE, le=MAX_COORDINATE)]
_Size = Annotated[float, Meta(ge=0, le=MAX_COORDINATE)]
_Box = tuple[_Position, _Position, _Size, _Size]
_BOX = _allow(
    f"four numbers of pixels up to {MAX_COORDINATE}, [x, y, width, height], the last two not "
    "negative"
)
_Flag = bool | Annotated[float, Meta(multiple_of=1, ge=0, le=1)]
_SOURCE = f"{HUMAN!r} (as without the key), or {MODEL!r} for a mask that a model made"
# Some frameworks write the name of the file, "000000000139", as the id of an image.
_NameOfImage = Annotated[str, Meta(pattern=r"\A[0-9]{1,18}\Z")]


class ImageRow(TypedDict):
    id: _Id
    height: _Side
    width: _Side
    file_name: NotRequired[Annotated[str | None, _allow("a name in the image folder")]]


class TrainingImageRow(ImageRow):
    file_name: Annotated[str, _allow("a name in the image folder", min_length=1)]


class CategoryRow(TypedDict):
    id: _Id
    name: Annotated[str, _allow("the name of the class", pattern=r"\S")]


class AnnotationRow(TypedDict):
    image_id: Annotated[_Whole, _allow("an id of 'images'")]
    category_id: Annotated[_Whole, _allow("an id of 'categories'")]
    bbox: Annotated[_Box, _BOX]
    id: NotRequired[Annotated[_Whole | str, _allow("a whole number")]]
    iscrowd: NotRequired[Annotated[_Flag, _allow("0 or 1")]]
    mask_source: NotRequired[Annotated[Literal["human", "model"], _allow(_SOURCE)]]


class EvaluatedAnnotationRow(AnnotationRow):
    area: Annotated[float, _allow("a finite number, not negative", ge=0, le=_MAX_FLOAT)]


class EntryRow(TypedDict):
    """A detection of a result file."""

    image_id: Annotated[_Whole | _NameOfImage, _allow("an image id of the ground truth")]
    category_id: Annotated[_Whole, _allow("a category id of the ground truth")]
    score: Annotated[float, _allow("a finite number", ge=-_MAX_FLOAT, le=_MAX_FLOAT)]
    bbox: NotRequired[Annotated[_Box | None, _BOX]]


@dataclass(frozen=True)
class Rule:
    """A kind of problem."""

    unit: str  # "image", "annotation", "category", "entry" (of results), or "": the whole file
    field: str  # of the unit
    training: str  # "error": it would stop, or go wrong; "warning"; "": not looked for
    evaluation: str
    remedy: str  # what is allowed, or what becomes of it, and what to do


_E, _W = "error", "warning"
_UNIQUE = "allowed: values that differ"
_LIST = "allowed: a list of dicts, at least one"
_OUTLINE = f"a list of polygons [[x, y, x, y, x, y, ...], ...] of pixels up to {MAX_COORDINATE}"
_ONLY_BOXES = "or evaluate boxes alone with tasks=('bbox',)"

# {unit: {name: (field, in training, in evaluation, remedy)}}
# fmt: off
_TABLE = {
    "": {
        "content": ("content", _E, _E, "allowed: a COCO json in UTF-8"),
        "images": ("images", _E, _E, _LIST),
        "categories": ("categories", _E, _E, _LIST),
        "annotations": ("annotations", _E, _E, "allowed: a list of dicts"),
        "no objects": ("annotations", _E, "", "allowed: at least one object with 'iscrowd' 0"),
        "number of classes": ("categories", _E, _E, "allowed: as many as the model"),
        "seen classes": ("seen_classes", _E, _E, "allowed: classes of the file"),
        "no seen mask": ("seen_classes", _E, "", "allowed: at least one with masks of humans"),
        "image root": ("image_root", _E, _E, "allowed: a folder that exists"),
        "no entries": ("content", "", _W, "there is nothing to measure"),
    },
    "image": {
        "image id twice": ("id", _E, _E, _UNIQUE),
        "large image": ("height x width", _E, _E, f"allowed: fewer than {MAX_PIXELS} pixels"),
        "file twice": ("file_name", _W, "", "several images have it; each counts in training"),
        "missing file": ("file_name", _E, _E, "allowed: a file in the folder of the images"),
        "many objects": ("annotations", _W, "", "matching them takes memory by their number"),
        "unreadable": ("file_name", _E, _E, "allowed: an image that PIL reads to its end"),
        "size": ("width, height", _E, _E, "correct the json, boxes and masks included, to the size "
                 "of the file, turned as its EXIF orientation says"),
        "depth": ("file_name", _E, _E, "allowed: 8 bits a channel; convert the image"),
        "orientation": ("file_name", _W, "", "training turns it; boxes and masks must fit that"),
        "colour": ("file_name", _W, "", "training converts it to RGB without a colour profile"),
    },
    "category": {
        "category id twice": ("id", _E, _E, _UNIQUE),
        "category name twice": ("name", _E, _E, "allowed: names that differ; rename or merge them"),
        "similar names": ("name", _W, "", "another class differs by blanks or case alone; merge "
                          "them if they are one"),
        "mostly rectangles": ("name", _W, "", "give null where only the box is known"),
        "many crowds": ("name", _W, "", "training leaves crowds out; an object in several parts is "
                        "none: give it 'iscrowd' 0"),
        "root category": ("name", _W, "", "the 'supercategory' of others, as some exports add it, "
                          "would be a class of the model; take it out"),
        "seen without mask": ("name", _W, "", "a seen class without a mask is trained as unseen"),
    },
    "annotation": {
        "unknown image": ("image_id", _E, _W, "allowed: an id of 'images'; AP leaves it out"),
        "annotation id twice": ("id", _E, _E, _UNIQUE),
        "annotation without id": ("id", _W, _E, "training does without, but evaluation needs it"),
        "empty box": ("bbox", _W, "", "nothing of it is inside its image, so training leaves the "
                      "object out; correct the box"),
        "box reaches out": ("bbox", _W, "", "training cuts it at the edge of the image"),
        "small box": ("bbox", _W, _W, "a box below one pixel: is it normalised to 0 to 1?"),
        "XYXY box": ("bbox", _W, _W, "as [x0, y0, x1, y1] it fits its mask or its image; COCO's is "
                     "[x, y, width, height]"),
        "box beside its mask": ("bbox", _W, _W, "it does not fit its mask; correct one of them "
                                "(the runs of an RLE follow the columns of the image)"),
        "rotated box": ("attributes", _W, _W, "'bbox' is the rectangle before it was turned; give "
                        "the box, or the polygon, of the turned one"),
        "object twice": ("bbox", _W, _W, "an earlier object is equal in image, class and box"),
        "not a mask": ("segmentation", _E, _E, f"allowed: {_OUTLINE}, each of 3 points or more in "
                       "one flat list (not of pairs [x, y]), an RLE with 'size' and 'counts', or "
                       "null for an object without a mask"),
        "broken RLE": ("segmentation", _E, _E, "allowed: an RLE of the image's [height, width], "
                       "whose run lengths add up to height x width"),
        "unread mask": ("segmentation", _W, "", "not a usable mask, but training does not read it, "
                        "as it is of a crowd or an unseen class"),
        "empty mask": ("segmentation", _W, "", "no polygon has 3 points, or nothing of it is in "
                       "its image, so the object counts as one without a mask"),
        "short part": ("segmentation", _W, _W, "an outline of one or two points beside a polygon "
                       "is not part of the mask"),
        "crossing edges": ("segmentation", _W, _W, "edges of the outline cross; the mask is the "
                           "pixels that pycocotools fills; draw the points in order"),
        "no mask": ("segmentation", "", _E, "mask AP needs a mask on every object, of unseen "
                    f"classes too; evaluate on a json that has them, {_ONLY_BOXES}"),
        "mask of a model": ("mask_source", "", _E, "a mask that a model made is not ground truth "
                            f"unless a human corrected it (then it is {HUMAN!r}); evaluate on "
                            f"human masks, {_ONLY_BOXES}"),
        "source is lost": ("mask_source", _E, "", "load_coco_json leaves the field out, and "
                           "training would take the mask for a human's; register the file with "
                           "register_partial_coco, or give its path in DATASETS.TRAIN"),
    },
    "entry": {
        "entry.segmentation": ("segmentation", "", _E, f"allowed: {_OUTLINE} or an RLE of the "
                               "image's size"),
        "entry twice": ("segmentation", "", _W, "an earlier entry has all of image, class, score "
                        "and mask"),
    },
}
# fmt: on
_TYPES = {
    "image": TrainingImageRow,
    "category": CategoryRow,
    "annotation": EvaluatedAnnotationRow,
    "entry": EntryRow,
}
# "image.id" and its like: the value of a field is of another type than allowed.
RULES = {
    f"{unit}.{x.name}": Rule(unit, x.name, _E, _E, f"allowed: {x.type.extra['allowed']}")
    for unit, row_type in _TYPES.items()
    for x in msgspec.inspect.type_info(row_type).fields
}
RULES.update({k: Rule(unit, *x) for unit, rules in _TABLE.items() for k, x in rules.items()})


def shorten(value: object) -> str:
    """`value` as Python writes it, cut to a length that fits a sentence."""
    return _repr.repr(value)


@dataclass(frozen=True)
class Finding:
    """One kind of problem of a file; as text it is one sentence."""

    rule: str  # key of RULES
    severity: str  # "error" or "warning"
    file: str
    remedy: str
    count: int  # how many rows have the problem
    examples: tuple[tuple[str, str], ...]  # (id, value) of the first of them

    def as_warning(self, consequence: str = "") -> Finding:
        """The same as a warning, which says what becomes of it."""
        remedy = f"{self.remedy}; {consequence}" if consequence else self.remedy
        return replace(self, severity="warning", remedy=remedy)

    def __str__(self) -> str:
        rule, (name, value) = RULES[self.rule], self.examples[0]
        where = f"{rule.unit} {name}: " if rule.unit else ""
        names = ", ".join(name for name, _ in self.examples)
        more = ", ..." if self.count > len(self.examples) else ""
        others = f" ({self.count} in all: {names}{more})" if self.count > 1 else ""
        text = f"{self.file}: {where}{rule.field!r} is {value}; {self.remedy}{others}."
        # Names may hold half a surrogate pair, which no log takes.
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class ClassCounts:
    """What a file has of one class; objects that are not crowds have a mask or a box only."""

    name: str
    category_id: int
    is_seen: bool | None  # None where the seen classes were not given
    masks: int  # of humans
    model_masks: int
    boxes_only: int
    crowd: int
    rectangles: int  # human masks that are the rectangle of their box: boxes exported as masks?

    @property
    def num_objects(self) -> int:
        """All that are not crowds."""
        return self.masks + self.model_masks + self.boxes_only


@dataclass
class Report:
    """What the checks found in a file, and how much it has of each class."""

    file: str
    use: str = "training"  # or "evaluation"
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

    @property
    def notes(self) -> list[str]:
        """Sentences about what is left unused, or is little, and may be meant so."""
        notes = []
        unused = {x.name: x.masks for x in self.classes if x.is_seen is False and x.masks}
        if unused:
            num_masks = sum(x.masks for x in self.classes)
            notes.append(
                f"{sum(unused.values())} of {num_masks} human masks are not used because "
                "SEEN_CLASSES does not have their classes "
                f'("all" uses every mask): {_list(unused)}.'
            )
        few = {x.name: x.num_objects for x in self.classes if x.num_objects < _FEW_OBJECTS}
        if few:
            notes.append(f"Classes with fewer than {_FEW_OBJECTS} objects: {_list(few)}.")
        return notes

    def log(self) -> None:
        """Log every finding with the level of its severity."""
        for finding in self.findings:
            logger.log(getattr(logging, finding.severity.upper()), str(finding))

    def raise_on_error(self, logs: bool = True) -> None:
        """
        Log every finding, unless others will.

        Raises:
            InputError: the sentence of the first error, if there is one.
        """
        if logs:
            self.log()
        if self.errors:
            raise InputError(str(self.errors[0]))

    def class_table(self) -> str:
        """The counts of the classes as text, a row for each, and one of their sums."""
        splits = {True: "seen", False: "unseen", None: "-"}
        columns = ["objects", "human masks", "model masks", "boxes only", "crowd", "rectangles"]
        rows = [
            [x.num_objects, x.masks, x.model_masks, x.boxes_only, x.crowd, x.rectangles]
            for x in self.classes
        ]
        names = [[x.name, splits[x.is_seen]] for x in self.classes] + [["total", ""]]
        rows = [[*a, *b] for a, b in zip(names, [*rows, map(sum, zip(*rows))])]
        # Names such as "1e3" are not numbers.
        return tabulate(rows, headers=["class", "split", *columns], disable_numparse=[0])

    def add(
        self,
        rule: str,
        rows: Sequence[dict],
        is_bad: Sequence[bool],
        describe: Callable[[int], str] | None = None,
    ) -> None:
        """
        Add a finding about those rows of a list that have a problem, if any has.

        Args:
            rule: key of ``RULES``.
            is_bad: shape (n,), one for each row.
            describe: from a row's index to its value as text; None: what the row has as the field.
        """
        indices, key = np.flatnonzero(is_bad), RULES[rule].field
        has_ids = RULES[rule].unit != "entry"
        examples = []
        for i in indices[:_MAX_EXAMPLES].tolist():
            row = rows[i]
            name = shorten(row["id"]) if "id" in row and has_ids else f"number {i}"
            value = shorten(row[key]) if key in row else "missing"
            examples.append((name, value if describe is None else describe(i)))
        self._add(rule, RULES[rule].remedy, len(indices), examples)

    def add_to_file(self, rule: str, value: str, remedy: str = "") -> None:
        """Add a finding about the file as a whole; `remedy` takes the place of the rule's."""
        self._add(rule, remedy or RULES[rule].remedy, 1, [("", value)])

    def _add(self, rule: str, remedy: str, count: int, examples: list) -> None:
        severity = getattr(RULES[rule], self.use)
        if severity and count:
            self.findings.append(Finding(rule, severity, self.file, remedy, count, tuple(examples)))


def _list(counts: dict[str, int]) -> str:
    names = [f"{name} {count}" for name, count in counts.items()]
    return ", ".join([*names[:_MAX_NAMES], *["..."] * (len(names) > _MAX_NAMES)])
