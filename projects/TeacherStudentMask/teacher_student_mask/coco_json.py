"""
COCO jsons: read, and checked for training or for evaluation.

Whatever reads a COCO json here, reads it with these functions. Types are checked by msgspec; what
types cannot say is looked for in numpy, and ``coco_rules.RULES`` says what each problem means.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta

from .class_splits import AUTO, resolve_seen_classes
from .coco_masks import (
    BOX_TOLERANCE,
    HUMAN,
    MAX_PIXELS,
    MAX_PIXELS_OUTSIDE,
    MODEL,
    MaskState,
    MeasuredMasks,
    has_mask,
    is_from_model,
    measure_masks,
    valid_polygons,
)
from .coco_rules import Report, shorten
from .errors import InputError
from .image_files import missing_files, read_image_files
from .json_files import decode_json, paused_gc, read_json, write_json

__all__ = [
    "HUMAN",
    "MIN_MASKS_PER_CLASS",
    "MODEL",
    "Box",
    "Report",
    "Whole",
    "check_coco",
    "check_types",
    "classes_of",
    "has_mask",
    "is_from_model",
    "read_coco",
    "read_json",
    "valid_polygons",
    "write_json",
]

# The default of DATASETS.MIN_MASKS_PER_CLASS.
MIN_MASKS_PER_CLASS = 10

# Detectron2's filter_empty_instances: boxes with a side up to this are empty.
_EMPTY_SIDE = 1e-5
# Beyond this, matching objects with anchors needs much memory.
_MANY_OBJECTS = 1000
# Rows whose types are checked at a time, so that the checked copies fill no memory.
_CHUNK_ROWS = 2**14

# A whole number of 64 bits, 1 or 1.0.
Whole = Annotated[float, Meta(multiple_of=1, ge=-(2.0**63), lt=2.0**63)]
_Pixels = Annotated[float, Meta(multiple_of=1, ge=1, lt=MAX_PIXELS)]
Box = Annotated[list[float], Meta(min_length=4, max_length=4)]


class _Image(TypedDict):
    id: Whole
    height: _Pixels
    width: _Pixels


class _Category(TypedDict):
    id: Whole
    name: Annotated[str, Meta(pattern=r"\S")]


class _Annotation(TypedDict):
    image_id: Whole
    category_id: Whole
    bbox: Box
    id: NotRequired[Whole | str]
    iscrowd: NotRequired[bool | Annotated[float, Meta(multiple_of=1, ge=0, le=1)]]
    mask_source: NotRequired[Literal["human", "model"]]
    keypoints: NotRequired[list[float] | None]


class _EvaluatedAnnotation(_Annotation):
    area: Annotated[float, Meta(ge=0, le=sys.float_info.max)]


def read_coco(path: str | os.PathLike) -> dict:
    """
    Read a COCO json whose values have the types that COCO gives them.

    Masks, and what types cannot say, are left to :func:`check_coco`. Keys that COCO does not have
    are kept.

    Raises:
        InputError: the file cannot be read, or a value is of another type; names file and id.
    """
    data, report = read_json(path), Report(os.fspath(path))
    if _has_layout(report, data):
        for key, unit, row_type in (
            ("images", "image", _Image),
            ("annotations", "annotation", _Annotation),
            ("categories", "category", _Category),
        ):
            check_types(report, data[key], unit, row_type)
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
    min_masks_per_class: int = MIN_MASKS_PER_CLASS,
    check_images: bool = False,
    num_workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] | None = None,
) -> Report:
    """
    Check a COCO json that may have masks on any part of its objects.

    Nothing that a file holds raises an exception. Masks that training does not read, of crowds and
    unseen classes, make warnings where others make errors. Evaluation takes the masks of all
    objects, and needs ids and areas; without "annotations" there is nothing to evaluate.

    Args:
        json_file: the annotations.
        data: the content of ``json_file`` where it has been read already; not changed.
        image_root: folder of the images; None: do not look whether they are there.
        seen_classes: in the form of ``DATASETS.SEEN_CLASSES``; None: masks of all classes are read.
            "auto": the classes with enough human masks in this file.
        num_classes: of the model, ``MODEL.ROI_HEADS.NUM_CLASSES``; None: any number will do.
        use: "training" or "evaluation".
        reads_masks: whether training or evaluation needs the masks.
        min_masks_per_class: masks a class needs to be chosen by ``seen_classes`` "auto".
        check_images: open every image and read all of it; needs ``image_root``.
        num_workers: processes that read images; 1: this one alone.
        progress: ``progress(iterable, total)`` gives the items of the iterable and shows how many.
    """
    if check_images and image_root is None:
        raise ValueError("check_images needs image_root, the folder of the images.")
    report = Report(os.fspath(json_file), use)
    if data is None:
        try:
            data = decode_json(json_file)
        except (OSError, ValueError) as error:
            report.add_to_file("content", f"unreadable ({error})")
    if use == "evaluation" and isinstance(data, dict) and "annotations" not in data:
        return report
    with paused_gc():
        if not report.findings and _has_layout(report, data):
            images, annotations = data["images"], data["annotations"]
            report.num_images, report.num_annotations = len(images), len(annotations)
            read_files = partial(read_image_files, num_workers=num_workers, progress=progress)
            row_of_image, sizes = _check_images(
                report, images, image_root, read_files if check_images else None
            )
            names = _check_categories(report, data["categories"], num_classes)
            _check_annotations(
                report,
                annotations,
                images,
                row_of_image,
                sizes,
                names,
                seen_classes,
                reads_masks,
                min_masks_per_class,
            )
    report.findings.sort(key=lambda finding: finding.severity != "error")  # errors first
    return report


def _has_layout(report: Report, data: object) -> bool:
    if not isinstance(data, dict):
        report.add_to_file("content", f"a {type(data).__name__}")
        return False
    for key in ("images", "annotations", "categories"):
        rows = data.get(key)
        if type(rows) is not list or not set(map(type, rows)) <= {dict}:
            report.add_to_file(key, shorten(rows) if key in data else "missing")
            return False
        if not rows:
            report.add_to_file("no objects" if key == "annotations" else key, "empty")
    return True


def check_types(report: Report, rows: list[dict], unit: str, row_type: type) -> np.ndarray:
    """
    Add a finding for each field that has values of another type than allowed.

    Args:
        rows: n of them; not changed.
        unit: of the report's rules.
        row_type: a TypedDict.

    Returns:
        Which rows have the types they should have, bool, shape (n,).
    """
    is_good = np.ones(len(rows), dtype=bool)
    bad_rows: dict[str, list[int]] = {}
    for start in range(0, len(rows), _CHUNK_ROWS):
        with contextlib.suppress(msgspec.ValidationError, UnicodeEncodeError):
            msgspec.convert(rows[start : start + _CHUNK_ROWS], list[row_type])
            continue
        for i, row in enumerate(rows[start : start + _CHUNK_ROWS], start):
            try:
                msgspec.convert(row, row_type)
                continue
            except msgspec.ValidationError as error:
                # "... - at `$.bbox[3]`", or "Object missing required field `bbox`"
                found = re.search(r"\$\.(\w+)|field `(\w+)`", str(error))
                field = found[1] or found[2]
            except UnicodeEncodeError:  # half a surrogate pair, anywhere in the row
                keys = [x for x in row_type.__annotations__ if "\\ud" in ascii(row.get(x))]
                field = keys[0]
            is_good[i] = False
            bad_rows.setdefault(field, []).append(i)
    for field, indices in bad_rows.items():
        report.add(f"{unit}.{field}", rows, np.isin(np.arange(len(rows)), indices))
    return is_good


def _check_images(
    report: Report,
    images: list[dict],
    image_root: str | os.PathLike | None,
    read_files: Callable[[Collection[tuple]], list[dict]] | None,
) -> tuple[dict[int, int], np.ndarray]:
    # Returns {image id: row}, and (height, width) of each row and of a last one that stands for
    # images that are not there, float64; nan where it is not known.
    is_good = check_types(report, images, "image", _Image)
    sizes = np.full((len(images) + 1, 2), np.nan)
    for i in np.flatnonzero(is_good).tolist():
        sizes[i] = images[i]["height"], images[i]["width"]
    row_of, is_repeated = {}, np.zeros(len(images), dtype=bool)
    for i, image in enumerate(images):
        if type(image.get("id")) in (int, float):
            is_repeated[i] = row_of.setdefault(image["id"], i) != i
    report.add("image id twice", images, is_repeated)
    report.add(
        "large image",
        images,
        sizes[:-1].prod(axis=1) >= MAX_PIXELS,
        lambda i: " x ".join(str(int(x)) for x in sizes[i]),
    )
    names = [x.get("file_name") for x in images]
    is_name = np.array([type(x) is str and bool(x) for x in names], dtype=bool)
    report.add("image.file_name", images, ~is_name)
    first = {}
    is_repeated = [good and first.setdefault(names[i], i) != i for i, good in enumerate(is_name)]
    report.add("file twice", images, is_repeated)
    if image_root is None:
        return row_of, sizes
    if not os.path.isdir(image_root):
        report.add_to_file("image root", repr(os.fspath(image_root)))
        return row_of, sizes
    paths = {i: os.path.join(image_root, names[i]) for i in np.flatnonzero(is_name).tolist()}
    missing = missing_files(paths.values())
    where = f" (looked for in {os.fspath(image_root)!r})"
    is_missing = [paths.get(i) in missing for i in range(len(images))]
    report.add("missing file", images, is_missing, lambda i: shorten(names[i]) + where)
    if read_files is not None:
        # What has no size has been told already.
        has_size = ~np.isnan(sizes).any(axis=1)
        jobs = {
            i: (path, *sizes[i].astype(int).tolist())
            for i, path in paths.items()
            if has_size[i] and path not in missing
        }
        problems = dict(zip(jobs, read_files(jobs.values())))
        for kind in ("unreadable", "size", "depth", "orientation", "colour"):
            is_bad = [kind in problems.get(i, ()) for i in range(len(images))]
            report.add(kind, images, is_bad, lambda i, kind=kind: problems[i][kind])
    return row_of, sizes


def _check_categories(
    report: Report, categories: list[dict], num_classes: int | None
) -> dict[int, str]:
    # Returns {category id: name} in the order of the ids, which is that of the model's classes.
    is_good = check_types(report, categories, "category", _Category)
    for field in ("id", "name"):
        counts = Counter(x[field] for x, good in zip(categories, is_good) if good)
        is_repeated = [good and counts[x[field]] > 1 for x, good in zip(categories, is_good)]
        report.add(f"category {field} twice", categories, is_repeated)
    if num_classes is not None and len(categories) != num_classes:
        remedy = f"the model has {num_classes}; set MODEL.ROI_HEADS.NUM_CLASSES {len(categories)}"
        report.add_to_file("number of classes", f"{len(categories)} classes", remedy)
    known = [x for x in categories if type(x.get("id")) in (int, float)]
    return {x["id"]: str(x.get("name")) for x in sorted(known, key=lambda x: x["id"])}


def _check_annotations(
    report: Report,
    annotations: list[dict],
    images: list[dict],
    row_of_image: dict[int, int],
    sizes: np.ndarray,
    names: dict[int, str],
    seen_classes: str | None,
    reads_masks: bool,
    min_masks: int,
) -> None:
    is_evaluation = report.use == "evaluation"
    row_type = _EvaluatedAnnotation if is_evaluation else _Annotation
    is_good = check_types(report, annotations, "annotation", row_type)
    index = np.flatnonzero(is_good)
    rows = annotations if is_good.all() else [annotations[i] for i in index]

    def find(rule: str, is_bad: np.ndarray, *rest) -> None:
        is_bad_row = np.zeros(len(annotations), dtype=bool)
        is_bad_row[index[np.asarray(is_bad, dtype=bool)]] = True
        report.add(rule, annotations, is_bad_row, *rest)

    class_of = {category_id: k for k, category_id in enumerate(names)}
    image = np.array([row_of_image.get(x["image_id"], -1) for x in rows], dtype=int)
    category = np.array([class_of.get(x["category_id"], -1) for x in rows], dtype=int)
    find("unknown image", image < 0)
    find("annotation.category_id", category < 0)
    ids = [x.get("id") for x in rows]
    find("annotation without id", [x is None for x in ids])
    if len(set(ids)) < len(ids):
        counts = Counter(ids)
        find("annotation id twice", [x is not None and counts[x] > 1 for x in ids])
    boxes = np.array([x["bbox"] for x in rows], dtype=np.float64).reshape(-1, 4)
    left_out = _check_boxes(find, boxes, sizes[image])

    is_crowd = np.array([bool(x.get("iscrowd", 0)) for x in rows], dtype=bool)
    is_model = np.array([is_from_model(x) for x in rows], dtype=bool)
    masks = measure_masks([x.get("segmentation") for x in rows], sizes[image], boxes)
    is_mask = masks.state == MaskState.MASK
    if is_evaluation:
        if reads_masks:
            _check_masks(find, masks, np.ones_like(is_mask))
            is_lacking = (masks.state == MaskState.NONE) | (masks.state == MaskState.TOO_SHORT)
            if not is_lacking.all():
                find("no mask", is_lacking)
            num = f"{MODEL!r} (of {len(rows)} objects {(is_model & ~is_lacking).sum()})"
            find("mask of a model", is_model & ~is_lacking, lambda i: num)
        return
    is_human = is_mask & ~is_crowd & ~is_model
    is_known = is_human & (image >= 0) & (category >= 0)
    num_masks = np.bincount(category[is_known], minlength=len(names))
    is_seen = _resolve_seen(report, list(names.values()), seen_classes, num_masks, min_masks)
    # Crowds are left out, and unseen classes lose their masks, unless a model made them.
    is_read = np.full(len(rows), reads_masks)
    if is_seen is not None:
        is_read &= (np.append(is_seen, False)[category] | is_model) & ~is_crowd
    _check_masks(find, masks, is_read)
    left_out["all polygons too short"] = masks.state == MaskState.TOO_SHORT
    left_out["mask without a pixel"] = masks.state == MaskState.EMPTY
    columns = {
        "masks": is_human,
        "model_masks": is_mask & ~is_crowd & is_model,
        "boxes_only": ~is_mask & ~is_crowd,
        "crowd": is_crowd,
        "rectangles": masks.is_rectangle & is_human,
    }
    left_out = {reason: marked & ~is_crowd for reason, marked in left_out.items()}
    report.count_classes(category, names, is_seen, columns, left_out)
    if rows and is_crowd.all():
        report.add_to_file("no objects", "nothing but crowds")
    counts = np.bincount(image[(image >= 0) & ~is_crowd], minlength=len(images))
    describe = "a list of {} objects".format
    report.add("many objects", images, counts > _MANY_OBJECTS, lambda i: describe(counts[i]))


def _check_boxes(find: Callable, boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    # Returns the objects that training leaves out, by the reason, bool of shape (n,).
    limits = sizes[:, ::-1]
    is_bad = ~np.isfinite(boxes).all(axis=1)
    find("annotation.bbox", is_bad)
    is_negative = (boxes[:, 2:] < 0).any(axis=1) & ~is_bad
    find("negative box", is_negative)
    # As Detectron2 computes them, in 32 bits.
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        is_far = ((low < -MAX_PIXELS_OUTSIDE) | (high > limits + MAX_PIXELS_OUTSIDE)).any(axis=1)
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
        is_empty = (high32 - low32 <= _EMPTY_SIDE).any(axis=1)
        inside = np.minimum(high32, limits) - np.maximum(low32, 0)
    told = is_bad | is_negative
    found = {
        "far box": is_far,
        "box without area": is_empty,
        "box outside its image": (inside <= _EMPTY_SIDE).any(axis=1),
        "box reaches out": ((low < -BOX_TOLERANCE) | (high > limits + BOX_TOLERANCE)).any(axis=1),
    }
    for rule in found:
        found[rule] = found[rule] & ~told
        find(rule, found[rule])
        told = told | found[rule]
    return {rule: found[rule] for rule in ("box without area", "box outside its image")}


def _check_masks(find: Callable, masks: MeasuredMasks, is_read: np.ndarray) -> None:
    unread = "training does not read this mask, of a crowd or an unseen class"
    for rule, state in (
        ("not a mask", MaskState.NOT_A_MASK),
        ("far polygon", MaskState.TOO_FAR),
        ("RLE of another size", MaskState.WRONG_SIZE),
        ("broken runs", MaskState.BROKEN_RUNS),
    ):
        is_bad = masks.state == state
        find(rule, is_bad & is_read)
        find(rule, is_bad & ~is_read, None, unread)
    find("short polygon", masks.has_short_polygon)
    find("mask without a pixel", masks.state == MaskState.EMPTY)


def _resolve_seen(
    report: Report, names: list[str], spec: str | None, num_masks: np.ndarray, min_masks: int
) -> np.ndarray | None:
    # Bool of shape (number of classes,); None where all masks are to be taken for read.
    if spec is None or any(x.unit == "category" for x in report.errors):
        return None
    if spec != AUTO:
        try:
            return np.isin(np.arange(len(names)), resolve_seen_classes(spec, names))
        except (ValueError, OSError) as error:
            report.add_to_file("seen classes", repr(spec), str(error).rstrip("."))
            return None
    if (num_masks >= min_masks).any():
        return num_masks >= min_masks
    most = sorted(zip(num_masks.tolist(), names), reverse=True)[:5]
    remedy = (
        f"no class has {min_masks} masks, DATASETS.MIN_MASKS_PER_CLASS (crowds and masks of a "
        f"model do not count; the most masks: {', '.join(f'{name} {num}' for num, name in most)})"
        "; lower the number, or name the classes"
    )
    report.add_to_file("seen classes", repr(AUTO), remedy)
    return None
