"""The classes of the training data, and which of them are seen."""

from __future__ import annotations

import json
import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..class_splits import AUTO, choose_seen_classes, resolve_seen_classes
from ..coco_json import check_coco
from ..errors import InputError
from .datasets import answer_of_main_process

__all__ = ["dataset_classes", "resolve_auto_settings", "training_classes", "training_seen_classes"]

logger = logging.getLogger(__name__)


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


def training_classes(cfg: CfgNode) -> list[str]:
    """
    The names of the classes by contiguous id, which all datasets of ``DATASETS.TRAIN`` share.

    Raises:
        InputError: there is no dataset, it has no classes, or two have other classes.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
    first, *others = cfg.DATASETS.TRAIN
    names, _ = dataset_classes(first)
    if not names:
        raise InputError(f"DATASETS.TRAIN names {first!r}, whose metadata lack 'thing_classes'.")
    for dataset in others:
        if dataset_classes(dataset)[0] != names:
            raise InputError(
                "The datasets of DATASETS.TRAIN must have the same classes in the same order; "
                f"{first!r} and {dataset!r} differ."
            )
    return names


def training_seen_classes(cfg: CfgNode) -> list[int]:
    """
    Resolve ``DATASETS.SEEN_CLASSES`` for the training data to sorted contiguous ids.

    Raises:
        InputError: the training data cannot be read, or do not have these classes.
    """
    spec = resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES
    thing_classes = training_classes(cfg)
    seen = resolve_seen_classes(spec, thing_classes)
    unseen = [name for i, name in enumerate(thing_classes) if i not in seen]
    logger.info(
        f"DATASETS.SEEN_CLASSES {spec!r}: training uses the masks of {len(seen)} classes; of "
        f"{len(unseen)} classes it uses the boxes alone: {', '.join(unseen) or '-'}"
    )
    return seen


def resolve_auto_settings(cfg: CfgNode, needs_seen_classes: bool = True) -> CfgNode:
    """
    Put what the training data say in the place of ``SEEN_CLASSES`` "auto" and ``NUM_CLASSES`` 0.

    A config that is saved after this does not need the training data any more. All processes call
    this; the main one reads, and all get its answer.

    Args:
        cfg: not changed. The datasets of ``DATASETS.TRAIN`` are registered; "auto" needs jsons.
        needs_seen_classes: False: leave "auto" as it is, for programs that do not ask.

    Returns:
        ``cfg`` itself where there is nothing to replace, else a copy, frozen if ``cfg`` is.

    Raises:
        InputError: the training data cannot be read, or no class has enough masks.
    """
    specs = (cfg.DATASETS.SEEN_CLASSES, cfg.TEST.SEEN_CLASSES)
    needs_seen_classes = needs_seen_classes and AUTO in specs
    if not needs_seen_classes and cfg.MODEL.ROI_HEADS.NUM_CLASSES != 0:
        return cfg
    classes, spec = answer_of_main_process(lambda: _ask_training_data(cfg, needs_seen_classes))
    resolved = cfg.clone()
    resolved.defrost()
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        resolved.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    for node in (resolved.DATASETS, resolved.TEST):
        if needs_seen_classes and node.SEEN_CLASSES == AUTO:
            node.SEEN_CLASSES = spec
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def _ask_training_data(cfg: CfgNode, needs_seen_classes: bool) -> tuple[list[str], str]:
    # The classes, and the seen ones as resolve_seen_classes takes them.
    wanted = f"DATASETS.SEEN_CLASSES {AUTO!r}" if needs_seen_classes else "NUM_CLASSES 0"
    try:
        classes = training_classes(cfg)
        if not needs_seen_classes:
            return classes, ""
        num_masks = dict.fromkeys(classes, 0)
        for dataset in cfg.DATASETS.TRAIN:
            for x in check_coco(MetadataCatalog.get(dataset).json_file).classes:
                num_masks[x.name] += x.masks - cfg.INPUT.RECTANGLE_AS_BOX_ONLY * x.rectangles
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise InputError(
            f"{wanted} asks the training data, DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}, but: "
            f"{error} The config.yaml in the OUTPUT_DIR of the training has the answers."
        ) from error
    min_masks = cfg.DATASETS.MIN_MASKS_PER_CLASS
    names = choose_seen_classes(num_masks, min_masks)
    logger.info(
        f"DATASETS.SEEN_CLASSES {AUTO!r}: {len(names)} of {len(classes)} classes have at least "
        f"DATASETS.MIN_MASKS_PER_CLASS {min_masks} masks in the training data: {', '.join(names)}"
    )
    # A form that a config can hold, whatever the names are.
    return classes, f", {json.dumps(names, ensure_ascii=False)}"
