"""The classes of the training data, and which of them are seen."""

from __future__ import annotations

import ast
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tabulate import tabulate

from ..class_splits import AUTO, resolve_seen_classes
from ..coco_masks import MaskState, is_from_model, measure_masks
from ..errors import InputError
from .dataset_checks import answer_of_main_process

__all__ = [
    "ClassCount",
    "choose_seen_classes",
    "count_objects",
    "resolve_auto_settings",
    "training_classes",
    "training_seen_classes",
]

logger = logging.getLogger(__name__)

_MAX_CLASSES_NAMED = 20


@dataclass
class ClassCount:
    """How many objects, without crowds, the training data have of a class, and human masks."""

    name: str
    objects: int = 0
    masks: int = 0


def training_classes(cfg: CfgNode) -> list[str]:
    """
    The names of the classes by contiguous id, which all datasets of ``DATASETS.TRAIN`` share.

    Raises:
        InputError: there is no dataset, or two have other classes.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
    names = {dataset: _classes_of(dataset) for dataset in cfg.DATASETS.TRAIN}
    thing_classes = next(iter(names.values()))
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

    "auto", unless :func:`resolve_auto_settings` has replaced it, is counted here, in this process.

    Returns:
        The contiguous ids of the seen classes, sorted.

    Raises:
        InputError: of :func:`training_classes`, :func:`resolve_seen_classes` and
            :func:`choose_seen_classes`.
    """
    spec = cfg.DATASETS.SEEN_CLASSES
    counts = _count_training_data(cfg) if spec == AUTO else []
    thing_classes = training_classes(cfg)
    if spec == AUTO:
        names = choose_seen_classes(counts, cfg.DATASETS.MIN_MASKS_PER_CLASS)
        seen = [i for i, name in enumerate(thing_classes) if name in names]
    else:
        seen = resolve_seen_classes(spec, thing_classes)
    unseen = [name for i, name in enumerate(thing_classes) if i not in set(seen)]
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
        cfg: not changed. The datasets of ``DATASETS.TRAIN`` are registered.
        needs_seen_classes: False: leave "auto" as it is, for programs that do not ask.

    Returns:
        ``cfg`` itself where there is nothing to replace, else a copy, frozen if ``cfg`` is.

    Raises:
        InputError: the training data cannot be read, or no class has enough masks.
    """
    keys = [("DATASETS", "SEEN_CLASSES"), ("TEST", "SEEN_CLASSES")] if needs_seen_classes else []
    keys = [(node, key) for node, key in keys if cfg[node][key] == AUTO]
    needs_number = cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0
    if not keys and not needs_number:
        return cfg
    num_classes, spec = answer_of_main_process(lambda: _ask_data(cfg, bool(keys)))
    resolved = cfg.clone()
    resolved.defrost()
    if needs_number:
        resolved.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    for node, key in keys:
        resolved[node][key] = spec
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def count_objects(
    dataset_dicts: Iterable[dict],
    thing_classes: Sequence[str],
    rectangle_as_box_only: bool = False,
) -> list[ClassCount]:
    """
    Args:
        dataset_dicts: images in Detectron2's standard dataset format; not changed.
        thing_classes: names by contiguous id.
        rectangle_as_box_only: ``INPUT.RECTANGLE_AS_BOX_ONLY``; such masks do not count.

    Returns:
        One count a class, in their order. Crowds are not counted, nor are masks with
        ``mask_source`` "model", or masks that cover nothing of their image.
    """
    counts = [ClassCount(name) for name in thing_classes]
    classes, segmentations, sizes, boxes = [], [], [], []
    for image in dataset_dicts:
        size = (image.get("height", math.nan), image.get("width", math.nan))
        for annotation in image.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue
            counts[annotation["category_id"]].objects += 1
            if annotation.get("segmentation") and not is_from_model(annotation):
                classes.append(annotation["category_id"])
                segmentations.append(annotation["segmentation"])
                sizes.append(size)
                if rectangle_as_box_only:
                    boxes.append(
                        BoxMode.convert(
                            annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS
                        )
                    )
    boxes = np.array(boxes, dtype=np.float64) if boxes else None
    found = measure_masks(segmentations, np.array(sizes, dtype=np.float64).reshape(-1, 2), boxes)
    for k, is_counted in zip(classes, (found.state == MaskState.MASK) & ~found.is_rectangle):
        counts[k].masks += bool(is_counted)
    return counts


def choose_seen_classes(counts: Sequence[ClassCount], min_masks: int) -> list[str]:
    """
    The names of the classes with at least ``min_masks`` masks, and a table of all in the log.

    Raises:
        InputError: no class has so many, or ``min_masks`` is not positive.
    """
    if min_masks < 1:
        raise InputError(f"DATASETS.MIN_MASKS_PER_CLASS is {min_masks}; it must be 1 or more.")
    seen = [x.name for x in counts if x.masks >= min_masks]
    by_masks = sorted(counts, key=lambda x: (-x.masks, -x.objects, x.name))
    if not seen:
        found = ", ".join(f"{x.name} {x.masks}" for x in by_masks[:_MAX_CLASSES_NAMED])
        more = len(counts) - _MAX_CLASSES_NAMED
        raise InputError(
            f"DATASETS.SEEN_CLASSES is {AUTO!r}, but no class has DATASETS.MIN_MASKS_PER_CLASS "
            f"{min_masks} masks (crowds and masks of a model do not count). Masks: {found}"
            f"{f', and {more} classes with no more' if more > 0 else ''}. Lower the number, or "
            "name the seen classes."
        )
    rows = [
        (x.name, x.objects, x.masks, "seen" if x.masks >= min_masks else "unseen") for x in by_masks
    ]
    # Names such as "1e3" are no numbers.
    table = tabulate(rows, headers=["class", "objects", "masks", "split"], disable_numparse=[0])
    logger.info(
        f"DATASETS.SEEN_CLASSES {AUTO!r}: {len(seen)} of {len(counts)} classes have at least "
        f"DATASETS.MIN_MASKS_PER_CLASS {min_masks} masks in the training data\n{table}"
    )
    return seen


def _classes_of(dataset: str) -> list[str]:
    if not MetadataCatalog.get(dataset).get("thing_classes"):
        DatasetCatalog.get(dataset)  # json datasets learn their classes when they are read
    return list(MetadataCatalog.get(dataset).thing_classes)


def _count_training_data(cfg: CfgNode) -> list[ClassCount]:
    # In this order each json is read once: reading it makes its classes known.
    counts = []
    for dataset in dict.fromkeys(cfg.DATASETS.TRAIN):
        dataset_dicts = DatasetCatalog.get(dataset)
        rectangle_as_box_only = cfg.INPUT.RECTANGLE_AS_BOX_ONLY
        counts.append(count_objects(dataset_dicts, _classes_of(dataset), rectangle_as_box_only))
    training_classes(cfg)  # all datasets have the same
    return [
        ClassCount(
            of_class[0].name, sum(x.objects for x in of_class), sum(x.masks for x in of_class)
        )
        for of_class in zip(*counts)
    ]


def _ask_data(cfg: CfgNode, needs_seen_classes: bool) -> tuple[int, str]:
    """The number of classes, and the seen ones in the form of SEEN_CLASSES."""
    wanted = [f"DATASETS.SEEN_CLASSES {AUTO!r}"] if needs_seen_classes else []
    wanted += ["MODEL.ROI_HEADS.NUM_CLASSES 0"] if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0 else []
    try:
        counts = _count_training_data(cfg) if needs_seen_classes else []
        thing_classes = training_classes(cfg)
    except (KeyError, OSError, ValueError) as error:
        raise InputError(
            f"{' and '.join(wanted)} asks the training data, DATASETS.TRAIN "
            f"{tuple(cfg.DATASETS.TRAIN)}, but: {error} Where these are not at hand, use the "
            "config.yaml in the OUTPUT_DIR of the training, which has the answers."
        ) from error
    if not needs_seen_classes:
        return len(thing_classes), ""
    names = choose_seen_classes(counts, cfg.DATASETS.MIN_MASKS_PER_CLASS)
    return len(thing_classes), _spec_of(names, thing_classes)


def _spec_of(names: list[str], thing_classes: list[str]) -> str:
    """The names in a form that a config can hold and :func:`resolve_seen_classes` understands."""
    # The second is for what would be a number, a file or one of the named splits; the third for
    # names that have a comma, or begin or end with a space.
    specs = [", ".join(names), f", {', '.join(names)},"]
    for spec in (*specs, f", {json.dumps(names, ensure_ascii=False)}"):
        try:
            ast.literal_eval(spec)
            continue  # a config would read it as a number or a tuple
        except (SyntaxError, ValueError):
            pass
        try:
            if [thing_classes[i] for i in resolve_seen_classes(spec, thing_classes)] == names:
                return spec
        except ValueError:
            continue
    if len(names) == len(thing_classes):
        return "all"
    raise InputError(
        f"DATASETS.SEEN_CLASSES {AUTO!r} has chosen {names}, which cannot be written in one line; "
        "rename the class whose name is unusual."
    )
