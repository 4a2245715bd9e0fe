"""What can be wrong with a COCO json, what each problem means, and how it is reported."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from tabulate import tabulate

from .coco_masks import HUMAN, MAX_PIXELS, MAX_PIXELS_OUTSIDE, MODEL
from .errors import InputError

__all__ = ["RULES", "ClassCounts", "Finding", "Report", "Rule", "shorten"]

logger = logging.getLogger(__name__)

_MAX_EXAMPLES = 5

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


@dataclass(frozen=True)
class Rule:
    """
    A kind of problem.

    Attributes:
        unit: "image", "annotation", "category", "entry" (of results), or "": the file as a whole.
        field: of the unit.
        training, evaluation: "error": it would stop, or go wrong; "warning"; "note": worth a line
            in the log; "": not looked for.
        remedy: what is allowed, or what becomes of it, and what to do.
    """

    unit: str
    field: str
    training: str
    evaluation: str
    remedy: str


_SIDE = f"allowed: a whole number of pixels from 1 to {MAX_PIXELS - 1}"
_BOX = "allowed: four finite numbers [x, y, width, height]"
_FAR = f"allowed: pixels, at most {MAX_PIXELS_OUTSIDE} outside the image"
_SOURCE = f"allowed: {HUMAN!r} (as without the key), or {MODEL!r} for a mask that a model made"
_UNIQUE = "allowed: an id that no other has"
_ONLY_BOXES = "evaluate on human masks, or boxes alone with tasks=('bbox',)"

# The one table. A name with a dot is that of a field whose value is of another type than allowed.
# fmt: off
RULES = {
    # The file as a whole.
    "content": Rule("", "content", "error", "error", "allowed: a COCO json in UTF-8, a dict with "
                    "the lists 'images', 'annotations', 'categories'"),
    "images": Rule("", "images", "error", "error", "allowed: a list of dicts, at least one"),
    "categories": Rule("", "categories", "error", "error", "allowed: a list of dicts, at least "
                       "one"),
    "annotations": Rule("", "annotations", "error", "error", "allowed: a list of dicts"),
    "no objects": Rule("", "annotations", "error", "", "allowed: at least one object with "
                       "'iscrowd' 0"),
    "number of classes": Rule("", "categories", "error", "error", "allowed: as many as the model"),
    "seen classes": Rule("", "seen_classes", "error", "error", "allowed: classes of the file"),
    "no seen mask": Rule("", "seen_classes", "error", "", "allowed: at least one class with masks, "
                         "as nothing else teaches them (masks of a model do not count)"),
    "image root": Rule("", "image_root", "error", "error", "allowed: a folder that exists"),
    # Images: their entries, then their files.
    "image.id": Rule("image", "id", "error", "error", "allowed: a whole number"),
    "image.height": Rule("image", "height", "error", "error", _SIDE),
    "image.width": Rule("image", "width", "error", "error", _SIDE),
    "image.file_name": Rule("image", "file_name", "error", "", "allowed: the name of the file, "
                            "relative to the folder of the images"),
    "image id twice": Rule("image", "id", "error", "error", _UNIQUE),
    "large image": Rule("image", "height x width", "error", "error",
                        f"allowed: fewer than {MAX_PIXELS} pixels"),
    "file twice": Rule("image", "file_name", "warning", "", "other images name the same file, "
                       "which counts more than once in training"),
    "missing file": Rule("image", "file_name", "error", "error", "allowed: a file in the folder of "
                         "the images; get it or take the image out"),
    "many objects": Rule("image", "annotations", "warning", "", "training takes them all, but the "
                         "memory for matching them grows with their number"),
    "unreadable": Rule("image", "file_name", "error", "error", "allowed: an image that PIL reads "
                       "to its end"),
    "size": Rule("image", "width, height", "error", "error", "allowed: the size of the file, after "
                 "it was turned as its EXIF orientation says; correct the json, boxes and masks "
                 "included"),
    "depth": Rule("image", "file_name", "error", "error", "allowed: 8 bits a channel, as training "
                  "would cut all values above 255; convert the image"),
    "orientation": Rule("image", "file_name", "warning", "", "training turns the image as its EXIF "
                        "orientation says, so boxes and masks must fit the turned image"),
    "colour": Rule("image", "file_name", "warning", "", "training converts it to RGB without a "
                   "colour profile; convert it yourself if the colours matter"),
    # Categories.
    "category.id": Rule("category", "id", "error", "error", "allowed: a whole number"),
    "category.name": Rule("category", "name", "error", "error", "allowed: the name of the class"),
    "category id twice": Rule("category", "id", "error", "error", _UNIQUE),
    "category name twice": Rule("category", "name", "error", "error", "allowed: names that differ, "
                                "as seen classes are given by name; rename or merge them"),
    "mostly rectangles": Rule("category", "name", "warning", "", "rectangles teach nothing about "
                              "shapes; give null where only the box is known"),
    "seen without mask": Rule("category", "name", "warning", "", "a seen class without a mask is "
                              "trained as an unseen one; take it out of the list"),
    # Annotations: ids and flags.
    "annotation.id": Rule("annotation", "id", "error", "error", "allowed: a whole number"),
    "annotation.image_id": Rule("annotation", "image_id", "error", "error",
                                "allowed: an id of 'images'"),
    "annotation.category_id": Rule("annotation", "category_id", "error", "error",
                                   "allowed: an id of 'categories'"),
    "annotation.iscrowd": Rule("annotation", "iscrowd", "error", "error", "allowed: 0 or 1"),
    "annotation.mask_source": Rule("annotation", "mask_source", "error", "error", _SOURCE),
    "annotation.area": Rule("annotation", "area", "", "error", "allowed: a finite number of "
                            "pixels, not negative"),
    "annotation.keypoints": Rule("annotation", "keypoints", "error", "error", "allowed: a list of "
                                 "numbers, or null"),
    "unknown image": Rule("annotation", "image_id", "error", "warning", "allowed: an id of "
                          "'images'; COCO's evaluation leaves the object out"),
    "annotation id twice": Rule("annotation", "id", "error", "error", _UNIQUE),
    "annotation without id": Rule("annotation", "id", "warning", "error", "training does without, "
                                  "but evaluation needs it; number the annotations"),
    # Boxes.
    "annotation.bbox": Rule("annotation", "bbox", "error", "error", _BOX),
    "negative box": Rule("annotation", "bbox", "error", "error",
                         "allowed: [x, y, width, height] with width and height not negative"),
    "far box": Rule("annotation", "bbox", "error", "error", _FAR),
    "box without area": Rule("annotation", "bbox", "warning", "note", "a box without area: "
                             "training leaves the object out; correct it, or take it out"),
    "box outside its image": Rule("annotation", "bbox", "warning", "note", "a box outside its "
                                  "image: training leaves the object out; correct it, or take it "
                                  "out"),
    "box reaches out": Rule("annotation", "bbox", "warning", "note", "it reaches outside the "
                            "image, and training cuts it there"),
    # Masks. Of those that training does not read, errors are warnings.
    "not a mask": Rule("annotation", "segmentation", "error", "error", "allowed: a list of "
                       "polygons [[x, y, x, y, x, y, ...], ...] of finite numbers, an RLE with "
                       "'size' and 'counts', or null for an object without a mask"),
    "far polygon": Rule("annotation", "segmentation", "error", "error", _FAR),
    "RLE of another size": Rule("annotation", "segmentation", "error", "error", "allowed: an RLE "
                                "of the [height, width] of the image in 'images'"),
    "broken runs": Rule("annotation", "segmentation", "error", "error", "allowed: run lengths that "
                        "add up to the pixels of the image, height x width"),
    "short polygon": Rule("annotation", "segmentation", "warning", "note", "polygons of fewer than "
                          "3 points, or with half a point, are left out, and an object without any "
                          "other has a box only"),
    "mask without a pixel": Rule("annotation", "segmentation", "warning", "note", "the mask covers "
                                 "nothing of its image, so training takes the object as one "
                                 "without a mask; correct it, or give null"),
    "no mask": Rule("annotation", "segmentation", "", "error", "mask AP needs a mask on every "
                    "object, of unseen classes too; evaluate on annotations that have them, or "
                    "boxes alone with tasks=('bbox',)"),
    "mask of a model": Rule("annotation", "mask_source", "", "error", "a mask that a model made is "
                            f"not ground truth; {_ONLY_BOXES}; a mask that a human has checked and "
                            "corrected has 'mask_source' 'human'"),
    "source is lost": Rule("annotation", "mask_source", "error", "", "the function that reads this "
                           "dataset leaves the field out, and training would take the mask for a "
                           "human's; register the file with register_partial_coco, or give its "
                           "path in DATASETS.TRAIN"),
    # Entries of a result file.
    "no entries": Rule("", "content", "", "warning", "there is nothing to measure"),
    "entry.image_id": Rule("entry", "image_id", "", "error", "allowed: the id of an image of the "
                           "ground truth"),
    "entry.category_id": Rule("entry", "category_id", "", "error", "allowed: the id of a category "
                              "of the ground truth"),
    "entry.score": Rule("entry", "score", "", "error", "allowed: a finite number"),
    "entry.bbox": Rule("entry", "bbox", "", "error", _BOX),
    "entry.segmentation": Rule("entry", "segmentation", "", "error", "allowed: polygons "
                               "[[x, y, x, y, x, y, ...], ...] near the image, or an RLE of its "
                               "size whose runs add up to its pixels"),
    "empty entry": Rule("entry", "segmentation", "", "warning", "a mask without any pixel"),
    "unusual score": Rule("entry", "score", "", "warning", "usual are scores from 0 to 1"),
    "entry without box": Rule("entry", "bbox", "", "warning", "the mask's own box is taken"),
    "entry reaches out": Rule("entry", "bbox", "", "warning", "it reaches more than 1 pixel "
                              "outside its image"),
    "entry twice": Rule("entry", "segmentation", "", "warning", "an earlier entry is equal in "
                        "image, category, score and mask"),
}
# fmt: on


def shorten(value: object) -> str:
    """`value` as Python writes it, cut to a length that fits a sentence."""
    return _repr.repr(value)


@dataclass(frozen=True)
class Finding:
    """
    One kind of problem of a file; as text it is one sentence.

    Attributes:
        rule: key of ``RULES``.
        severity: "error", "warning" or "note".
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

    def as_warning(self, *consequence: str) -> Finding:
        """The same as a warning, which says what becomes of it."""
        return replace(self, severity="warning", remedy="; ".join([self.remedy, *consequence]))

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
        left_out: {why training leaves an object, or only its mask, out: number}.
    """

    name: str
    category_id: int
    is_seen: bool | None
    masks: int
    model_masks: int
    boxes_only: int
    crowd: int
    rectangles: int
    left_out: dict[str, int]

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

    def log(self) -> None:
        """Log every finding with the level of its severity; notes as INFO."""
        levels = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}
        for finding in self.findings:
            logger.log(levels[finding.severity], str(finding))

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
        """The counts of the classes as text, a row for each."""
        has_model_masks = any(x.model_masks for x in self.classes)
        rows = []
        for x in self.classes:
            split = {True: "seen", False: "unseen", None: "-"}[x.is_seen]
            masks = [x.masks, x.model_masks] if has_model_masks else [x.masks]
            left_out = ", ".join(f"{num} ({reason})" for reason, num in x.left_out.items()) or "-"
            numbers = [x.num_objects, *masks, x.boxes_only, x.crowd, x.rectangles]
            rows.append([x.name, split, *numbers, left_out])
        masks = ["human masks", "model masks"] if has_model_masks else ["masks"]
        headers = ["class", "split", "objects", *masks, "boxes only", "crowd", "rectangles"]
        # Names such as "1e3" are not numbers.
        return tabulate(rows, headers=[*headers, "left out"], disable_numparse=[0])

    def to_dict(self) -> dict:
        """All of it in types that json has; "message" of a finding is its sentence."""
        findings = [asdict(x) | {"message": str(x)} for x in self.findings]
        return asdict(self) | {"findings": findings}

    def add(
        self,
        rule: str,
        rows: Sequence[dict],
        is_bad: Sequence[bool],
        describe: Callable[[int], str] | None = None,
        *consequence: str,
    ) -> None:
        """
        Add a finding about those rows of a list that have a problem, if any has.

        Args:
            rule: key of ``RULES``.
            is_bad: shape (n,), one for each row.
            describe: from a row's index to its value as text; None: what the row has as the field.
            consequence: makes a warning of it, and says what becomes of it.
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
            if consequence:
                self.findings[-1] = self.findings[-1].as_warning(*consequence)

    def add_to_file(self, rule: str, value: str, remedy: str = "") -> None:
        """Add a finding about the file as a whole; `remedy` takes the place of the rule's."""
        self._add(rule, remedy or RULES[rule].remedy, 1, [("", value)])

    def _add(self, name: str, remedy: str, count: int, examples: list) -> None:
        rule = RULES[name]
        severity = rule.training if self.use == "training" else rule.evaluation
        if severity:
            where = (self.file, rule.unit, rule.field)
            self.findings.append(Finding(name, severity, *where, remedy, count, tuple(examples)))

    def count_classes(
        self,
        category: np.ndarray,
        names: dict[int, str],
        is_seen: np.ndarray | None,
        columns: dict[str, np.ndarray],
        left_out: dict[str, np.ndarray],
    ) -> None:
        """
        Add the counts of the classes, and findings about those without human masks.

        Args:
            category: position of each annotation's class in ``names``, -1 where it is unknown;
                int64, shape (n,).
            names: {category id: name}.
            is_seen: bool, shape (number of classes,); None where the seen classes are not known.
            columns: {number of :class:`ClassCounts`: what it counts}, bool of shape (n,) each.
            left_out: {why training leaves an object or its mask out: which}, bool of shape (n,).
        """

        def count(is_counted: np.ndarray) -> list[int]:
            # The unknown class -1 comes first, and is not counted.
            return np.bincount(category[is_counted] + 1, minlength=len(names) + 1)[1:].tolist()

        counts = {name: count(marked) for name, marked in columns.items()}
        reasons = {reason: count(marked) for reason, marked in left_out.items()}
        for k, (category_id, name) in enumerate(names.items()):
            seen = None if is_seen is None else bool(is_seen[k])
            numbers = {column: x[k] for column, x in counts.items()}
            of_class = {reason: x[k] for reason, x in reasons.items() if x[k]}
            self.classes.append(ClassCounts(name, category_id, seen, **numbers, left_out=of_class))
        classes, rows = self.classes, [{"id": i} for i in names]
        self.add(
            "mostly rectangles",
            rows,
            [2 * x.rectangles > x.masks for x in classes],
            lambda k: f"{classes[k].name!r}, a class with {classes[k].masks} masks, "
            f"{classes[k].rectangles} of them the box itself",
        )
        if is_seen is None or columns["crowd"].all():
            return
        if not any(x.masks for x in classes if x.is_seen):
            self.add_to_file("no seen mask", "classes without any mask")
            return
        self.add(
            "seen without mask",
            rows,
            [x.is_seen and not x.masks for x in classes],
            lambda k: f"{classes[k].name!r}, a class with {classes[k].num_objects} objects and no "
            "human mask",
        )
