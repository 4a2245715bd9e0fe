"""The names of the classes beside the weights, so that nothing needs the training data for them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from .atomic_files import open_atomically

__all__ = ["CLASS_NAMES_FILE", "read_class_names", "write_class_names"]

CLASS_NAMES_FILE = "categories.json"


def write_class_names(cfg: CfgNode) -> None:
    """
    Write the classes of the training data to ``OUTPUT_DIR``, in the order of the model's classes.

    The main process writes; data whose classes have no names yet leave no file.

    Args:
        cfg: of the training; its datasets have been read.

    Raises:
        WriteError: the file cannot be written.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    names = metadata.get("thing_classes")
    if not names or not comm.is_main_process():
        return
    contiguous_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
    dataset_ids = {contiguous: i for i, contiguous in contiguous_ids.items()}
    categories = [{"id": dataset_ids.get(i, i), "name": name} for i, name in enumerate(names)]
    with open_atomically(os.path.join(cfg.OUTPUT_DIR, CLASS_NAMES_FILE)) as f:
        f.write(json.dumps(categories, indent=1) + "\n")


def read_class_names(folder: str | os.PathLike) -> list[dict] | None:
    """
    Args:
        folder: ``OUTPUT_DIR`` of a training, or any other.

    Returns:
        The categories as in a COCO json, "id" and "name", in the order of the model's classes;
        None where there is no such file.

    Raises:
        ValueError: the file is something else; the sentence names it.
    """
    path = Path(folder, CLASS_NAMES_FILE)
    try:
        categories = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    is_list = isinstance(categories, list) and all(
        isinstance(x, dict) and type(x.get("id")) is int and isinstance(x.get("name"), str)
        for x in categories
    )
    if not is_list:
        raise ValueError(
            f'{path} holds {str(categories)[:80]}; allowed: [{{"id": 1, "name": "cat"}}, ...].'
        )
    return categories
