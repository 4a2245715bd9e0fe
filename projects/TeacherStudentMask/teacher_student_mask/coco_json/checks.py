"""
COCO jsons: read, and checked for training or for evaluation, with the files of their images.

Types are checked by msgspec; what types cannot say is looked for in numpy, and ``report.RULES``
says what each problem means.
"""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from ..class_splits import AUTO, choose_seen_classes, resolve_seen_classes
from ..errors import InputError
from .files import check_files, paused_gc, read_json
from .masks import (
    BOX_TOLERANCE,
    MAX_PIXELS,
    MODEL,
    MaskState,
    MeasuredMasks,
    is_from_model,
    measure_masks,
)
from .report import (
    AnnotationRow,
    CategoryRow,
    ClassCounts,
    EvaluatedAnnotationRow,
    ImageRow,
    Report,
    TrainingImageRow,
    shorten,
)

__all__ = ["check_coco", "check_types", "classes_of", "read_coco"]

# Detectron2's filter_empty_instances: boxes with a side up to this are empty.
_EMPTY_SIDE = 1e-5
# Beyond this, matching objects with anchors needs much memory.
_MANY_OBJECTS = 1000
# Share of a class, of two crowds or more, from which on they may be no crowds.
_SHARE_OF_CROWDS = 0.25
# Rows whose types are checked at a time, so that the checked copies fill no memory.
_CHUNK_ROWS = 2**14
# Boxes and the extents of their masks, a pixel of tolerance aside, that cannot be of one object.
_MIN_BOX_IOU, _MAX_SHARE_OUTSIDE = 0.5, 0.3
# IoU of what fits when it is read in another way, and how much better that has to be.
_GOOD_IOU, _GAIN = 0.9, 0.05
# Share of boxes that leave their image, from which on those of objects without masks may be XYXY.
_SHARE_REACHING_OUT = 0.1


def read_coco(path: str | os.PathLike) -> dict:
    """
    Read a COCO json whose values have the types that COCO gives them, masks aside.

    Raises:
        InputError: the file cannot be read, or a value is of another type; names file and id.
    """
    data, report = read_json(path), Report(os.fspath(path))
    _has_types(report, data, ImageRow, AnnotationRow)
    for finding in report.errors:
        if finding.rule != "no objects":
            raise InputError(str(finding))
    return data


def classes_of(coco: dict) -> dict:
    """
    Args:
        coco: the content of a COCO json without errors.

    Returns:
        The metadata that Detectron2's ``load_coco_json`` sets: "thing_classes", names in the order
        of the category ids, and "thing_dataset_id_to_contiguous_id".
    """
    categories = sorted(coco["categories"], key=lambda category: category["id"])
    return {
        "thing_classes": [category["name"] for category in categories],
        "thing_dataset_id_to_contiguous_id": {x["id"]: i for i, x in enumerate(categories)},
    }


def check_coco(
    json_file: str | os.PathLike,
    *,
    data: object = None,
    image_root: str | os.PathLike | None = None,
    seen_classes: str | None = None,
    num_classes: int | None = None,
    use: str = "training",
    reads_masks: bool = True,
    min_masks_per_class: int = 10,
    check_images: bool = False,
) -> Report:
    """
    Check a COCO json that may have masks on any part of its objects.

    Nothing that a file holds raises an exception. Values of other types are reported alone, as all
    else builds on them. Masks that training does not read, of crowds and unseen classes, make
    warnings where others make errors, unless they are in a form that is not COCO's. Evaluation
    takes the masks of all objects, and needs ids and areas; no "annotations" are no problem for it.

    Args:
        data: the content of ``json_file`` where it has been read already; not changed.
        image_root: folder of the images; None: do not look whether they are there.
        seen_classes: in the form of ``DATASETS.SEEN_CLASSES``, "auto" included; None: all masks are
            read.
        num_classes: of the model, ``MODEL.ROI_HEADS.NUM_CLASSES``; None: any number will do.
        use: "training" or "evaluation".
        reads_masks: whether training or evaluation needs the masks.
        min_masks_per_class: masks a class needs to be chosen by ``seen_classes`` "auto".
        check_images: read every image of ``image_root`` to its end.
    """
    report = Report(os.fspath(json_file), use)
    if data is None:
        try:
            data = read_json(json_file)
        except InputError as error:
            report.add_to_file("content", f"unreadable ({error})")
            return report
    types = TrainingImageRow, AnnotationRow
    if use == "evaluation":
        types = ImageRow, EvaluatedAnnotationRow
        if isinstance(data, dict):
            data = {"annotations": [], **data}
    with paused_gc():
        if _has_types(report, data, *types):
            images = data["images"]
            report.num_images, report.num_annotations = len(images), len(data["annotations"])
            sizes = np.array([(x["height"], x["width"]) for x in images], dtype=np.float64)
            _check_images_and_categories(report, data, sizes, num_classes)
            if image_root is not None:
                check_files(report, images, image_root, sizes, check_images)
            if not any("twice" in x.rule for x in report.errors):
                _check_annotations(
                    report, data, sizes, seen_classes, reads_masks, min_masks_per_class
                )
    report.findings.sort(key=lambda finding: finding.severity != "error")  # errors first
    return report


