"""The classes that a model knows, by the ids that it predicts: those of its training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from .errors import InputError

__all__ = [
    "CLASS_NAMES_FILE",
    "dataset_classes",
    "find_model_classes",
    "model_folders",
    "read_class_names",
    "write_class_names",
]

logger = logging.getLogger(__name__)

# In the folder of the weights: "id" and "name" of the model's classes, in their order.
CLASS_NAMES_FILE = "categories.json"
# In the folder of an export: the names alone.
_EXPORTED_CLASS_NAMES_FILE = "classes.json"


def write_class_names(folder: str | os.PathLike, names: list[str], ids: list[int]) -> None:
    """
    Write the classes of a model to its folder, so that inference needs no data.

    The main process writes; data whose classes have no names leave no file.

    Args:
        folder: ``OUTPUT_DIR`` of the training.
        names, ids: as of :func:`dataset_classes`.
    """
    if not names or not comm.is_main_process():
        return
    categories = [{"id": i, "name": name} for name, i in zip(names, ids)]
    path = Path(folder, CLASS_NAMES_FILE)
    path.write_text(json.dumps(categories, indent=1) + "\n", encoding="utf-8")


def read_class_names(folder: str | os.PathLike) -> tuple[list[str], list[int]] | None:
    """
    The classes of the model in a folder, as its training or its export has written them.

    Returns:
        Names and the dataset's category ids, by contiguous id; None where no file tells them.

    Raises:
        InputError: the file cannot be read.
    """
    for name in (CLASS_NAMES_FILE, _EXPORTED_CLASS_NAMES_FILE):
        path = Path(folder, name)
        if not path.is_file():
            continue
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            if name == _EXPORTED_CLASS_NAMES_FILE:
                return [str(x) for x in rows], list(range(len(rows)))
            return [x["name"] for x in rows], [x["id"] for x in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"The classes in {path} cannot be read: {error!r}.") from error
    return None


def model_folders(cfg: CfgNode, config_file: str) -> list[str]:
    """Where the training may have left its files: beside the weights, and beside the config."""
    return [os.path.dirname(os.path.abspath(x)) for x in (cfg.MODEL.WEIGHTS, config_file) if x]


def dataset_classes(dataset: str) -> tuple[list[str], list[int]]:
    """Names and category ids of a registered dataset, by contiguous id; it may be read for them."""
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(dataset)  # the names of many are known when their json has been read
    names = metadata.get("thing_classes", [])
    # Without a mapping the json's ids are the contiguous ones, as for Detectron2's evaluator.
    contiguous_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    dataset_ids = {contiguous: i for i, contiguous in contiguous_ids.items()}
    return list(names), [dataset_ids.get(i, i) for i in range(len(names))]


def find_model_classes(
    cfg: CfgNode, folders: Sequence[str | os.PathLike]
) -> tuple[list[str], list[int]]:
    """
    The classes of the model that a config and its weights make.

    They are those of its training: from the file that it has left, else from its data. The test
    data, which may list other classes under other ids, are asked last.

    Args:
        cfg: with its ``MODEL.WEIGHTS``.
        folders: where to look for the file that the training has left, in this order.

    Returns:
        Names and the dataset's category ids, by contiguous id.

    Raises:
        InputError: the file of the training cannot be read, or has more classes than the model.
    """
    is_rcnn = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "GrabCutRCNN")
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if is_rcnn else None
    for folder in folders:
        found = read_class_names(folder)
        if found is None:
            continue
        names, ids = found
        if num_classes is None:
            return names, ids
        if len(names) > num_classes:
            raise InputError(
                f"The training in {folder} had {len(names)} classes, {', '.join(names[:20])}, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; give the config and the weights of "
                "the same training."
            )
        # Outputs that the training had no class for.
        more = range(num_classes - len(names))
        names += [f"class {len(names) + i}" for i in more]
        return names, ids + [max(ids, default=-1) + 1 + i for i in more]
    for source in (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1]):
        try:
            names, ids = dataset_classes(source)
        except (KeyError, OSError, TypeError, ValueError):
            continue
        if names and len(names) == (num_classes or len(names)):
            if source not in cfg.DATASETS.TRAIN:
                logger.warning(
                    f"Nothing tells the classes of the training; taken are those of {source!r}, in "
                    f"its order. A {CLASS_NAMES_FILE} beside the weights would tell them."
                )
            return names, ids
    logger.warning(
        f"The classes have no names, and their ids are contiguous: neither the datasets nor "
        f"{CLASS_NAMES_FILE} beside the weights tell those of {num_classes} classes."
    )
    return [f"class {i}" for i in range(num_classes or 0)], list(range(num_classes or 0))
