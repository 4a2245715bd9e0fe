"""Masks taken out of COCO jsons: those of unseen classes, or a random share."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection
from fractions import Fraction

from .coco_masks import has_mask, is_from_model

__all__ = ["hide_masks", "strip_masks", "unknown_fields"]

# What COCO has; anything else may hold masks, too.
_KNOWN = {
    "the file": {"info", "licenses", "images", "annotations", "categories", "type"},
    "images": {"id", "width", "height", "file_name", "license", "flickr_url", "coco_url"}
    | {"date_captured"},
    "annotations of unseen classes": {"id", "image_id", "category_id", "bbox", "iscrowd", "area"}
    | {"ignore", "keypoints", "num_keypoints", "segmentation", "mask_source"},
}


def strip_masks(
    annotations: list[dict], unseen: Collection[int], keep_model_masks: bool = False
) -> tuple[Counter, Counter]:
    """
    Take the masks of unseen classes out of a list of COCO annotations, in place.

    Args:
        annotations: without errors.
        unseen: category ids.
        keep_model_masks: keep those with "mask_source" "model", of objects that are not crowds.

    Returns:
        The masks there were and those removed of them, {category id: number}.
    """
    num_masks, num_removed = Counter(), Counter()
    for annotation in annotations:
        category_id = annotation["category_id"]
        num_masks[category_id] += has_mask(annotation)
        if category_id not in unseen:
            continue
        is_kept = keep_model_masks and is_from_model(annotation) and not annotation.get("iscrowd")
        _use_area_of_box(annotation)
        if not is_kept:
            num_removed[category_id] += has_mask(annotation)
            annotation.pop("segmentation", None)
            annotation.pop("mask_source", None)
    return num_masks, num_removed


def hide_masks(
    annotations: list[dict],
    classes: Collection[int],
    keep: Fraction | float,
    at_least: int = 0,
    seed: int = 0,
) -> tuple[Counter, Counter]:
    """
    Take the masks of a random share of the objects out of a list of COCO annotations, in place.

    What is kept of a smaller share is kept of a larger one, too, and does not depend on the order
    of the annotations. Crowds and masks of models stay and do not count.

    Args:
        annotations: without errors.
        classes: category ids whose masks may go.
        keep: share of the masks of each class that stays, in [0, 1]; halves are rounded up.
        at_least: how many masks of a class stay whatever the share is, if it has so many.
        seed: of the choice.

    Returns:
        The human masks there were, without crowds, and those kept of them, {category id: number}.
    """
    with_mask = defaultdict(list)
    for row, annotation in enumerate(annotations):
        is_counted = not annotation.get("iscrowd") and not is_from_model(annotation)
        if is_counted and has_mask(annotation):
            # Without an id its row tells an object from the others.
            key = annotation.get("id", f"row {row}")
            with_mask[annotation["category_id"]].append((key, annotation))
    num_masks = Counter({k: len(rows) for k, rows in with_mask.items()})
    num_kept = Counter(num_masks)
    for category_id in with_mask.keys() & set(classes):

        def draw(row: tuple, category_id: int = category_id) -> bytes:
            # A number drawn for an object whose place in the file does not matter.
            return hashlib.sha256(f"{seed} {category_id} {row[0]}".encode()).digest()

        rows = sorted(with_mask[category_id], key=draw)
        share = math.floor(len(rows) * keep + Fraction(1, 2))
        num_kept[category_id] = min(len(rows), max(at_least, share))
        for _, annotation in rows[num_kept[category_id] :]:
            del annotation["segmentation"]
            _use_area_of_box(annotation)
    return num_masks, num_kept


def _use_area_of_box(annotation: dict) -> None:
    # COCO's is counted in the mask, and with the box would tell how much of it the object fills.
    if "area" in annotation:
        width, height = annotation["bbox"][2:]
        annotation["area"] = width * height


def unknown_fields(coco: dict, unseen: Collection[int]) -> dict[str, list[str]]:
    """
    Name the fields that COCO does not have, for they may hold masks, too.

    Args:
        coco: the content of a COCO json without errors.
        unseen: category ids of the annotations that are looked at.

    Returns:
        {place in the file: fields, sorted}; places without are absent.
    """
    unseen_rows = [x for x in coco["annotations"] if x["category_id"] in unseen]
    found = {where: set() for where in _KNOWN}
    for where, rows in zip(_KNOWN, ([coco], coco["images"], unseen_rows)):
        for row in rows:
            found[where] |= row.keys() - _KNOWN[where]
    return {where: sorted(names) for where, names in found.items() if names}