def _has_types(report: Report, data: object, image_type: type, annotation_type: type) -> bool:
    # Whether the checks can go on.
    if not isinstance(data, dict):
        report.add_to_file("content", f"a {type(data).__name__}")
        return False
    for key, unit, row_type in (
        ("images", "image", image_type),
        ("annotations", "annotation", annotation_type),
        ("categories", "category", CategoryRow),
    ):
        rows = data.get(key)
        if type(rows) is not list or not set(map(type, rows)) <= {dict}:
            report.add_to_file(key, shorten(rows) if key in data else "missing")
            return False
        if not rows:
            report.add_to_file("no objects" if key == "annotations" else key, "empty")
        check_types(report, rows, unit, row_type)
    # Training does without ids of annotations.
    return {x.rule for x in report.errors} <= {"no objects", "annotation.id"}


def check_types(report: Report, rows: list[dict], unit: str, row_type: type) -> None:
    """
    Add a finding for each field that has values of another type than the TypedDict allows.

    Args:
        unit: of the report's rules.
    """
    bad_rows: dict[str, list[int]] = {}
    for start in range(0, len(rows), _CHUNK_ROWS):
        with contextlib.suppress(msgspec.ValidationError, UnicodeEncodeError):
            msgspec.convert(rows[start : start + _CHUNK_ROWS], list[row_type])
            continue
        for i, row in enumerate(rows[start : start + _CHUNK_ROWS], start):
            known = {k: x for k, x in row.items() if k in row_type.__annotations__}
            try:
                msgspec.convert(known, row_type)
                continue
            except msgspec.ValidationError as error:
                # "... - at `$.bbox[3]`", or "Object missing required field `bbox`"
                found = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
                field = found[1] or found[2]
            except UnicodeEncodeError:  # half a surrogate pair
                field = next(k for k, x in known.items() if "\\ud" in ascii(x))
            bad_rows.setdefault(field, []).append(i)
    for field, indices in bad_rows.items():
        report.add(f"{unit}.{field}", rows, np.isin(np.arange(len(rows)), indices))


def _repeated(values: Iterable) -> np.ndarray:
    # Which values others have, too. None: not compared.
    values = list(values)
    counts = Counter(values)
    return np.array([x is not None and counts[x] > 1 for x in values], dtype=bool)


def _check_images_and_categories(
    report: Report, data: dict, sizes: np.ndarray, num_classes: int | None
) -> None:
    images, categories = data["images"], data["categories"]
    is_large = sizes.prod(axis=1) >= MAX_PIXELS
    report.add("large image", images, is_large, lambda i: "{:.0f} x {:.0f}".format(*sizes[i]))
    report.add("image id twice", images, _repeated(x["id"] for x in images))
    if report.use == "training":
        report.add("file twice", images, _repeated(x["file_name"] for x in images))
    report.add("category id twice", categories, _repeated(x["id"] for x in categories))
    is_repeated = _repeated(x["name"] for x in categories)
    report.add("category name twice", categories, is_repeated)
    is_similar = _repeated("".join(x["name"].split()).casefold() for x in categories)
    report.add("similar names", categories, is_similar & ~is_repeated)
    if num_classes is not None and len(categories) != num_classes:
        remedy = f"the model has {num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES {len(categories)}"
        report.add_to_file("number of classes", f"{len(categories)} classes", remedy)


