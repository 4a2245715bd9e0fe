"""
COCO jsons: read, and checked for training or for evaluation, with the files of their images.

Types are checked by msgspec; what types cannot say is looked for in numpy, and ``report.RULES``
says what each problem means.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, Literal, NotRequired, TypedDict

import msgspec
import numpy as np
from msgspec import Meta
from tqdm import tqdm

from ..class_splits import AUTO, choose_seen_classes, resolve_seen_classes
from ..errors import InputError
from .files import paused_gc, problem_of_image, read_json
from .geometry import check_geometry, check_repeated
from .masks import (
    BOX_TOLERANCE,
    MAX_PIXELS,
    MAX_PIXELS_OUTSIDE,
    MODEL,
    MaskState,
    MeasuredMasks,
    is_from_model,
    measure_masks,
)
from .report import MIN_SHARE_OF_CROWDS, ClassCounts, Report, shorten

__all__ = ["Box", "Whole", "check_coco", "check_types", "classes_of", "read_coco"]

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
        check_types(report, data["images"], "image", _Image)
        check_types(report, data["annotations"], "annotation", _Annotation)
        check_types(report, data["categories"], "category", _Category)
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
    num_workers: int = 1,
) -> Report:
    """
    Check a COCO json that may have masks on any part of its objects.

    Nothing that a file holds raises an exception. Masks that training does not read, of crowds and
    unseen classes, make warnings where others make errors, but an outline in a form that is not
    COCO's is an error wherever any masks are read. Evaluation takes the masks of all objects, and
    needs ids and areas; without "annotations" there is nothing to evaluate.

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
        check_images: open every image of ``image_root`` and read all of it.
        num_workers: processes that read images; 1: this one alone.
    """
    report = Report(os.fspath(json_file), use)
    if data is None:
        try:
            data = read_json(json_file)
        except InputError as error:
            report.add_to_file("content", f"unreadable ({error})")
            return report
    if use == "evaluation" and isinstance(data, dict) and "annotations" not in data:
        return report
    with paused_gc():
        if _has_layout(report, data):
            images, annotations = data["images"], data["annotations"]
            report.num_images, report.num_annotations = len(images), len(annotations)
            row_of_image, sizes = _check_images(report, images)
            if image_root is not None:
                _check_files(report, images, image_root, sizes, check_images, num_workers)
            names = _check_categories(report, data["categories"], num_classes)
            _check_annotations(
                report,
                annotations,
                images,
                row_of_image,
                sizes,
                names,
                data["categories"],
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
    Add a finding for each field that has values of another type than the TypedDict allows.

    Args:
        rows: n of them; not changed.
        unit: of the report's rules.

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


def _check_images(report: Report, images: list[dict]) -> tuple[dict[int, int], np.ndarray]:
    # Returns {image id: row}, and (height, width) of each row and of a last one that stands for
    # images that are not there, float64; nan where it is not known.
    is_good = check_types(report, images, "image", _Image)
    sizes = np.full((len(images) + 1, 2), np.nan)
    for i in np.flatnonzero(is_good).tolist():
        sizes[i] = images[i]["height"], images[i]["width"]
    row_of, row_of_name = {}, {}
    is_repeated, is_name, is_same_file = np.zeros((3, len(images)), dtype=bool)
    for i, image in enumerate(images):
        if type(image.get("id")) in (int, float):
            is_repeated[i] = row_of.setdefault(image["id"], i) != i
        name = image.get("file_name")
        if type(name) is str and name:
            is_name[i] = True
            is_same_file[i] = row_of_name.setdefault(name, i) != i
    report.add("image id twice", images, is_repeated)
    report.add(
        "large image",
        images,
        sizes[:-1].prod(axis=1) >= MAX_PIXELS,
        lambda i: " x ".join(str(int(x)) for x in sizes[i]),
    )
    report.add("image.file_name", images, ~is_name)
    report.add("file twice", images, is_same_file)
    return row_of, sizes


def _check_files(
    report: Report,
    images: list[dict],
    image_root: str | os.PathLike,
    sizes: np.ndarray,
    reads_files: bool,
    num_workers: int,
) -> None:
    if not os.path.isdir(image_root):
        report.add_to_file("image root", repr(os.fspath(image_root)))
        return
    # One listing a folder, as folders may be far away.
    files_in: dict[str, set[str]] = {}
    is_missing, jobs = np.zeros(len(images), dtype=bool), {}
    for i, image in enumerate(images):
        if type(image.get("file_name")) is not str or not image["file_name"]:
            continue
        path = os.path.join(image_root, image["file_name"])
        folder, name = os.path.split(path)
        if folder not in files_in:
            files_in[folder] = set()
            # No such folder, or a name with characters that no folder has.
            with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
                files_in[folder] = {entry.name for entry in entries if entry.is_file()}
        is_missing[i] = name not in files_in[folder]
        if not is_missing[i] and not np.isnan(sizes[i]).any():
            jobs[i] = (path, *sizes[i].astype(int).tolist())
    where = f" (looked for in {os.fspath(image_root)!r})"
    report.add(
        "missing file", images, is_missing, lambda i: shorten(images[i]["file_name"]) + where
    )
    if not reads_files or not jobs:
        return
    with contextlib.ExitStack() as stack:
        if num_workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(num_workers))
            answers = pool.map(problem_of_image, *zip(*jobs.values()), chunksize=32)
        else:
            answers = map(problem_of_image, *zip(*jobs.values()))
        progress = tqdm(answers, "Images", total=len(jobs), unit="image")
        problems = {i: problem for problem, i in zip(progress, jobs) if problem is not None}
    for kind in ("unreadable", "depth", "size", "colour", "orientation"):
        is_bad = [i in problems and problems[i][0] == kind for i in range(len(images))]
        report.add(kind, images, is_bad, lambda i: problems[i][1])


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
    categories: list[dict],
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
    counts = Counter(x["id"] for x in rows if x.get("id") is not None)
    find("annotation without id", [x.get("id") is None for x in rows])
    find("annotation id twice", [counts[x.get("id")] > 1 for x in rows])
    boxes = np.array([x["bbox"] for x in rows], dtype=np.float64).reshape(-1, 4)
    is_crowd = np.array([bool(x.get("iscrowd", 0)) for x in rows], dtype=bool)
    is_model = np.array([is_from_model(x) for x in rows], dtype=bool)
    masks = measure_masks([x.get("segmentation") for x in rows], sizes[image], boxes)
    is_mask = masks.state == MaskState.MASK
    segmentations = [x.get("segmentation") for x in rows]
    objects = np.stack([image, np.where(is_crowd | (image < 0), -1, category)], axis=1)
    is_xyxy = check_geometry(find, boxes, sizes[image], segmentations, masks, is_crowd)
    check_repeated(find, objects, boxes)
    find("rotated box", _rotations(rows, is_mask & ~masks.is_rectangle))
    if is_evaluation:
        if reads_masks:
            _check_masks(find, masks, np.ones_like(is_mask), True)
            is_lacking = (masks.state == MaskState.NONE) | (masks.state == MaskState.TOO_SHORT)
            if not is_lacking.all():
                find("no mask", is_lacking)
            num = f"{MODEL!r} (of {len(rows)} objects {(is_model & ~is_lacking).sum()})"
            find("mask of a model", is_model & ~is_lacking, lambda i: num)
        _check_boxes(find, boxes, sizes[image], is_xyxy)
        return
    is_left_out = _check_boxes(find, boxes, sizes[image], is_xyxy)
    is_human = is_mask & ~is_crowd & ~is_model

    def count(is_counted: np.ndarray) -> list[int]:
        # Of each class; the unknown class -1 comes first, and is left away.
        return np.bincount(category[is_counted] + 1, minlength=len(names) + 1)[1:].tolist()

    num_masks = dict(zip(names.values(), count(is_human & (image >= 0))))
    is_seen = _resolve_seen(report, num_masks, seen_classes, min_masks)
    # Crowds are left out, and unseen classes lose their masks, unless a model made them.
    is_read = np.full(len(rows), reads_masks)
    if is_seen is not None:
        is_read &= (np.append(is_seen, False)[category] | is_model) & ~is_crowd
    _check_masks(find, masks, is_read, reads_masks)
    numbers = {
        "masks": count(is_human),
        "model_masks": count(is_mask & ~is_crowd & is_model),
        "boxes_only": count(~is_mask & ~is_crowd),
        "crowd": count(is_crowd),
        "rectangles": count(masks.is_rectangle & is_human),
        "left_out": count(is_left_out & ~is_crowd),
    }
    for k, (category_id, name) in enumerate(names.items()):
        seen = None if is_seen is None else bool(is_seen[k])
        of_class = {key: x[k] for key, x in numbers.items()}
        report.classes.append(ClassCounts(name, category_id, seen, **of_class))
    _check_classes(report, categories)
    if rows and is_crowd.all():
        report.add_to_file("no objects", "nothing but crowds")
    num_objects = np.bincount(image[(image >= 0) & ~is_crowd], minlength=len(images))
    is_many = num_objects > _MANY_OBJECTS
    report.add("many objects", images, is_many, lambda i: f"a list of {num_objects[i]} objects")


def _rotations(rows: list[dict], has_mask: np.ndarray) -> list[bool]:
    # CVAT's, in degrees, of objects that are a box only.
    attributes = [x.get("attributes") for x in rows]
    angles = [x.get("rotation") if type(x) is dict else None for x in attributes]
    is_turned = [
        type(x) in (int, float) and x % 360 != 0 and not known for x, known in zip(angles, has_mask)
    ]
    return is_turned


def _check_boxes(
    find: Callable, boxes: np.ndarray, sizes: np.ndarray, is_told: np.ndarray
) -> np.ndarray:
    # is_told: another finding says that they may reach out of their image. Returns which objects
    # training leaves out, bool of shape (n,).
    limits = sizes[:, ::-1]
    # As Detectron2 computes them, in 32 bits.
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        is_far = ((low < -MAX_PIXELS_OUTSIDE) | (high > limits + MAX_PIXELS_OUTSIDE)).any(axis=1)
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
        is_empty = (high32 - low32 <= _EMPTY_SIDE).any(axis=1)
        inside = np.minimum(high32, limits) - np.maximum(low32, 0)
    found = {
        "annotation.bbox": ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1),
        "far box": is_far,
        "box without area": is_empty,
        "box outside its image": (inside <= _EMPTY_SIDE).any(axis=1),
        "box reaches out": ((low < -BOX_TOLERANCE) | (high > limits + BOX_TOLERANCE)).any(axis=1),
    }
    found["box reaches out"] &= ~is_told
    is_told = np.zeros(len(boxes), dtype=bool)
    for rule in found:
        found[rule] &= ~is_told
        find(rule, found[rule])
        is_told |= found[rule]
    return found["box without area"] | found["box outside its image"]


def _check_masks(
    find: Callable, masks: MeasuredMasks, is_read: np.ndarray, reads_masks: bool
) -> None:
    # Of unseen classes and crowds, too: what a human drew is not to be taken for no mask, and lost.
    is_unread_form = (masks.state == MaskState.NOT_A_MASK) & reads_masks
    find("not a mask", is_unread_form)
    find("far polygon", (masks.state == MaskState.TOO_FAR) & is_read)
    find("RLE of another size", (masks.state == MaskState.WRONG_SIZE) & is_read)
    find("broken runs", (masks.state == MaskState.BROKEN_RUNS) & is_read)
    find("unread mask", (masks.state >= MaskState.NOT_A_MASK) & ~is_read & ~is_unread_form)
    find("short polygon", masks.has_short_polygon & (masks.state != MaskState.NOT_A_MASK))
    find("mask without a pixel", masks.state == MaskState.EMPTY)
    find("crossing edges", masks.is_crossing)


def _resolve_seen(
    report: Report, num_masks: dict[str, int], spec: str | None, min_masks: int
) -> np.ndarray | None:
    # Bool of shape (number of classes,); None where all masks are to be taken for read.
    if spec is None or any(x.unit == "category" for x in report.errors):
        return None
    names = list(num_masks)
    try:
        if spec == AUTO:
            return np.isin(names, choose_seen_classes(num_masks, min_masks))
        return np.isin(np.arange(len(names)), resolve_seen_classes(spec, names))
    except (ValueError, OSError) as error:
        report.add_to_file("seen classes", repr(spec), str(error).rstrip("."))
        return None


def _check_classes(report: Report, categories: list[dict]) -> None:
    classes = report.classes
    rows = [{"id": x.category_id, "name": x.name} for x in classes]
    # Parents by their name, but for those that are their own.
    parents = {
        x["supercategory"]
        for x in categories
        if type(x.get("supercategory")) is str and x["supercategory"] != x.get("name")
    }
    if any(x.num_objects + x.crowd for x in classes):
        is_root = [x.name in parents and not x.num_objects + x.crowd for x in classes]
        report.add("root category", rows, is_root)
    report.add(
        "many crowds",
        rows,
        [
            x.crowd > 1 and x.crowd >= MIN_SHARE_OF_CROWDS * (x.crowd + x.num_objects)
            for x in classes
        ],
        lambda k: f"{classes[k].name!r}, a class with {classes[k].crowd} of "
        f"{classes[k].crowd + classes[k].num_objects} objects marked as crowds",
    )
    report.add(
        "mostly rectangles",
        rows,
        [2 * x.rectangles > x.masks for x in classes],
        lambda k: f"{classes[k].name!r}, a class with {classes[k].masks} masks, "
        f"{classes[k].rectangles} of them the box itself",
    )
    if all(x.is_seen is None or not x.num_objects for x in classes):
        return
    if not any(x.masks for x in classes if x.is_seen):
        report.add_to_file("no seen mask", "classes without any mask")
        return
    report.add(
        "seen without mask",
        rows,
        [x.is_seen and not x.masks for x in classes],
        lambda k: f"{classes[k].name!r}, a class with {classes[k].num_objects} objects and no "
        "human mask",
    )
