"""The classes of the training data, and which of them are seen."""

from __future__ import annotations

import ast
import json
import logging
from collections import Counter
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..class_splits import AUTO, choose_seen_classes, resolve_seen_classes
from ..coco_json import check_coco
from ..errors import InputError
from .datasets import answer_of_main_process

__all__ = ["resolve_auto_settings", "training_classes", "training_seen_classes"]

logger = logging.getLogger(__name__)


def training_classes(cfg: CfgNode) -> list[str]:
    """
    The names of the classes by contiguous id, which all datasets of ``DATASETS.TRAIN`` share.

    Raises:
        InputError: there is no dataset, or two have other classes.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
    names = {}
    for dataset in cfg.DATASETS.TRAIN:
        if not MetadataCatalog.get(dataset).get("thing_classes"):
            DatasetCatalog.get(dataset)  # json datasets learn their classes when they are read
        names[dataset] = list(MetadataCatalog.get(dataset).thing_classes)
    thing_classes = names[cfg.DATASETS.TRAIN[0]]
    for dataset, classes in names.items():
        if classes != thing_classes:
            raise InputError(
                "The datasets of DATASETS.TRAIN must have the same classes in the same order; "
                f"{cfg.DATASETS.TRAIN[0]!r} and {dataset!r} differ."
            )
    return thing_classes


def training_seen_classes(cfg: CfgNode) -> list[int]:
    """
    Resolve ``DATASETS.SEEN_CLASSES`` for the training data.

    Returns:
        The contiguous ids of the seen classes, sorted.

    Raises:
        InputError: of :func:`resolve_auto_settings`, :func:`training_classes` and
            :func:`resolve_seen_classes`.
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

    A config that is saved after this does not need the training data any more: "auto" has become
    the names of the classes. All processes call this; the main one reads, and all get its answer.

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
    # The classes, and the seen ones in the form of SEEN_CLASSES.
    wanted = f"DATASETS.SEEN_CLASSES {AUTO!r}" if needs_seen_classes else "NUM_CLASSES 0"
    try:
        classes = training_classes(cfg)
        if not needs_seen_classes:
            return classes, ""
        num_masks = Counter(dict.fromkeys(classes, 0))
        for dataset in dict.fromkeys(cfg.DATASETS.TRAIN):
            for x in check_coco(MetadataCatalog.get(dataset).json_file).classes:
                is_box_only = cfg.INPUT.RECTANGLE_AS_BOX_ONLY
                num_masks[x.name] += x.masks - (x.rectangles if is_box_only else 0)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        raise InputError(
            f"{wanted} asks the training data, DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)}, but: "
            f"{error} Where these are not at hand, use the config.yaml in the OUTPUT_DIR of the "
            "training, which has the answers."
        ) from error
    min_masks = cfg.DATASETS.MIN_MASKS_PER_CLASS
    names = choose_seen_classes(num_masks, min_masks)
    logger.info(
        f"DATASETS.SEEN_CLASSES {AUTO!r}: {len(names)} of {len(classes)} classes have at least "
        f"DATASETS.MIN_MASKS_PER_CLASS {min_masks} masks in the training data: {', '.join(names)}"
    )
    return classes, _spec_of(names, classes)


def _spec_of(names: list[str], thing_classes: Sequence[str]) -> str:
    # In a form that a config can hold and resolve_seen_classes understands.
    spec = ", ".join(names)
    try:
        ast.literal_eval(spec)  # as a config would: a number, or a tuple
    except (SyntaxError, ValueError):
        try:
            if [thing_classes[i] for i in resolve_seen_classes(spec, thing_classes)] == names:
                return spec
        except InputError:
            pass
    return f", {json.dumps(names, ensure_ascii=False)}"
