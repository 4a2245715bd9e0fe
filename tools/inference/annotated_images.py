"""The images of a COCO json and their objects, any of which may lack a mask, for looking at."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from pycocotools.coco import COCO

from inference.setup import UsageError
from teacher_student_mask.checks import AnnotationReport, check_annotations
from teacher_student_mask.checks.mask_measures import has_mask, have_pixels, valid_polygons
from teacher_student_mask.checks.reading import read_json
from teacher_student_mask.class_splits import AUTO, resolve_seen_classes
from teacher_student_mask.data.seen_classes import ClassCount, choose_seen_classes
from teacher_student_mask.evaluation import compute_overlaps

__all__ = ["KINDS", "AnnotatedImages", "AnnotatedObject"]

# What is known of an object, from the training's point of view.
KINDS = {
    "human": "mask",
    "model": "mask made by a model",
    "unused": "mask that training does not read (unseen class)",
    "box": "box only",
    "crowd": "crowd: left out of training",
}


@dataclass(frozen=True)
class AnnotatedObject:
    """
    One annotation.

    Args:
        annotation_id: of the json, "-" where it has none.
        class_index: position of the class among those of the json, sorted by id.
        kind: key of KINDS.
        box: XYWH in pixels.
        polygons: of the mask, [x, y, x, y, ...] in pixels; empty where the json has none or an RLE.
        rle: the mask, compressed; None where there is none.
        overlap: O of Eq. (1), in [0, 1]; None of crowds, or where it was not asked for.
        is_lower_bound: the overlap may be larger: a box of another object without a mask reaches
            into this one's box, and what that object covers is not known.
    """

    annotation_id: object
    image_id: int
    class_index: int
    kind: str
    box: tuple[float, float, float, float]
    polygons: tuple[tuple[float, ...], ...] = field(repr=False)
    rle: dict | None = field(repr=False)
    overlap: float | None = None
    is_lower_bound: bool = False


class AnnotatedImages:
    """
    A COCO json that has been checked.

    Attributes:
        images: its entries, sorted by id.
        names: of the classes, sorted by id.
        seen: positions of the seen classes in ``names``.
        report: of the checks; without errors.
        annotations: of each image id.
    """

    def __init__(self, json_file: str, seen_classes: str | None = None, min_masks: int = 1) -> None:
        """
        Args:
            json_file: path of the json.
            seen_classes: as ``DATASETS.SEEN_CLASSES``, "auto" counts in this json; None: all
                masks are read.
            min_masks: of "auto", as ``DATASETS.MIN_MASKS_PER_CLASS``.

        Raises:
            UsageError: the file cannot be read, the checks find errors in it (the first one is
                named), or a seen class is none of its classes.
        """
        try:
            data = read_json(json_file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{json_file}: unreadable ({error}).") from error
        # Of all classes: masks that training does not read are shown, too.
        self.report = check_annotations(json_file, data=data)
        self.json_file = json_file
        _raise_on_errors(self.report)
        categories = sorted(data["categories"], key=lambda x: x["id"])
        self.names = [x["name"] for x in categories]
        self.seen = set(range(len(self.names)))
        self.images = sorted(data["images"], key=lambda x: x["id"])
        self._class_index = {x["id"]: k for k, x in enumerate(categories)}
        self._image = {x["id"]: x for x in self.images}
        self.annotations: dict[int, list[dict]] = defaultdict(list)
        for annotation in data["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)
        self._forget_empty_masks(data["annotations"])
        if seen_classes is not None:
            self.seen = self._resolve_seen(seen_classes, min_masks)

    def _forget_empty_masks(self, annotations: list[dict]) -> None:
        # As in training, an object whose mask covers nothing of the image is one without a mask.
        images = [self._image[x["image_id"]] for x in annotations]
        sizes = np.array([(x["height"], x["width"]) for x in images], dtype=float).reshape(-1, 2)
        is_mask = have_pixels([x.get("segmentation") for x in annotations], sizes)
        for annotation, covers in zip(annotations, is_mask.tolist()):
            if not covers:
                annotation.pop("segmentation", None)

    def _resolve_seen(self, seen_classes: str, min_masks: int) -> set[int]:
        try:
            if seen_classes != AUTO:
                return set(resolve_seen_classes(seen_classes, self.names))
            counts = [
                ClassCount(name, x.total() - x["crowd"], x["human"])
                for name, x in zip(self.names, self.count_kinds())
            ]
            chosen = choose_seen_classes(counts, min_masks)
        except (OSError, ValueError) as error:
            raise UsageError(f"--seen-classes {seen_classes}: {error}") from error
        return {k for k, name in enumerate(self.names) if name in chosen}

    def class_of(self, annotation: dict) -> int:
        """Position of an annotation's class in ``names``."""
        return self._class_index[annotation["category_id"]]

    def kind_of(self, annotation: dict) -> str:
        """The key of KINDS that holds for an annotation of the json."""
        if annotation.get("iscrowd", 0):
            return "crowd"
        if not has_mask(annotation):
            return "box"
        if annotation.get("mask_source") == "model":
            return "model"
        return "human" if self.class_of(annotation) in self.seen else "unused"

    def count_kinds(self) -> list[Counter]:
        """How many annotations of each kind the classes have."""
        counts = [Counter() for _ in self.names]
        for annotation in (x for rows in self.annotations.values() for x in rows):
            counts[self.class_of(annotation)][self.kind_of(annotation)] += 1
        return counts

    def objects_of(
        self, image_ids: Iterable[int], with_overlaps: bool = True
    ) -> dict[int, list[AnnotatedObject]]:
        """
        Args:
            image_ids: of the images, each once.
            with_overlaps: compute Eq. (1), too; objects without a mask cover nothing.

        Returns:
            For each image its objects, in the order of the json.
        """
        image_ids = list(image_ids)
        rows = [x for i in image_ids for x in self.annotations.get(i, [])]
        images = [{k: int(self._image[i][k]) for k in ("id", "height", "width")} for i in image_ids]
        # Annotations may lack an id, so that they are numbered anew.
        annotations = [{**x, "id": k} for k, x in enumerate(rows, start=1)]
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": []}
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        overlaps = compute_overlaps(coco) if with_overlaps else {}
        objects: dict[int, list[AnnotatedObject]] = {i: [] for i in image_ids}
        for k, row in enumerate(rows, start=1):
            neighbours = self.annotations[row["image_id"]] if k in overlaps else []
            polygons, rle = _mask_of(coco, coco.anns[k])
            objects[row["image_id"]].append(
                AnnotatedObject(
                    annotation_id=row.get("id", "-"),
                    image_id=row["image_id"],
                    class_index=self.class_of(row),
                    kind=self.kind_of(row),
                    box=tuple(float(x) for x in row["bbox"]),
                    polygons=polygons,
                    rle=rle,
                    overlap=overlaps.get(k),
                    is_lower_bound=_may_be_covered_more(row, neighbours),
                )
            )
        return objects


def _raise_on_errors(report: AnnotationReport) -> None:
    errors = report.errors
    if errors:
        more = len(errors) - 1
        others = f" And {more} more kinds of errors." if more else ""
        hint = " tools/check_annotations.py lists all that is wrong with a file."
        raise UsageError(f"{errors[0]}{others}{hint}")


def _mask_of(coco: COCO, annotation: dict) -> tuple[tuple, dict | None]:
    segmentation = annotation.get("segmentation")
    if not has_mask(annotation):
        return (), None
    polygons = ()
    if isinstance(segmentation, list):
        segmentation = valid_polygons(segmentation)
        polygons = tuple(tuple(x) for x in segmentation)
    return polygons, coco.annToRLE(
        {"image_id": annotation["image_id"], "segmentation": segmentation}
    )


def _may_be_covered_more(annotation: dict, neighbours: list[dict]) -> bool:
    # Masks lie in their boxes.
    x, y, w, h = annotation["bbox"]
    for other in neighbours:
        if other is annotation or other.get("iscrowd", 0) or has_mask(other):
            continue
        left, top, width, height = other["bbox"]
        if x < left + width and left < x + w and y < top + height and top < y + h:
            return True
    return False
