"""Ground truth and results in COCO's format, checked and made ready for pycocotools."""

import contextlib
import io
import os

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from ..errors import InputError
from .checks import check_coco, check_types
from .files import read_json
from .masks import MaskState, compress_mask, has_mask, measure_masks, valid_polygons
from .report import EntryRow, Finding, Report

__all__ = ["load_ground_truth", "load_results", "prepare_ground_truth"]


def load_ground_truth(
    json_file: str | os.PathLike, *, reads_masks: bool = True, warnings: list[Finding] | None = None
) -> COCO:
    """
    Read a COCO json to evaluate on.

    Args:
        json_file: with a mask on every object, unless masks are not read.
        reads_masks: whether masks are evaluated.
        warnings: where to append what is odd but can be evaluated; it is logged in any case.

    Returns:
        The annotations, indexed, as :func:`prepare_ground_truth` leaves them. The attribute
        ``annotation_file`` is the path.

    Raises:
        InputError: the sentence of the first error of the checks; all are logged.
    """
    coco = COCO()
    coco.dataset = read_json(json_file)
    coco.annotation_file = os.fspath(json_file)
    if isinstance(coco.dataset, dict):
        coco.dataset.setdefault("annotations", None)  # an error here
    report = prepare_ground_truth(coco, coco.annotation_file, reads_masks)
    annotations = coco.dataset["annotations"]
    if reads_masks and annotations and not any(map(has_mask, annotations)):
        raise InputError(f"{coco.annotation_file}: no annotation has a mask, which mask AP needs.")
    if warnings is not None:
        warnings.extend(report.findings)
    return coco


def prepare_ground_truth(coco: COCO, json_file: str, reads_masks: bool) -> Report:
    """
    Check annotations and complete them in place.

    Malformed polygons beside others are left out, and objects of images that are not listed; RLEs
    are compressed, and a missing "iscrowd" becomes 0. Ids are numbered anew unless all are positive
    whole numbers; "id_in_file" then has the json's.

    Args:
        coco: with "annotations" in its dataset; indexed, if it has not been or ids have changed.
        json_file: the name of the file, for messages.
        reads_masks: whether masks are evaluated.

    Returns:
        The findings of the checks, without errors.

    Raises:
        InputError: the sentence of the first error of the checks; all are logged.
    """
    report = check_coco(json_file, data=coco.dataset, use="evaluation", reads_masks=reads_masks)
    report.raise_on_error()
    for image in coco.dataset["images"]:
        image.update(height=int(image["height"]), width=int(image["width"]))
    known = {x["id"] for x in coco.dataset["images"]}
    annotations = [x for x in coco.dataset["annotations"] if x["image_id"] in known]
    is_cut = len(annotations) < len(coco.dataset["annotations"])
    coco.dataset["annotations"] = annotations
    for annotation in annotations:
        annotation["iscrowd"] = int(annotation.get("iscrowd", 0))
        segmentation = annotation.get("segmentation")
        if reads_masks and isinstance(segmentation, list):
            annotation["segmentation"] = valid_polygons(segmentation)
        elif reads_masks and isinstance(segmentation, dict):
            annotation["segmentation"] = compress_mask(segmentation, segmentation["size"])
    is_usable = all(type(x["id"]) is int and x["id"] > 0 for x in annotations)
    if not is_usable:
        # COCOeval stores the id of the matched object and reads 0 as "not matched".
        for number, annotation in enumerate(annotations, start=1):
            annotation.update(id=number, id_in_file=annotation["id"])
    if is_cut or not is_usable or not coco.anns:
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    return report


def load_results(
    path: str | os.PathLike, coco: COCO, warnings: list[Finding] | None = None
) -> list[dict]:
    """
    Read a COCO result file of instance segmentation, from any framework.

    Args:
        path: a json list of {"image_id", "category_id", "segmentation", "score"} with an optional
            "bbox"; other keys are not read. Masks may be polygons, compressed or uncompressed RLE.
        coco: the ground truth of :func:`load_ground_truth`; not changed.
        warnings: where to append what is odd but can be evaluated; it is logged in any case.

    Returns:
        One dict per detection in the order of the file, with "image_id" and "category_id" (int),
        "score" (float), "bbox" ([x, y, width, height], floats; the mask's own box where the file
        has none), "segmentation" (compressed RLE {"size": [height, width], "counts": bytes}) and
        "area" (the mask's, in pixels, float).

    Raises:
        InputError: the file is not a result file of this ground truth; the sentence names the
            entry, counted from 0.
    """
    report = Report(os.fspath(path), "evaluation")
    entries = read_json(path)
    if type(entries) is not list or not set(map(type, entries)) <= {dict}:
        raise InputError(
            f"{report.file}: the content is a {type(entries).__name__}; allowed: a list of "
            '{"image_id", "category_id", "segmentation", "score"}.'
        )
    check_types(report, entries, "entry", EntryRow)
    report.raise_on_error()
    image_ids = [int(x["image_id"]) for x in entries]
    category_ids = [int(x["category_id"]) for x in entries]
    report.add("entry.image_id", entries, [x not in coco.imgs for x in image_ids])
    report.add("entry.category_id", entries, [x not in coco.cats for x in category_ids])
    report.raise_on_error()

    sizes = [(coco.imgs[x]["height"], coco.imgs[x]["width"]) for x in image_ids]
    segmentations = [x.get("segmentation") for x in entries]
    state = measure_masks(segmentations, np.array(sizes, dtype=np.float64).reshape(-1, 2)).state
    report.add("entry.segmentation", entries, ~np.isin(state, (MaskState.MASK, MaskState.EMPTY)))
    report.raise_on_error()
    results, known, is_known = [], set(), []
    for i, entry in enumerate(entries):
        rle = compress_mask(segmentations[i], sizes[i])
        box = mask_util.toBbox(rle).tolist() if entry.get("bbox") is None else entry["bbox"]
        result = {
            "image_id": image_ids[i],
            "category_id": category_ids[i],
            "score": float(entry["score"]),
            "bbox": [float(x) for x in box],
            "segmentation": rle,
            "area": float(mask_util.area(rle)),
        }
        key = (image_ids[i], category_ids[i], result["score"], rle["counts"])
        is_known.append(key in known)
        known.add(key)
        results.append(result)
    report.add("entry twice", entries, is_known)
    if not entries:
        report.add_to_file("no entries", "empty")
    report.log()
    if warnings is not None:
        warnings.extend(report.warnings)
    return results
