"""The counts of the classes of a COCO json, and what is odd about them."""

from __future__ import annotations

import numpy as np

from .annotation_report import NO_MASK, ONLY_CROWDS, AnnotationReport, ClassCounts

__all__ = ["count_classes"]


def count_classes(
    report: AnnotationReport,
    category: np.ndarray,
    names: dict[int, str],
    is_seen: np.ndarray | None,
    columns: dict[str, np.ndarray],
    dropped: dict[str, np.ndarray],
    dropped_masks: dict[str, np.ndarray],
) -> None:
    """
    Add the counts of the classes to a report, and findings about classes without human masks.

    Args:
        report: changed in place.
        category: position of each annotation's class in ``names``, -1 where it is unknown; int64,
            shape (n,), as all arrays of annotations.
        names: {category id: name}.
        is_seen: bool, shape (number of classes,); None where the seen classes were not given.
        columns: {number of :class:`ClassCounts`: what it counts}, bool.
        dropped: {why training leaves an object out: which}, bool.
        dropped_masks: {why training takes an object as one without a mask: which}, bool.
    """

    def count(is_counted: np.ndarray) -> np.ndarray:
        # The unknown class -1 comes first, and is no row.
        return np.bincount(category[is_counted] + 1, minlength=len(names) + 1)[1:]

    counts = {name: count(x) for name, x in columns.items()}
    left_out = {
        "dropped": {reason: count(x) for reason, x in dropped.items()},
        "dropped_masks": {reason: count(x) for reason, x in dropped_masks.items()},
    }
    for k, (category_id, name) in enumerate(names.items()):
        seen = None if is_seen is None else bool(is_seen[k])
        numbers = {column: int(x[k]) for column, x in counts.items()}
        reasons = {
            what: {reason: int(x[k]) for reason, x in of_reason.items() if x[k]}
            for what, of_reason in left_out.items()
        }
        report.classes.append(ClassCounts(name, category_id, seen, **numbers, **reasons))
    if columns["crowd"].all():
        if len(category):
            allowed = "allowed: at least one object with 'iscrowd' 0"
            report.add_to_file("error", "annotations", ONLY_CROWDS, allowed)
        return
    _check_classes(report, names, is_seen, counts)


def _check_classes(
    report: AnnotationReport,
    names: dict[int, str],
    is_seen: np.ndarray | None,
    counts: dict[str, np.ndarray],
) -> None:
    categories = [{"id": i} for i in names]
    describe = [f"{name!r}, a class with" for name in names.values()].__getitem__
    masks, rectangles = counts["masks"], counts["rectangles"]
    report.add(
        "warning",
        "category",
        categories,
        2 * rectangles > masks,
        "name",
        "rectangles teach nothing about shapes; give null where only the box is known",
        lambda k: f"{describe(k)} {masks[k]} masks, {rectangles[k]} of them the box itself",
    )
    if is_seen is None:
        return
    is_without = is_seen & (masks == 0)
    if is_without.sum() == is_seen.sum():
        remedy = "allowed: at least one class with masks, as nothing else teaches them"
        if counts["model_masks"].any():
            remedy += "; masks with 'mask_source' 'model' do not count, no teacher learns from them"
        report.add_to_file("error", "seen_classes", NO_MASK, remedy)
        return
    report.add(
        "warning",
        "category",
        categories,
        is_without,
        "name",
        "a seen class without a mask is trained as an unseen one; take it out of the list",
        lambda k: f"{describe(k)} {counts['boxes_only'][k] + counts['model_masks'][k]} objects "
        f"and no {'human ' if counts['model_masks'][k] else ''}mask",
    )