def _check_annotations(
    report: Report,
    data: dict,
    sizes: np.ndarray,
    seen_classes: str | None,
    reads_masks: bool,
    min_masks: int,
) -> None:
    rows, images = data["annotations"], data["images"]
    # By their ids, as the model's classes are.
    categories = sorted(data["categories"], key=lambda x: x["id"])

    def find(rule: str, is_bad: Sequence[bool], *rest) -> None:
        report.add(rule, rows, is_bad, *rest)

    row_of_image = {x["id"]: i for i, x in enumerate(images)}
    class_of = {x["id"]: k for k, x in enumerate(categories)}
    image = np.array([row_of_image.get(x["image_id"], -1) for x in rows], dtype=int)
    category = np.array([class_of.get(x["category_id"], -1) for x in rows], dtype=int)
    find("unknown image", image < 0)
    find("annotation.category_id", category < 0)
    ids = [x.get("id") for x in rows]
    find("annotation without id", [x is None for x in ids])
    find("annotation id twice", _repeated(x if type(x) in (int, float, str) else None for x in ids))

    is_known = (image >= 0) & (category >= 0)
    rows = [x for x, known in zip(rows, is_known) if known]
    image, category = image[is_known], category[is_known]
    boxes = np.array([x["bbox"] for x in rows], dtype=np.float64).reshape(-1, 4)
    is_crowd = np.array([bool(x.get("iscrowd", 0)) for x in rows], dtype=bool)
    is_model = np.array([is_from_model(x) for x in rows], dtype=bool)
    segmentations = [x.get("segmentation") for x in rows]
    masks = measure_masks(segmentations, sizes[image], boxes)
    is_mask = masks.state == MaskState.MASK
    _check_boxes(find, boxes, sizes[image], masks, is_crowd)
    objects = np.column_stack([image, category, boxes.round(1)])
    # Equal objects stand beside one another, in the order of the file.
    order = np.lexsort(objects.T)
    order = order[~is_crowd[order]]
    is_twice = np.zeros(len(rows), dtype=bool)
    is_twice[order[1:]] = (objects[order[1:]] == objects[order[:-1]]).all(axis=1)
    find("object twice", is_twice)
    is_turned = np.array([_is_turned(x) for x in rows], dtype=bool)
    find("rotated box", is_turned & ~(is_mask & ~masks.is_rectangle))

    is_read = np.full(len(rows), reads_masks)
    if report.use == "evaluation":
        if reads_masks:
            _check_masks(find, masks, is_read, True)
            is_lacking = np.isin(masks.state, (MaskState.NONE, MaskState.TOO_SHORT))
            if not is_lacking.all():
                find("no mask", is_lacking)
            num = f"{MODEL!r} (of {len(rows)} objects {(is_model & ~is_lacking).sum()})"
            find("mask of a model", is_model & ~is_lacking, lambda i: num)
        return

    is_human = is_mask & ~is_crowd & ~is_model
    is_models, has_box_only = is_mask & ~is_crowd & is_model, ~is_mask & ~is_crowd
    kinds = (is_human, is_models, has_box_only, is_crowd, masks.is_rectangle & is_human)
    counts = np.array([np.bincount(category[x], minlength=len(categories)) for x in kinds])
    names = [x["name"] for x in categories]
    is_seen = _resolve_seen(report, dict(zip(names, counts[0].tolist())), seen_classes, min_masks)
    # Crowds are left out, and unseen classes lose their masks, unless a model made them.
    if is_seen is not None:
        is_read &= (is_seen[category] | is_model) & ~is_crowd
    _check_masks(find, masks, is_read, reads_masks)
    seen = [None] * len(names) if is_seen is None else is_seen.tolist()
    report.classes = [ClassCounts(*x) for x in zip(names, class_of, seen, *counts.tolist())]
    _check_classes(report, categories, is_seen, counts)
    if rows and is_crowd.all():
        report.add_to_file("no objects", "nothing but crowds")
    num_objects = np.bincount(image[~is_crowd], minlength=len(images))
    is_many = num_objects > _MANY_OBJECTS
    report.add("many objects", images, is_many, lambda i: f"a list of {num_objects[i]} objects")


def _is_turned(annotation: dict) -> bool:
    # CVAT's angle of a box, in degrees.
    attributes = annotation.get("attributes")
    angle = attributes.get("rotation") if type(attributes) is dict else None
    return type(angle) in (int, float) and angle % 360 != 0


def _check_boxes(
    find: Callable, boxes: np.ndarray, sizes: np.ndarray, masks: MeasuredMasks, is_crowd: np.ndarray
) -> None:
    # With their images, and with the extents of their masks.
    limits, low, sides = sizes[:, ::-1], boxes[:, :2], boxes[:, 2:]
    high = low + sides
    corners = np.concatenate([low, high], axis=1)
    # In 32 bits, as Detectron2 computes them.
    inside = np.minimum(high.astype(np.float32), limits) - np.maximum(low.astype(np.float32), 0)
    is_sound = (inside > _EMPTY_SIDE).all(axis=1)
    find("empty box", ~is_sound)
    reach = np.maximum(-low, high - limits).max(axis=1)
    reaches_out = is_sound & (reach > BOX_TOLERANCE)
    is_small = is_sound & (sides < 1).all(axis=1)
    # All of them, those that fill their image included.
    if is_sound.all() and (low >= 0).all() and (high <= 1.01).all():
        is_small[:] = True
    find("small box", is_small)

    iou, share_inside = _overlaps(corners, masks.extents, limits)
    iou_as_xyxy, _ = _overlaps(boxes, masks.extents, limits)
    is_compared = is_sound & ~is_crowd & ~is_small & ~np.isnan(iou)
    others = is_sound & ~is_crowd & ~is_small & np.isnan(iou)
    is_xyxy = is_compared & (iou_as_xyxy >= _GOOD_IOU) & (iou_as_xyxy > iou + _GAIN)
    # Without masks: all of them would do as corners, and some leave their image as they are.
    may_be_xyxy = (sides > low) & (low >= -BOX_TOLERANCE) & (sides <= limits + BOX_TOLERANCE)
    if is_compared.any():
        is_likely = 2 * is_xyxy.sum() > is_compared.sum()
    else:
        is_likely = (reaches_out & others).sum() > max(1, _SHARE_REACHING_OUT * others.sum())
    if is_likely and may_be_xyxy[others].all():
        is_xyxy |= others
    find("XYXY box", is_xyxy)
    find("box reaches out", reaches_out & ~is_xyxy)
    is_beside = (iou < _MIN_BOX_IOU) | (share_inside < 1 - _MAX_SHARE_OUTSIDE)
    find("box beside its mask", is_beside & is_compared & ~is_xyxy)


