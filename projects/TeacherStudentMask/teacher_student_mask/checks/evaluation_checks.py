"""What of the checks stops an evaluation, which reads other parts of a file than training."""

from __future__ import annotations

import os

from .annotation_checks import check_annotations
from .annotation_report import AnnotationReport, Finding
from .mask_measures import has_mask, to_floats
from .mask_sources import MODEL, is_from_model

__all__ = ["check_for_evaluation", "is_known_by_box_only"]


def check_for_evaluation(
    json_file: str,
    data: object = None,
    reads_masks: bool = True,
    image_root: str | os.PathLike | None = None,
    num_classes: int | None = None,
) -> AnnotationReport:
    """
    Check a COCO json as ground truth of COCO's AP.

    Unlike training, it takes the masks of all objects, and needs ids, and "area". What is left out
    by COCO's evaluation makes a warning: objects of images that are not listed. Masks that a model
    made are no ground truth of masks.

    Args:
        json_file: what messages name.
        data: what it holds, if it has been read already; not changed. Without "annotations" there
            is nothing to evaluate, and nothing of it is checked.
        reads_masks: whether masks are evaluated. A file in which no object has one is no finding.
        image_root, num_classes: of :func:`check_annotations`; without a folder nothing is said of
            the names of files.
    """
    if isinstance(data, dict) and "annotations" not in data:
        return AnnotationReport(json_file)
    report = check_annotations(json_file, image_root, num_classes=num_classes, data=data)
    if data is not None and report.num_annotations:
        _check_areas(report, data["annotations"])
        if reads_masks:
            _check_all_have_masks(report, data["annotations"])
            _check_no_mask_is_from_model(report, data["annotations"])
    return report.judged(lambda finding: _judge(finding, reads_masks, image_root is not None))


def is_known_by_box_only(annotation: dict) -> bool:
    """Whether the "segmentation" is missing or empty; False where it is no mask of any kind."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and not all(isinstance(x, list) for x in segmentation):
        return False
    return isinstance(segmentation, (dict, list, type(None))) and not has_mask(annotation)


def _check_areas(report: AnnotationReport, rows: list[dict]) -> None:
    areas = [x.get("area") for x in rows]
    if to_floats(areas) is None or min(areas) < 0:
        is_bad = [to_floats([x]) is None or x < 0 for x in areas]
        remedy = "allowed: a finite number of pixels, not negative"
        report.add("error", "annotation", rows, is_bad, "area", remedy)


def _check_all_have_masks(report: AnnotationReport, rows: list[dict]) -> None:
    is_lacking = [is_known_by_box_only(x) for x in rows]
    if not all(is_lacking):
        remedy = (
            "mask AP needs a mask on every object, of unseen classes too; evaluate on annotations "
            "that have them, or boxes alone with tasks=('bbox',)"
        )
        report.add("error", "annotation", rows, is_lacking, "segmentation", remedy)


def _check_no_mask_is_from_model(report: AnnotationReport, rows: list[dict]) -> None:
    is_model = [is_from_model(x) and not is_known_by_box_only(x) for x in rows]
    remedy = (
        f"of {len(rows)} objects {sum(is_model)} have a mask that a model made, which is no ground "
        "truth; evaluate on human masks, or boxes alone with tasks=('bbox',); a mask that a human "
        "has checked and corrected has 'mask_source' 'human'"
    )
    report.add("error", "annotation", rows, is_model, "mask_source", remedy, lambda i: repr(MODEL))


def _judge(finding: Finding, reads_masks: bool, needs_files: bool) -> Finding | None:
    where = (finding.unit, finding.field)
    if where == ("annotation", "id"):
        return finding.as_error()
    # Objects may be left out, and there may be none.
    if finding.severity == "warning" or where == ("", "annotations") and finding.is_about_none:
        return None
    if where == ("image", "file_name") and not needs_files:
        return None
    if finding.field in ("segmentation", "mask_source") and not reads_masks:
        return None
    if where == ("annotation", "image_id"):
        return finding.as_warning("COCO's evaluation leaves the object out")
    return finding
