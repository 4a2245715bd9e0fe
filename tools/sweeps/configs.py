"""Configs and lists of seen classes as a sweep is given them; what is wrong is found before."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from teacher_student_mask import add_teacher_student_mask_config, resolve_seen_classes
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.data import register_json_datasets, resolve_auto_settings

__all__ = [
    "UsageError",
    "class_names",
    "common_classes",
    "config_name",
    "count_seen_classes",
    "flatten",
    "folder_name",
    "load_config",
    "seen_classes_value",
    "seen_ids",
]

# Keys that the sweep sets for each run.
OWN_KEYS = ("SEED", "OUTPUT_DIR")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what would be right."""


def load_config(path: str, opts: Sequence[str], has_seen_sets: bool) -> CfgNode:
    """
    Read a config with the overrides of the command line.

    Args:
        path: of the yaml.
        opts: KEY VALUE overrides.
        has_seen_sets: whether the sweep sets DATASETS.SEEN_CLASSES.

    Raises:
        UsageError: it is missing or wrong, or cannot be swept over.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--configs {path}: no such file.")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        merge_config_file(cfg, path)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--configs {path}: {error}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--opts {' '.join(opts)}: {error}") from error
    cfg = _with_classes(cfg, path, needs_seen_classes=not has_seen_sets)

    own_keys = OWN_KEYS + (("DATASETS.SEEN_CLASSES",) if has_seen_sets else ())
    for key in opts[::2]:
        if key in own_keys:
            raise UsageError(f"--opts {key}: the sweep sets this key itself, for each run.")
    if not cfg.DATASETS.TEST:
        raise UsageError(f"{path}: DATASETS.TEST is empty, so there would be no results.")
    if has_seen_sets and cfg.TEST.SEEN_CLASSES:
        raise UsageError(
            f"{path} sets TEST.SEEN_CLASSES: it evaluates on other classes than it trains on, as "
            "the oracle does, and does not depend on --seen-sets. Sweep over it on its own."
        )
    return cfg


def _with_classes(cfg: CfgNode, path: str, needs_seen_classes: bool) -> CfgNode:
    try:
        register_json_datasets(cfg)
        if any(name not in DatasetCatalog.list() for name in cfg.DATASETS.TRAIN):
            return cfg  # the training program may know them
        return resolve_auto_settings(cfg, needs_seen_classes)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def config_name(path: str) -> str:
    """Folder and stem, because configs of both directions have the same file names."""
    parts = Path(os.path.normpath(path)).with_suffix("").parts
    if ".." in parts:
        parts = Path(path).resolve().with_suffix("").parts
    return "/".join(folder_name(part) for part in parts[-2:])


def folder_name(text: str) -> str:
    """The text as the name of one folder: below its parent, in one line, and never "." or ".."."""
    name = re.sub(r"[^\w.-]", "_", text)
    return name.replace(".", "_") if set(name) <= {"."} else name


def class_names(cfg: CfgNode) -> list[str] | None:
    """
    The classes of the training dataset, None if it is not registered here.

    Raises:
        UsageError: it cannot be read.
    """
    name = cfg.DATASETS.TRAIN[0]
    if name not in DatasetCatalog.list():
        return None
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        # The names of many datasets are known only once their json has been read.
        try:
            DatasetCatalog.get(name)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The dataset {name!r} cannot be read: {error}. Datasets are looked for under "
                "$DETECTRON2_DATASETS (default: ./datasets)."
            ) from error
    return list(metadata.thing_classes)


def common_classes(configs: Mapping[str, CfgNode]) -> list[str]:
    """
    The classes of all configs, which are {path: config}.

    Raises:
        UsageError: they are not the same, or not known here.
    """
    classes = {path: class_names(cfg) for path, cfg in configs.items()}
    first = next(iter(configs))
    for path, names in classes.items():
        if names is None:
            raise UsageError(
                f"{path}: the dataset {configs[path].DATASETS.TRAIN[0]!r} is not registered when "
                "this project is imported, so --seen-sets cannot be looked up in its classes."
            )
        if names != classes[first]:
            raise UsageError(f"--seen-sets: {first} and {path} have different classes.")
    return classes[first]


def count_seen_classes(cfg: CfgNode) -> int | None:
    """
    How many classes DATASETS.SEEN_CLASSES names; None if the dataset is not registered here.

    Raises:
        UsageError: it names what is no class.
    """
    classes = class_names(cfg)
    if classes is None:
        return None
    try:
        return len(resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, classes))
    except ValueError as error:
        raise UsageError(str(error)) from error


def seen_ids(path: str, classes: list[str]) -> list[int]:
    """
    Contiguous ids of the classes in a list.

    Raises:
        UsageError: no such file, or it names what is no class.
    """
    if not os.path.isfile(path):
        raise UsageError(f"--seen-sets {path}: no such file.")
    try:
        return resolve_seen_classes(path, classes)
    except ValueError as error:
        raise UsageError(f"--seen-sets {path}: {error}") from error


def seen_classes_value(cfg: CfgNode, path: str, classes: list[str]) -> str:
    """
    DATASETS.SEEN_CLASSES for a list: the names, so that the config that a run saves does not need
    the file; its path if the names cannot be written in one line.
    """
    ids = seen_ids(path, classes)
    names = ", ".join(classes[i] for i in ids)
    with contextlib.suppress(ValueError):
        cfg = cfg.clone()
        cfg.merge_from_list(["DATASETS.SEEN_CLASSES", names])
        if resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, classes) == ids:
            return names
    return str(Path(path).resolve())


def flatten(cfg: CfgNode) -> dict:
    """All keys with their values: {"SOLVER.BASE_LR": 0.02, ...}, in plain Python types."""

    def walk(tree: dict, prefix: str) -> dict:
        flat = {}
        for key, value in tree.items():
            is_tree = isinstance(value, dict)
            flat.update(walk(value, f"{prefix}{key}.") if is_tree else {prefix + key: value})
        return flat

    return walk(yaml.safe_load(cfg.dump()), "")
