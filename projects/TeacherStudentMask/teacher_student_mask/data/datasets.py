"""COCO json files in which any object may lack its mask."""

from __future__ import annotations

import json
import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .annotation_checks import check_annotations
from .annotation_report import Finding

__all__ = ["load_partial_coco_json", "register_partial_coco"]

logger = logging.getLogger(__name__)


def register_partial_coco(name: str, json_file: str, image_root: str) -> None:
    """
    Register a COCO json, masks on any part of its objects, as a Detectron2 dataset.

    Args:
        name: of the dataset, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: path of the COCO annotations; read when the dataset is first used.
        image_root: folder that the ``file_name`` of the images is relative to.
    """
    DatasetCatalog.register(name, lambda: load_partial_coco_json(json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def load_partial_coco_json(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict]:
    """
    Read a COCO json into Detectron2's standard dataset format; no box is dropped.

    Detectron2's ``load_coco_json`` drops an object whose polygons are all malformed, and with it a
    box that detection needs. Here such an object is one without a mask.

    Args:
        json_file: path of the COCO annotations.
        image_root: folder that the ``file_name`` of the images is relative to.
        dataset_name: if given, class names and the map from category ids to contiguous ids are
            stored in its metadata.

    Returns:
        One dict an image, sorted by image id. ``segmentation`` is there only where the json holds
        at least one polygon or an RLE.

    Raises:
        ValueError: what :func:`check_annotations` calls an error, but for masks.
    """
    try:
        with open(json_file, encoding="utf-8") as f:
            coco = json.load(f)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{json_file}: the content is no json in UTF-8: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"{json_file}: a COCO json must have a list {key!r}.")
    for finding in check_annotations(json_file, data=coco).errors:
        if not _is_harmless(finding):
            raise ValueError(str(finding))

    categories = sorted(coco["categories"], key=lambda category: category["id"])
    contiguous_ids = {category["id"]: i for i, category in enumerate(categories)}
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id=contiguous_ids,
        )

    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
        }
        for image in sorted(coco["images"], key=lambda image: image["id"])
    }
    num_without_mask = num_malformed = 0
    for annotation in coco["annotations"]:
        where = f"{json_file}: annotation {annotation.get('id')}"
        obj = _read_object(annotation, contiguous_ids)
        segmentation, num_dropped = _read_segmentation(annotation.get("segmentation"), where)
        if segmentation:
            obj["segmentation"] = segmentation
        num_without_mask += not segmentation
        num_malformed += num_dropped
        records[annotation["image_id"]]["annotations"].append(obj)

    logger.info(
        f"Loaded {len(records)} images with {len(coco['annotations'])} objects from {json_file}; "
        f"{num_without_mask} objects have a box only."
    )
    if num_malformed:
        logger.warning(
            f"{json_file}: {num_malformed} polygons have fewer than 3 points or an odd number of "
            "coordinates and are left out; their objects keep their boxes."
        )
    return list(records.values())


def _is_harmless(finding: Finding) -> bool:
    # Masks are checked where they are used; a file without images still has classes, and one
    # without objects can be predicted on; and only evaluation needs ids of annotations.
    if finding.field in ("images", "annotations"):
        return finding.examples[0][1] in ("empty", "nothing but crowds")
    return finding.field == "segmentation" or (
        finding.unit == "annotation" and finding.field == "id"
    )


def _read_object(annotation: dict, contiguous_ids: dict[int, int]) -> dict:
    # All of an object in Detectron2's format but its mask.
    obj = {
        "bbox": list(annotation["bbox"]),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous_ids[annotation["category_id"]],
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if annotation.get("keypoints"):
        # COCO's keypoints are pixel indices, Detectron2's are coordinates.
        obj["keypoints"] = [
            v + 0.5 if i % 3 != 2 else v for i, v in enumerate(annotation["keypoints"])
        ]
    return obj


def _read_segmentation(segmentation, where: str) -> tuple[list | dict | None, int]:
    # The segmentation, without malformed polygons, and how many these were.
    if not isinstance(segmentation, list):
        return segmentation, 0
    if not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError(
            f"{where}: 'segmentation' must be a list of polygons [[x, y, x, y, ...], ...], an RLE "
            f"or null, got {str(segmentation)[:80]}."
        )
    valid = [p for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    return valid, len(segmentation) - len(valid)
