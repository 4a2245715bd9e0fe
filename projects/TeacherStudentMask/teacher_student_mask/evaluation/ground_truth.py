"""The annotations of an evaluation: checked, and brought into the form that pycocotools needs."""

from __future__ import annotations

import contextlib
import io
import logging

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.coco import COCO

from ..checks.evaluation_checks import check_for_evaluation
from ..checks.mask_measures import measure_rles, valid_polygons

logger = logging.getLogger(__name__)

__all__ = ["explain_failure", "prepare_ground_truth"]


def explain_failure(json_file: str) -> None:
    """
    Look for the reason why a COCO json could not be indexed.

    Raises:
        ValueError: the sentence of what was found; nothing is raised where nothing was.
    """
    for finding in check_for_evaluation(json_file).findings:
        raise ValueError(str(finding))


def prepare_ground_truth(coco: COCO, json_file: str, reads_masks: bool) -> None:
    """
    Check the annotations and complete them in place.

    Malformed polygons beside others are left out, missing "iscrowd" becomes 0, and ids are numbered
    anew unless all are positive whole numbers.

    Args:
        coco: indexed, with "annotations".
        json_file: what messages name.
        reads_masks: whether masks are evaluated.

    Raises:
        ValueError: the sentence of the first error of :func:`check_for_evaluation`; all are logged.
    """
    check_for_evaluation(json_file, coco.dataset, reads_masks).raise_on_error()
    for image in coco.dataset["images"]:
        image.update(height=int(image["height"]), width=int(image["width"]))
    annotations = coco.dataset["annotations"]
    for annotation in annotations:
        annotation["iscrowd"] = int(annotation.get("iscrowd", 0))
    if reads_masks:
        _repair_polygons(annotations, json_file)
        _join_runs(annotations)
    if not all(type(x["id"]) is int and x["id"] > 0 for x in annotations):
        # COCOeval stores the id of the matched object and reads 0 as "not matched".
        logger.info("Annotation ids are not all positive integers; numbering them from 1.")
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()


def _repair_polygons(annotations: list[dict], json_file: str) -> None:
    num_malformed = 0
    for annotation in annotations:
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list):
            annotation["segmentation"] = valid_polygons(polygons)
            num_malformed += len(polygons) - len(annotation["segmentation"])
    if num_malformed:
        logger.warning(
            f"{json_file}: {num_malformed} polygons have fewer than 3 points or an odd number of "
            "coordinates and are left out."
        )


def _join_runs(annotations: list[dict]) -> None:
    # pycocotools goes wrong on a run of length 0 inside a mask, which says nothing.
    rles = [x["segmentation"] for x in annotations if isinstance(x.get("segmentation"), dict)]
    _, _, has_empty_run = measure_rles([x.get("counts") for x in rles])
    for i in np.flatnonzero(has_empty_run).tolist():
        size, counts = rles[i]["size"], rles[i]["counts"]
        if isinstance(counts, list):
            counts = mask_util.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
        joined = mask_util.encode(mask_util.decode({"size": size, "counts": counts}))
        rles[i]["counts"] = joined["counts"]
