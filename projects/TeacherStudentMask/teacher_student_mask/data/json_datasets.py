"""Datasets that a config names by the path of their json."""

from __future__ import annotations

import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .datasets import register_partial_coco

__all__ = ["is_json_path", "register_json_datasets"]

# What was registered here: path -> (folder of the images, state of the json at that time).
_registered: dict[str, tuple[str, tuple | None]] = {}


def is_json_path(name: str) -> bool:
    """
    Whether a dataset's name is the path of a json for :func:`register_json_datasets`.

    A name that was registered in another way, whatever it ends in, is a name.
    """
    is_other = name in DatasetCatalog.list() and name not in _registered
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
        ValueError: a required file does not exist; or one path is in both lists with two folders.
    """
    roots = {}
    for key in ("TRAIN", "TEST"):
        root = cfg.DATASETS.TRAIN_IMAGE_ROOT if key == "TRAIN" else cfg.DATASETS.TEST_IMAGE_ROOT
        for path in filter(is_json_path, cfg.DATASETS[key]):
            if key in required and not os.path.isfile(path):
                raise ValueError(
                    f"DATASETS.{key} names {path!r}, which is no registered dataset, and there is "
                    f"no such file; relative paths start at {os.getcwd()}. Allowed: the path of a "
                    "COCO json, or a name registered with register_partial_coco."
                )
            image_root = root or os.path.dirname(path)
            if roots.setdefault(path, image_root) != image_root:
                raise ValueError(
                    f"{path} is in DATASETS.TRAIN and DATASETS.TEST, with its images in "
                    f"{roots[path]!r} and in {image_root!r}; DATASETS.TRAIN_IMAGE_ROOT and "
                    "DATASETS.TEST_IMAGE_ROOT must be the same for it."
                )
    for path, image_root in roots.items():
        _register(path, image_root)


def _register(path: str, image_root: str) -> None:
    try:
        stat = os.stat(path)
        state = (image_root, (stat.st_mtime_ns, stat.st_size))
    except OSError:
        state = (image_root, None)
    if path in DatasetCatalog.list():
        if _registered[path] == state:
            return
        # The classes of a json that was edited may be others, and metadata cannot be changed.
        DatasetCatalog.remove(path)
        MetadataCatalog.remove(path)
    register_partial_coco(path, path, image_root)
    _registered[path] = state
