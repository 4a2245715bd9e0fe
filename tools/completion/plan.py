"""What must be the same for an interrupted run to go on, and whether model and json fit."""

from __future__ import annotations

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from completion.index import AnnotationIndex, read_categories
from completion.parts import sha256_of
from inference.setup import UsageError

__all__ = ["check_classes", "make_plan"]

logger = logging.getLogger("teacher_student_mask")

# A record's fields and how they are computed; runs of another version do not go on.
_VERSION = "1"
# Where it runs, and what is in the plan by its content.
_WITHOUT_EFFECT = ("MODEL.DEVICE", "MODEL.WEIGHTS", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS")


def make_plan(cfg: CfgNode, index: AnnotationIndex, choices: dict[str, object]) -> dict[str, str]:
    """
    Args:
        cfg: of the model.
        index: of the json.
        choices: other settings that decide about the masks, {what: value}.

    Returns:
        {what: its value or, of files, the sha256 of the content}, all strings.
    """
    return {
        "version": _VERSION,
        "annotations": f"sha256 {index.sha256}",
        "weights": f"sha256 {sha256_of(PathManager.get_local_path(cfg.MODEL.WEIGHTS))}",
        **{name: str(value) for name, value in choices.items()},
        "config": "\n".join(x for x in _lines(cfg) if not x.startswith(_WITHOUT_EFFECT)),
    }


def check_classes(cfg: CfgNode, index: AnnotationIndex) -> None:
    """
    Check that class k of the json, by rising category id, is class k of the model.

    The names are compared with those of the first dataset of the config whose names are known; if
    there is none, which is logged, only the number can be compared.

    Raises:
        UsageError: another number of classes, or other names.
    """
    names = list(index.categories.values())
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(names) != num_classes:
        raise UsageError(
            f"{index.path} has {len(names)} categories ({', '.join(names[:8])}...), but the model "
            f"has {num_classes} classes (MODEL.ROI_HEADS.NUM_CLASSES); list in the json the "
            "categories of the training data, those without an object too."
        )
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        known = _names_of(dataset)
        if not known:
            continue
        if known != names:
            k = next((k for k, pair in enumerate(zip(known, names)) if len(set(pair)) > 1), 0)
            raise UsageError(
                f"{index.path}: class {k}, by rising category id, is {names[k]!r}, but that of "
                f"{dataset!r}, the model's data, is {known[k]!r}; give the json the categories of "
                "the training data."
            )
        return
    logger.warning(
        f"No dataset of the config is there to compare the class names with. Taken for the model's "
        f"classes, in this order: {', '.join(names)}."
    )


def _names_of(dataset: str) -> list[str]:
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("thing_classes"):
        return list(metadata.thing_classes)
    path = metadata.get("json_file")
    if not path or not os.path.isfile(path):
        return []
    # DatasetCatalog.get would read all objects, too.
    return list(read_categories(path).values())


def _lines(node: CfgNode, prefix: str = "") -> list[str]:
    lines = []
    for key in sorted(node):
        value = node[key]
        name = prefix + key
        lines += _lines(value, f"{name}.") if isinstance(value, CfgNode) else [f"{name} {value!r}"]
    return lines
