"""
What the entries of a COCO json must be for this program, and what an annotation is for it.

The rules are those of ``teacher_student_mask.checks``, as far as they decide which objects are to
be given a mask, and whether they can be. Other faults are copied with what has them:
tools/check_annotations.py names those.
"""

from __future__ import annotations

from typing import NamedTuple

from teacher_student_mask.checks.mask_measures import MAX_PIXELS, has_mask, is_whole, to_floats
from teacher_student_mask.checks.mask_sources import HUMAN, MODEL, has_known_source, is_from_model
from teacher_student_mask.checks.object_checks import MAX_PIXELS_OUTSIDE

__all__ = [
    "CROWD",
    "HUMAN_MASK",
    "KINDS",
    "MADE_MEMBERS",
    "MODEL_MASK",
    "TARGET",
    "Problem",
    "kind_of",
    "may_be_far",
    "may_repeat_members",
    "problem_of_annotation",
    "problem_of_category",
    "problem_of_distance",
    "problem_of_image",
    "problem_of_target",
]

# What an annotation is for this program. TARGET is to be given a mask.
CROWD, HUMAN_MASK, MODEL_MASK, TARGET = range(4)
KINDS = ("crowd", "human mask", "model mask", "to be given a mask")

# What an object that is given a mask gets, always or sometimes.
MADE_MEMBERS = ("segmentation", "area", "score", "mask_source", "teacher_student_agreement")
MADE_MEMBERS += ("mask_fallback",)
_MADE_KEYS = [f'"{name}"'.encode("ascii") for name in MADE_MEMBERS]


class Problem(NamedTuple):
    """
    Attributes:
        field: of the entry.
        allowed: what it may be, as text.
        value: what it is, as text; None: as the entry has it.
    """

    field: str
    allowed: str
    value: str | None = None


def problem_of_category(category: dict) -> Problem | None:
    """The first rule that a category breaks; None if all is well."""
    if not is_whole(category.get("id")):
        return Problem("id", "a whole number")
    name = category.get("name")
    if type(name) is not str or not name.strip():
        return Problem("name", "the name of the class")
    return None


def problem_of_image(image: dict) -> Problem | None:
    """As :func:`problem_of_category`, of an image."""
    if not is_whole(image.get("id")):
        return Problem("id", "a whole number")
    for name in ("height", "width"):
        value = image.get(name)
        if not is_whole(value) or not 0 < value < MAX_PIXELS:
            return Problem(name, f"a whole number of pixels from 1 to {MAX_PIXELS - 1}")
    height, width = int(image["height"]), int(image["width"])
    if height * width >= MAX_PIXELS:
        allowed = f"fewer than {MAX_PIXELS} pixels"
        return Problem("height x width", allowed, f"{height} x {width}")
    if type(image.get("file_name")) is not str or not image["file_name"]:
        return Problem("file_name", "a path below --image-root")
    return None


def problem_of_annotation(annotation: dict) -> Problem | None:
    """As :func:`problem_of_category`, of an annotation of any kind."""
    for name in ("image_id", "category_id"):
        if not is_whole(annotation.get(name)):
            return Problem(name, "a whole number")
    crowd = annotation.get("iscrowd", 0)
    if type(crowd) not in (int, bool, float) or crowd not in (0, 1):
        return Problem("iscrowd", "0 or 1")
    if not has_known_source(annotation):
        allowed = f"{HUMAN!r} (as without the key), or {MODEL!r} for a mask that a model made"
        return Problem("mask_source", allowed)
    if not crowd and not _is_segmentation(annotation.get("segmentation")):
        return Problem(
            "segmentation",
            "a list of polygons [[x, y, x, y, x, y, ...], ...], an RLE with 'size' and 'counts', "
            "or null for an object without a mask",
        )
    return None


def _is_segmentation(value: object) -> bool:
    # Whether it says if there is a mask. That of an RLE without runs would be taken for none.
    if isinstance(value, dict):
        counts = value.get("counts")
        return "size" in value and type(counts) in (str, list) and bool(counts)
    if isinstance(value, list):
        return set(map(type, value)) <= {list}
    return value is None


def kind_of(annotation: dict, redo_model_masks: bool) -> int:
    """
    Args:
        annotation: one without a problem.
        redo_model_masks: whether one with a mask that a model made is a target.

    Returns:
        An index of ``KINDS``.
    """
    if annotation.get("iscrowd", 0):
        return CROWD
    if not has_mask(annotation):
        return TARGET
    if is_from_model(annotation):
        return TARGET if redo_model_masks else MODEL_MASK
    return HUMAN_MASK


def problem_of_target(annotation: dict) -> Problem | None:
    """As :func:`problem_of_category`, of what an object that is to be given a mask needs."""
    box = annotation.get("bbox")
    values = to_floats(box) if type(box) is list and len(box) == 4 else None
    if values is None:
        return Problem("bbox", "four finite numbers [x, y, width, height]")
    if min(box[2:]) < 0:
        return Problem("bbox", "[x, y, width, height] with width and height not negative")
    return None


def may_repeat_members(raw: bytes) -> bool:
    """Whether it is worth looking if a target, by its text, has one of MADE_MEMBERS twice."""
    # A key may be written with escapes.
    return b"\\" in raw or any(raw.count(key) > 1 for key in _MADE_KEYS)


def may_be_far(box: list) -> bool:
    """Whether :func:`problem_of_distance` has to be asked of the box of a target."""
    return min(box[:2]) < -MAX_PIXELS_OUTSIDE or max(_high(box)) > MAX_PIXELS_OUTSIDE


def problem_of_distance(box: list, image: dict) -> Problem | None:
    """
    As :func:`problem_of_category`, of how far the box of a target reaches out of its image.

    Args:
        box: [x, y, width, height] of a target without another problem.
        image: of the json, without a problem.
    """
    limits = (image["width"] + MAX_PIXELS_OUTSIDE, image["height"] + MAX_PIXELS_OUTSIDE)
    is_far = any(value > limit for value, limit in zip(_high(box), limits))
    if min(box[:2]) < -MAX_PIXELS_OUTSIDE or is_far:
        return Problem("bbox", f"pixels, at most {MAX_PIXELS_OUTSIDE} outside the image")
    return None


def _high(box: list) -> tuple[float, float]:
    return float(box[0]) + float(box[2]), float(box[1]) + float(box[3])
