"""What can be wrong with a COCO json, what each problem means, and how it is reported."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tabulate import tabulate

from ..errors import InputError
from .masks import HUMAN, MAX_PIXELS, MAX_PIXELS_OUTSIDE, MODEL

__all__ = ["RULES", "ClassCounts", "Finding", "Report", "Rule", "shorten"]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5
# Boxes and the extents of their masks, a pixel of tolerance aside, that cannot be of one object.
MIN_BOX_IOU, MAX_SHARE_OUTSIDE = 0.5, 0.3
# Of what fits when it is read in another way.
GOOD_IOU = 0.9
# Share of a class, of two crowds or more, from which on they may be no crowds.
MIN_SHARE_OF_CROWDS = 0.25
# Classes of fewer objects are named, so many of them.
_FEW_OBJECTS, _MAX_NAMES = 5, 20

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


@dataclass(frozen=True)
class Rule:
    """
    A kind of problem.

    Attributes:
        unit: "image", "annotation", "category", "entry" (of results), or "": the file as a whole.
        field: of the unit.
        training, evaluation: "error": it would stop, or go wrong; "warning"; "": not looked for.
        remedy: what is allowed, or what becomes of it, and what to do.
    """

    unit: str
    field: str
    training: str
    evaluation: str
    remedy: str


_WHOLE = "allowed: a whole number"
_SIDE = f"allowed: a whole number of pixels from 1 to {MAX_PIXELS - 1}"
_UNIQUE = "allowed: an id that no other has"
_BOX = "allowed: four finite numbers [x, y, width, height], the last two not negative"
_FAR = f"allowed: pixels, at most {MAX_PIXELS_OUTSIDE} outside the image"
_SOURCE = f"allowed: {HUMAN!r} (as without the key), or {MODEL!r} for a mask that a model made"
_LISTS = "allowed: a COCO json in UTF-8 with the lists 'images', 'annotations', 'categories'"
_ONLY_BOXES = "or evaluate boxes alone with tasks=('bbox',)"
_E, _W = "error", "warning"

# The one table. A name with a dot is that of a field whose value is of another type than allowed.
# fmt: off
RULES = {
    # The file as a whole.
    "content": Rule("", "content", _E, _E, _LISTS),
    "images": Rule("", "images", _E, _E, "allowed: a list of dicts, at least one"),
    "categories": Rule("", "categories", _E, _E, "allowed: a list of dicts, at least one"),
    "annotations": Rule("", "annotations", _E, _E, "allowed: a list of dicts"),
    "no objects": Rule("", "annotations", _E, "", "allowed: at least one object with 'iscrowd' 0"),
    "number of classes": Rule("", "categories", _E, _E, "allowed: as many as the model"),
    "seen classes": Rule("", "seen_classes", _E, _E, "allowed: classes of the file"),
    "no seen mask": Rule("", "seen_classes", _E, "", "allowed: at least one class with masks, as "
                         "nothing else teaches them (masks of a model do not count)"),
    "image root": Rule("", "image_root", _E, _E, "allowed: a folder that exists"),
    # Images: their entries, then their files.
    "image.id": Rule("image", "id", _E, _E, _WHOLE),
    "image.height": Rule("image", "height", _E, _E, _SIDE),
    "image.width": Rule("image", "width", _E, _E, _SIDE),
    "image.file_name": Rule("image", "file_name", _E, "", "allowed: a name in the image folder"),
    "image id twice": Rule("image", "id", _E, _E, _UNIQUE),
    "large image": Rule("image", "height x width", _E, _E,
                        f"allowed: fewer than {MAX_PIXELS} pixels"),
    "file twice": Rule("image", "file_name", _W, "", "other images name the same file, which "
                       "counts more than once in training"),
    "missing file": Rule("image", "file_name", _E, _E, "allowed: a file in the folder of the "
                         "images; get it or take the image out"),
    "many objects": Rule("image", "annotations", _W, "", "training takes them all, but the memory "
                         "for matching them grows with their number"),
    "unreadable": Rule("image", "file_name", _E, _E, "allowed: an image that PIL reads to its end"),
    "size": Rule("image", "width, height", _E, _E, "allowed: the size of the file, after it was "
                 "turned as its EXIF orientation says; correct the json, boxes and masks included"),
    "depth": Rule("image", "file_name", _E, _E, "allowed: 8 bits a channel, as training would cut "
                  "all values above 255; convert the image"),
    "orientation": Rule("image", "file_name", _W, "", "training turns the image as its EXIF "
                        "orientation says, so boxes and masks must fit the turned image"),
    "colour": Rule("image", "file_name", _W, "", "training converts it to RGB without a colour "
                   "profile; convert it yourself if the colours matter"),
    # Categories.
    "category.id": Rule("category", "id", _E, _E, _WHOLE),
    "category.name": Rule("category", "name", _E, _E, "allowed: the name of the class"),
    "category id twice": Rule("category", "id", _E, _E, _UNIQUE),
    "category name twice": Rule("category", "name", _E, _E, "allowed: names that differ, as seen "
                                "classes are given by name; rename or merge them"),
    "mostly rectangles": Rule("category", "name", _W, "", "rectangles teach nothing about shapes; "
                              "give null where only the box is known"),
    "many crowds": Rule("category", "name", _W, "", f"a share of {MIN_SHARE_OF_CROWDS:.0%} or "
                        "more, and training leaves crowds out; an object in several parts is none: "
                        "give it 'iscrowd' 0"),
    "root category": Rule("category", "name", _W, "", "no object has it, and it is the "
                          "'supercategory' of the others: the root that some exports add, which "
                          "would be a class of the model; take it out"),
    "seen without mask": Rule("category", "name", _W, "", "a seen class without a mask is trained "
                              "as an unseen one; take it out of the list"),
    # Annotations: ids and flags.
    "annotation.id": Rule("annotation", "id", _E, _E, _WHOLE),
    "annotation.image_id": Rule("annotation", "image_id", _E, _E, "allowed: an id of 'images'"),
    "annotation.category_id": Rule("annotation", "category_id", _E, _E,
                                   "allowed: an id of 'categories'"),
    "annotation.iscrowd": Rule("annotation", "iscrowd", _E, _E, "allowed: 0 or 1"),
    "annotation.mask_source": Rule("annotation", "mask_source", _E, _E, _SOURCE),
    "annotation.area": Rule("annotation", "area", "", _E, "allowed: a finite number, not negative"),
    "unknown image": Rule("annotation", "image_id", _E, _W, "allowed: an id of 'images'; COCO's "
                          "evaluation leaves the object out"),
    "annotation id twice": Rule("annotation", "id", _E, _E, _UNIQUE),
    "annotation without id": Rule("annotation", "id", _W, _E, "training does without, but "
                                  "evaluation needs it; number the annotations"),
    # Boxes.
    "annotation.bbox": Rule("annotation", "bbox", _E, _E, _BOX),
    "far box": Rule("annotation", "bbox", _E, _E, _FAR),
    "box without area": Rule("annotation", "bbox", _W, "", "a box without area: training leaves "
                             "the object out; correct it, or take it out"),
    "box outside its image": Rule("annotation", "bbox", _W, "", "a box outside its image: training "
                                  "leaves the object out; correct it, or take it out"),
    "box reaches out": Rule("annotation", "bbox", _W, "", "it reaches outside the image, and "
                            "training cuts it there"),
    "small box": Rule("annotation", "bbox", _W, _W, "a box below one pixel: is it normalised to 0 "
                      "to 1? allowed: pixels"),
    "XYXY box": Rule("annotation", "bbox", _W, _W, "as [x0, y0, x1, y1] it fits (its mask with an "
                     f"IoU of {GOOD_IOU} or more, or its image); COCO's is [x, y, width, height]"),
    "box beside its mask": Rule("annotation", "bbox", _W, _W, "IoU with the extent of its mask "
                                f"below {MIN_BOX_IOU}, or more than {MAX_SHARE_OUTSIDE:.0%} of "
                                "that extent outside; correct the box or the mask"),
    "rotated box": Rule("annotation", "attributes", _W, _W, "'bbox' is the rectangle before it was "
                        "turned; give the box, or the polygon, of the turned one"),
    "object twice": Rule("annotation", "bbox", _W, _W, "an earlier object is equal in image, class "
                         "and box (to 0.1 pixels); take one out"),
    # Masks.
    "RLE by rows": Rule("annotation", "segmentation", _W, _W, "it fits its box with an IoU of "
                        f"{GOOD_IOU} or more if the runs follow the rows of the image; COCO's "
                        "follow its columns"),
    "not a mask": Rule("annotation", "segmentation", _E, _E, "allowed: a list of polygons "
                       "[[x, y, x, y, x, y, ...], ...] of finite numbers, each of 3 points or more "
                       "in one flat list (not of pairs [x, y]), an RLE with 'size' and 'counts', "
                       "or null for an object without a mask"),
    "far polygon": Rule("annotation", "segmentation", _E, _E, _FAR),
    "RLE of another size": Rule("annotation", "segmentation", _E, _E, "allowed: an RLE of the "
                                "[height, width] of the image in 'images'"),
    "broken runs": Rule("annotation", "segmentation", _E, _E, "allowed: run lengths that add up to "
                        "the pixels of the image, height x width"),
    "unread mask": Rule("annotation", "segmentation", _W, "", "not a usable mask, but training "
                        "does not read it, as it is of a crowd or an unseen class"),
    "short polygon": Rule("annotation", "segmentation", _W, "", "polygons of fewer than 3 points "
                          "are left out, and an object without any other has a box only; give null "
                          "where tsmask complete shall make a mask"),
    "mask without a pixel": Rule("annotation", "segmentation", _W, "", "the mask covers nothing of "
                                 "its image, so training takes the object as one without a mask; "
                                 "correct it, or give null"),
    "crossing edges": Rule("annotation", "segmentation", _W, _W, "edges of the outline cross; the "
                           "mask is the pixels that pycocotools fills; draw the points in order"),
    "no mask": Rule("annotation", "segmentation", "", _E, "mask AP needs a mask on every object, "
                    f"of unseen classes too; evaluate on a json that has them, {_ONLY_BOXES}"),
    "mask of a model": Rule("annotation", "mask_source", "", _E, "a mask that a model made is not "
                            f"ground truth; evaluate on human masks, {_ONLY_BOXES}; one that a "
                            "human has checked and corrected has 'mask_source' 'human'"),
    "source is lost": Rule("annotation", "mask_source", _E, "", "load_coco_json leaves the field "
                           "out, and training would take the mask for a human's; "
                           "register the file with register_partial_coco, or give its path in "
                           "DATASETS.TRAIN"),
    # Entries of a result file.
    "no entries": Rule("", "content", "", _W, "there is nothing to measure"),
    "entry.image_id": Rule("entry", "image_id", "", _E, "allowed: an image id of the ground truth"),
    "entry.category_id": Rule("entry", "category_id", "", _E, "allowed: a category id of the "
                              "ground truth"),
    "entry.score": Rule("entry", "score", "", _E, "allowed: a finite number"),
    "entry.bbox": Rule("entry", "bbox", "", _E, _BOX),
    "entry.segmentation": Rule("entry", "segmentation", "", _E, "allowed: polygons "
                               "[[x, y, x, y, x, y, ...], ...] near the image, or an RLE of its "
                               "size whose runs add up to its pixels"),
    "empty entry": Rule("entry", "segmentation", "", _W, "a mask without any pixel"),
    "entry twice": Rule("entry", "segmentation", "", _W, "an earlier entry is equal in image, "
                        "category, score and mask"),
}
# fmt: on


def _list(counts: Sequence[tuple[str, int]]) -> str:
    names = ", ".join(f"{name} {count}" for name, count in counts[:_MAX_NAMES])
    return names + ", ..." * (len(counts) > _MAX_NAMES)


def shorten(value: object) -> str:
    """`value` as Python writes it, cut to a length that fits a sentence."""
    return _repr.repr(value)


@dataclass(frozen=True)
class Finding:
    """
    One kind of problem of a file; as text it is one sentence.

    Attributes:
        rule: key of ``RULES``.
        severity: "error" or "warning".
        count: how many rows have the problem.
        examples: (id, value) of the first of them.
    """

    rule: str
    severity: str
    file: str
    unit: str
    field: str
    remedy: str
    count: int
    examples: tuple[tuple[str, str], ...]

    def as_warning(self, consequence: str = "") -> Finding:
        """The same as a warning, which says what becomes of it."""
        remedy = f"{self.remedy}; {consequence}" if consequence else self.remedy
        return replace(self, severity="warning", remedy=remedy)

    def __str__(self) -> str:
        name, value = self.examples[0]
        where = f"{self.file}: {self.unit} {name}: " if self.unit else f"{self.file}: "
        names = ", ".join(name for name, _ in self.examples)
        more = ", ..." if self.count > len(self.examples) else ""
        others = f" ({self.count} in all: {names}{more})" if self.count > 1 else ""
        text = f"{where}{self.field!r} is {value}; {self.remedy}{others}."
        # Names may hold half a surrogate pair, which no log takes.
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class ClassCounts:
    """
    What a file has of one class; objects that are not crowds have a mask or a box only.

    Attributes:
        is_seen: None where the seen classes were not given.
        masks: of humans.
        model_masks: masks with "mask_source" "model".
        rectangles: human masks that are the rectangle of their box: boxes exported as masks?
        left_out: objects without a box in their image, which training leaves out.
    """

    name: str
    category_id: int
    is_seen: bool | None
    masks: int
    model_masks: int
    boxes_only: int
    crowd: int
    rectangles: int
    left_out: int

    @property
    def num_objects(self) -> int:
        """All that are not crowds."""
        return self.masks + self.model_masks + self.boxes_only


@dataclass
class Report:
    """
    What the checks found in a file, and how much it has of each class.

    Attributes:
        use: "training" or "evaluation".
    """

    file: str
    use: str = "training"
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
        unused = [(x.name, x.masks) for x in self.classes if x.is_seen is False and x.masks]
        if unused:
            num_masks, num_unused = sum(x.masks for x in self.classes), sum(n for _, n in unused)
            notes.append(
                f"{num_unused} of {num_masks} human masks are not used because SEEN_CLASSES does "
                f'not have their classes ("all" uses every mask): {_list(unused)}.'
            )
        few = [(x.name, x.num_objects) for x in self.classes if x.num_objects < _FEW_OBJECTS]
        if few:
            notes.append(f"Classes with fewer than {_FEW_OBJECTS} objects: {_list(few)}.")
        return notes

    def log(self) -> None:
        """Log every finding with the level of its severity."""
        for finding in self.findings:
            is_error = finding.severity == "error"
            logger.log(logging.ERROR if is_error else logging.WARNING, str(finding))

    def raise_on_error(self) -> None:
        """
        Log every finding.

        Raises:
            InputError: the sentence of the first error, if there is one.
        """
        self.log()
        for finding in self.errors:
            raise InputError(str(finding))

    def class_table(self) -> str:
        """The counts of the classes as text, a row for each, and one of their sums."""
        splits = {True: "seen", False: "unseen", None: "-"}
        rows = [
            [x.name, splits[x.is_seen], x.num_objects, x.masks, x.model_masks, x.boxes_only]
            + [x.crowd, x.rectangles, x.left_out]
            for x in self.classes
        ]
        rows.append(["total", "", *(sum(numbers) for numbers in list(zip(*rows))[2:])])
        headers = ["class", "split", "objects", "human masks", "model masks", "boxes only"]
        headers += ["crowd", "rectangles", "left out"]
        # Names such as "1e3" are not numbers.
        return tabulate(rows, headers=headers, disable_numparse=[0])

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
        indices = np.flatnonzero(is_bad).tolist()
        key, unit = RULES[rule].field, RULES[rule].unit
        examples = []
        for i in indices[:_MAX_EXAMPLES]:
            row = rows[i]
            name = shorten(row["id"]) if "id" in row and unit != "entry" else f"number {i}"
            value = shorten(row[key]) if key in row else "missing"
            examples.append((name, value if describe is None else describe(i)))
        if indices:
            self._add(rule, RULES[rule].remedy, len(indices), examples)

    def add_to_file(self, rule: str, value: str, remedy: str = "") -> None:
        """Add a finding about the file as a whole; `remedy` takes the place of the rule's."""
        self._add(rule, remedy or RULES[rule].remedy, 1, [("", value)])

    def _add(self, name: str, remedy: str, count: int, examples: list) -> None:
        rule = RULES[name]
        severity = rule.training if self.use == "training" else rule.evaluation
        if severity:
            where = (self.file, rule.unit, rule.field)
            self.findings.append(Finding(name, severity, *where, remedy, count, tuple(examples)))
