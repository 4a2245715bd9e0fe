"""COCO jsons in which any object may lack its mask, as datasets of Detectron2."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..coco_json import check_coco, classes_of, read_json, valid_polygons
from ..errors import InputError

__all__ = [
    "is_json_path",
    "load_partial_coco_json",
    "register_json_datasets",
    "register_partial_coco",
    "remember_as_checked",
]

logger = logging.getLogger(__name__)

# Errors of the checks in spite of which the objects of a file can be loaded: masks are checked
# where they are used, a file without objects still has classes, and only evaluation needs ids.
_HARMLESS = {"no objects", "annotation.id", "annotation id twice", "not a mask", "far polygon"}
_HARMLESS |= {"RLE of another size", "broken runs"}

# States of files that were found to be good, so that they are not checked at every reading.
_checked_files: set[tuple] = set()

# Datasets that a config names by their paths: path -> (folder of the images, state of the json).
_json_datasets: dict[str, tuple[str, tuple | None]] = {}


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
        InputError: what :func:`check_coco` calls an error, but for masks.
    """
    coco = read_json(json_file)
    if _state_of(json_file) not in _checked_files:
        for finding in check_coco(json_file, data=coco).errors:
            if finding.rule not in _HARMLESS:
                raise InputError(str(finding))
    classes = classes_of(coco)
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
        obj = {
            "bbox": list(annotation["bbox"]),
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": classes["thing_dataset_id_to_contiguous_id"][annotation["category_id"]],
            "iscrowd": annotation.get("iscrowd", 0),
        }
        if "mask_source" in annotation:
            obj["mask_source"] = annotation["mask_source"]
        if annotation.get("keypoints"):
            # COCO's keypoints are pixel indices, Detectron2's are coordinates.
            obj["keypoints"] = [
                v + 0.5 if i % 3 != 2 else v for i, v in enumerate(annotation["keypoints"])
            ]
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and set(map(type, segmentation)) <= {list}:
            num_malformed += len(segmentation)
            segmentation = valid_polygons(segmentation)
            num_malformed -= len(segmentation)
        if segmentation:
            obj["segmentation"] = segmentation
        num_without_mask += not segmentation
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


def remember_as_checked(json_file: str) -> None:
    """Let :func:`load_partial_coco_json` not check a file again that is known to be good."""
    _checked_files.add(_state_of(json_file))


def _state_of(json_file: str) -> tuple | None:
    # The file as it is now; None if there is none.
    try:
        stat = os.stat(json_file)
    except OSError:
        return None
    # Coarse clocks give two versions of a file one time; a replaced one has another number.
    return os.path.realpath(json_file), stat.st_ino, stat.st_mtime_ns, stat.st_size


def is_json_path(name: str) -> bool:
    """
    Whether a dataset's name is the path of a json for :func:`register_json_datasets`.

    A name that was registered in another way, whatever it ends in, is a name.
    """
    is_other = name in DatasetCatalog.list() and name not in _json_datasets
    return name.lower().endswith(".json") and not is_other


def register_json_datasets(cfg: CfgNode, required: Sequence[str] = ()) -> None:
    """
    Register each json that ``DATASETS.TRAIN`` or ``DATASETS.TEST`` names by its path.

    The path as it stands in the config becomes the name of the dataset. The images are looked for
    in ``DATASETS.TRAIN_IMAGE_ROOT`` and ``DATASETS.TEST_IMAGE_ROOT``; where that is empty, in the
    folder of the json. Nothing is read. Each process has a catalog of its own, so each calls this.
    Further calls change nothing but for a json that has changed, or has another folder of images.

    Args:
        cfg: not changed.
        required: of "TRAIN" and "TEST", whose files must exist.

    Raises:
        InputError: a required file does not exist; or one path is in both lists with two folders.
    """
    roots: dict[str, str] = {}
    for key in ("TRAIN", "TEST"):
        root = cfg.DATASETS[f"{key}_IMAGE_ROOT"]
        for path in filter(is_json_path, cfg.DATASETS[key]):
            if key in required and not os.path.isfile(path):
                raise InputError(
                    f"DATASETS.{key} names {path!r}, which is not a registered dataset, and there "
                    f"is no such file; relative paths start at {os.getcwd()}. Allowed: the path of "
                    "a COCO json, or a name registered with register_partial_coco."
                )
            image_root = root or os.path.dirname(path)
            if roots.setdefault(path, image_root) != image_root:
                raise InputError(
                    f"{path} is in DATASETS.TRAIN and DATASETS.TEST, with its images in "
                    f"{roots[path]!r} and in {image_root!r}; DATASETS.TRAIN_IMAGE_ROOT and "
                    "DATASETS.TEST_IMAGE_ROOT must be the same for it."
                )
    for path, image_root in roots.items():
        state = (image_root, _state_of(path))
        if path in DatasetCatalog.list():
            if _json_datasets[path] == state:
                continue
            # The classes of a json that was edited may be others, and metadata cannot be changed.
            DatasetCatalog.remove(path)
            MetadataCatalog.remove(path)
        register_partial_coco(path, path, image_root)
        _json_datasets[path] = state