def _overlaps(
    corners: np.ndarray, extents: np.ndarray, limits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    # The IoU, and the share of the extents inside; both are cut to the image, and half a pixel
    # larger on each side, as exports round. nan where there are no extents.
    low, high = np.maximum(corners[:, :2], 0), np.minimum(corners[:, 2:], limits)
    mask_low, mask_high = np.maximum(extents[:, :2], 0), np.minimum(extents[:, 2:], limits)
    both = np.minimum(high, mask_high) - np.maximum(low, mask_low) + BOX_TOLERANCE
    both = np.maximum(both, 0).prod(axis=1)
    of_box = np.maximum(high - low + BOX_TOLERANCE, 0).prod(axis=1)
    of_mask = (mask_high - mask_low + BOX_TOLERANCE).prod(axis=1)
    return both / (of_box + of_mask - both), both / of_mask


def _check_masks(
    find: Callable, masks: MeasuredMasks, is_read: np.ndarray, reads_masks: bool
) -> None:
    # Of unseen classes and crowds, too: what a human drew is not to be taken for no mask, and lost.
    state = masks.state
    is_unread_form = (state == MaskState.NOT_A_MASK) & reads_masks
    find("not a mask", is_unread_form)
    find("broken RLE", (state == MaskState.BROKEN_RLE) & is_read)
    find("unread mask", (state >= MaskState.NOT_A_MASK) & ~is_read & ~is_unread_form)
    find("empty mask", (state == MaskState.TOO_SHORT) | (state == MaskState.EMPTY))
    find("short part", masks.has_short_part)
    find("crossing edges", masks.is_crossing)


def _resolve_seen(
    report: Report, num_masks: dict[str, int], spec: str | None, min_masks: int
) -> np.ndarray | None:
    # Bool of shape (number of classes,); None where all masks are to be taken for read.
    names = list(num_masks)
    try:
        if spec == AUTO:
            return np.isin(names, choose_seen_classes(num_masks, min_masks))
        if spec is not None:
            return np.isin(np.arange(len(names)), resolve_seen_classes(spec, names))
    except (ValueError, OSError) as error:
        report.add_to_file("seen classes", repr(spec), str(error).rstrip("."))
    return None


def _check_classes(
    report: Report, categories: list[dict], is_seen: np.ndarray | None, counts: np.ndarray
) -> None:
    # counts: the last columns of ClassCounts.
    masks, model_masks, boxes_only, crowds, rectangles = counts
    objects = masks + model_masks + boxes_only

    def find(rule: str, is_bad: np.ndarray, describe: Callable[[int], str]) -> None:
        report.add(
            rule,
            categories,
            is_bad,
            lambda k: f"{categories[k]['name']!r}, a class with {describe(k)}",
        )

    # By their name, but for those that are their own.
    parents = [x.get("supercategory") for x in categories if x.get("supercategory") != x["name"]]
    is_parent = np.array([x["name"] in parents for x in categories])
    if (objects + crowds).any():
        find("root category", is_parent & (objects + crowds == 0), lambda k: "no objects")
    find(
        "many crowds",
        (crowds > 1) & (crowds >= _SHARE_OF_CROWDS * (crowds + objects)),
        lambda k: f"{crowds[k]} of {crowds[k] + objects[k]} objects marked as crowds",
    )
    find(
        "mostly rectangles",
        2 * rectangles > masks,
        lambda k: f"{masks[k]} masks, {rectangles[k]} of them the box itself",
    )
    if is_seen is not None and objects.any():
        if masks[is_seen].any():
            is_bad = is_seen & (masks == 0) & (objects > 0)
            find("seen without mask", is_bad, lambda k: f"{objects[k]} objects and no human mask")
        else:
            report.add_to_file("no seen mask", "classes without any mask")
