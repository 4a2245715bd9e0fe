"""What programs that run a trained model begin with: config, weights, classes, output folder."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from inference.coco_results import Classes
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.data import register_json_datasets, resolve_auto_settings
from teacher_student_mask.engine import read_class_names
from teacher_student_mask.weights_file import check_weights, safe_loading

__all__ = [
    "UsageError",
    "add_model_arguments",
    "add_opts_argument",
    "add_weights_arguments",
    "check_output_dir",
    "find_classes",
    "make_predictor",
    "setup_cfg",
]

logger = logging.getLogger("teacher_student_mask")


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what would be right."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which model runs, and where its results go; --opts comes last."""
    add_weights_arguments(parser)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    add_opts_argument(parser)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config-file and --weights."""
    add = parser.add_argument
    add("--config-file", required=True, metavar="YAML", help="config of the model")
    add("--weights", metavar="PTH", help="checkpoint (default: the config's MODEL.WEIGHTS)")


def add_opts_argument(parser: argparse.ArgumentParser) -> None:
    """Add --opts, which takes all that follows it: the last argument."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the config; everything after --opts belongs to it",
    )


def setup_cfg(
    config_file: str, weights: str | None, score_threshold: float, opts: Sequence[str]
) -> CfgNode:
    """
    Build the config of a program that runs a trained model.

    Args:
        config_file: path of the yaml.
        weights: path of the checkpoint; None = the config's.
        score_threshold: of detections, in [0, 1].
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the file.

    Returns:
        The config, frozen; with MODEL.DEVICE "cpu" where there is no GPU.

    Raises:
        UsageError: the config or the weights are missing, or a key or value is wrong.
    """
    if not os.path.isfile(config_file):
        raise UsageError(f"--config-file {config_file}: no such file.")
    if not 0 <= score_threshold <= 1:
        raise UsageError(f"--score-threshold must be in [0, 1], got {score_threshold}.")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        merge_config_file(cfg, config_file)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--config-file {config_file}: {error}") from error
    try:
        cfg.merge_from_list(opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--opts {' '.join(opts)}: {error}") from error

    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    _check_weights(cfg, config_file)
    try:
        register_json_datasets(cfg)
        cfg = resolve_auto_settings(cfg, needs_seen_classes=False)
    except ValueError as error:
        raise UsageError(f"--config-file {config_file}: {error}") from error
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = score_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = score_threshold
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: using the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def make_predictor(cfg: CfgNode) -> DefaultPredictor:
    """
    Build the model and load its weights.

    Raises:
        UsageError: the weights hold more than tensors, or could run code.
    """
    try:
        with safe_loading(cfg.MODEL.WEIGHTS, cfg.MODEL.TRUST_PICKLED_WEIGHTS):
            return DefaultPredictor(cfg)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_weights(cfg: CfgNode, config_file: str) -> None:
    weights = cfg.MODEL.WEIGHTS
    try:
        check_weights(weights, cfg.MODEL.TRUST_PICKLED_WEIGHTS)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if "://" in weights or os.path.isfile(weights):
        return
    if weights:
        message = f"The weights {weights} do not exist."
    else:
        message = f"{config_file} names no MODEL.WEIGHTS, and a model without them finds nothing."
    nearby = Path(config_file).with_name("model_final.pth")
    hint = f"There are weights next to the config: --weights {nearby}" if nearby.is_file() else ""
    raise UsageError(f"{message} {hint or 'Give --weights.'}")


def find_classes(cfg: CfgNode) -> Classes:
    """
    The classes of the config's first test or training dataset that can be loaded.

    If there is none, or it has another number of classes than the model, those that the training
    has written beside the weights; without them the classes are "class 0", "class 1", ... and
    their ids the contiguous ones.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    problems = []
    for name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        if name not in DatasetCatalog.list():
            problems.append(f"{name} is not registered")
            continue
        metadata = MetadataCatalog.get(name)
        if not metadata.get("thing_classes"):
            # The names of many datasets are known only once their json has been read.
            try:
                DatasetCatalog.get(name)
            except (KeyError, OSError, ValueError) as error:
                problems.append(f"{name}: {error}")
                continue
        names = list(metadata.get("thing_classes", []))
        if len(names) != num_classes:
            problems.append(f"{name} has {len(names)} classes, the model {num_classes}")
            continue
        contiguous_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        dataset_ids = {contiguous: i for i, contiguous in contiguous_ids.items()}
        return Classes(names, [dataset_ids.get(i, i) for i in range(num_classes)])
    found = _classes_beside(cfg.MODEL.WEIGHTS, problems)
    if found is not None and len(found.names) == num_classes:
        return found
    logger.warning(
        "The classes have no names, and their ids are contiguous: "
        f"{'; '.join(problems) or 'the config names no dataset'}. "
        "Datasets are looked for under $DETECTRON2_DATASETS (default: ./datasets)."
    )
    return Classes([f"class {i}" for i in range(num_classes)], list(range(num_classes)))


def _classes_beside(weights: str, problems: list[str]) -> Classes | None:
    # Of weights that are not a file of this machine there is no folder to look into.
    try:
        categories = read_class_names(Path(weights).parent) if os.path.isfile(weights) else None
    except ValueError as error:
        problems.append(str(error))
        return None
    if categories is None:
        return None
    return Classes([x["name"] for x in categories], [x["id"] for x in categories])


def check_output_dir(output_dir: Path) -> None:
    """
    Make the folder.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UsageError(f"Cannot write to --output-dir {output_dir}: {error}") from error
