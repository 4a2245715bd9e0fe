"""COCO json files in which any object may lack its mask."""

from __future__ import annotations

import logging
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..checks.annotation_checks import check_annotations
from ..checks.annotation_report import Finding
from ..checks.reading import read_json

__all__ = [
    "classes_of",
    "is_harmless",
    "load_partial_coco_json",
    "register_partial_coco",
    "remember_as_checked",
]

logger = logging.getLogger(__name__)

# States of files that were found to be good, so that they are not checked at every reading.
_checked_files: set[tuple] = set()


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
        at least one polygon or an RLE, ``mask_source`` as in the json.

    Raises:
        ValueError: what :func:`check_annotations` calls an error, but for masks.
    """
    try:
        coco = read_json(json_file)
    except ValueError as error:
        raise ValueError(f"{json_file}: the content is no json in UTF-8: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco, dict) or not isinstance(coco.get(key), list):
            raise ValueError(f"{json_file}: a COCO json must have a list {key!r}.")
    if _state_of(json_file) not in _checked_files:
        for finding in check_annotations(json_file, data=coco).errors:
            if not is_harmless(finding):
                raise ValueError(str(finding))

    classes = classes_of(coco)
    contiguous_ids = classes["thing_dataset_id_to_contiguous_id"]
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(**classes)

    records = {
        image["id"]: {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
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


def is_harmless(finding: Finding) -> bool:
    """
    Whether the objects of a file can be loaded in spite of an error of the checks.

    Masks are checked where they are used; a file without images still has classes, and one without
    objects can be predicted on; and only evaluation needs ids of annotations.
    """
    if finding.field in ("images", "annotations"):
        return finding.is_about_none
    return finding.field == "segmentation" or (
        finding.unit == "annotation" and finding.field == "id"
    )


def remember_as_checked(json_file: str) -> None:
    """Let :func:`load_partial_coco_json` not check a file again that is known to be good."""
    state = _state_of(json_file)
    if state is not None:
        _checked_files.add(state)


def _state_of(json_file: str) -> tuple | None:
    # The file as it is now; None if there is none.
    try:
        stat = os.stat(json_file)
    except OSError:
        return None
    # Coarse clocks give two versions of a file one time; a replaced one has another number.
    return os.path.realpath(json_file), stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read_object(annotation: dict, contiguous_ids: dict[int, int]) -> dict:
    # All of an object in Detectron2's format but its mask.
    obj = {
        "bbox": list(annotation["bbox"]),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous_ids[annotation["category_id"]],
        "iscrowd": annotation.get("iscrowd", 0),
    }
    if "mask_source" in annotation:
        obj["mask_source"] = annotation["mask_source"]
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
