"""The config, the test dataset and the weights of a trained model, checked before use."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.utils.file_io import PathManager

from ..config import add_teacher_student_mask_config
from ..config_file import merge_config_file
from ..data import register_json_datasets, resolve_auto_settings
from ..modeling import TeacherStudentROIHeads
from ..weights_file import check_weights, safe_loading

__all__ = ["HEADS", "CocoDataset", "find_test_dataset", "load_config", "load_model"]

logger = logging.getLogger(__name__)

HEADS = ("student", "teacher")

# Where the parameters of a head stand in the model.
_HEAD_PREFIXES = {"student": "roi_heads.mask_head.", "teacher": "roi_heads.teacher_mask_head."}


@dataclass(frozen=True)
class CocoDataset:
    """
    A registered dataset that has a COCO json.

    Attributes:
        name: in Detectron2's catalog.
        annotations, image_root: path of the json and folder of the images.
        classes: names of the contiguous class ids.
        category_ids: the json's ids of the contiguous class ids.
    """

    name: str
    annotations: str
    image_root: str
    classes: list[str]
    category_ids: list[int]


def load_config(config_file: str, weights: str | None = None, opts: Sequence = ()) -> CfgNode:
    """
    Read a config for inference.

    Args:
        config_file: as for ``train_net.py``.
        weights: checkpoint; None = the config's ``MODEL.WEIGHTS``.
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the file.

    Returns:
        The config, not frozen, with ``MODEL.WEIGHTS`` set, and ``MODEL.DEVICE`` "cpu" where there
        is no GPU.

    Raises:
        ValueError: the file, a key, a value or the weights are wrong or lacking.
    """
    if not PathManager.isfile(config_file):
        raise ValueError(f"The config {config_file} does not exist; give the path of a yaml file.")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        merge_config_file(cfg, config_file)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"The config {config_file} cannot be read: {error}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        changes = " ".join(str(x) for x in opts)
        raise ValueError(f"The config changes {changes!r} are wrong: {error}") from error

    weights = str(weights or cfg.MODEL.WEIGHTS)
    if not weights:
        raise ValueError(
            f"The config {config_file} names no MODEL.WEIGHTS; give the checkpoint of a trained "
            "model, such as the model_final.pth beside its config.yaml."
        )
    check_weights(weights, cfg.MODEL.TRUST_PICKLED_WEIGHTS)
    if "://" not in weights and not os.path.isfile(weights):
        raise ValueError(
            f"The weights {weights} do not exist; give the checkpoint of a trained model, such as "
            "the model_final.pth in the OUTPUT_DIR of train_net.py."
        )
    cfg.MODEL.WEIGHTS = weights
    register_json_datasets(cfg)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=False)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: using the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def find_test_dataset(cfg: CfgNode) -> CocoDataset:
    """
    The first dataset of ``DATASETS.TEST``, loaded so that its classes are known.

    Raises:
        ValueError: there is none, it is not registered or has no COCO json, or the model has
            another number of classes.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name the dataset on which the model should run.")
    name = cfg.DATASETS.TEST[0]
    if len(cfg.DATASETS.TEST) > 1:
        logger.warning(f"Of DATASETS.TEST {tuple(cfg.DATASETS.TEST)} only {name!r} is used.")
    if name not in DatasetCatalog.list():
        raise ValueError(
            f"DATASETS.TEST names {name!r}, which is not registered; register it first with "
            "teacher_student_mask.register_partial_coco(name, json_file, image_root), or name the "
            "path of a COCO json."
        )
    metadata = MetadataCatalog.get(name)
    if not metadata.get("json_file") or metadata.get("image_root") is None:
        raise ValueError(
            f"The dataset {name!r} of DATASETS.TEST has no json_file and image_root in its "
            "metadata; register it as a COCO json, with teacher_student_mask.register_partial_coco."
        )
    if not PathManager.isfile(metadata.json_file):
        raise ValueError(
            f"The annotations {metadata.json_file} of the dataset {name!r} do not exist; Detectron2"
            " looks for its own datasets under $DETECTRON2_DATASETS (default: ./datasets)."
        )
    DatasetCatalog.get(name)  # json datasets learn their classes when they are read
    classes = list(metadata.thing_classes)
    if len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ValueError(
            f"The dataset {name!r} has {len(classes)} classes, but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}; name in DATASETS.TEST a dataset with the classes "
            "of the model."
        )
    # Without a mapping the json's ids are the contiguous ones, as for Detectron2's evaluator.
    mapping = metadata.get("thing_dataset_id_to_contiguous_id") or {
        i: i for i in range(len(classes))
    }
    category_ids = {contiguous: i for i, contiguous in mapping.items()}
    return CocoDataset(
        name=name,
        annotations=PathManager.get_local_path(metadata.json_file),
        image_root=PathManager.get_local_path(metadata.image_root),
        classes=classes,
        category_ids=[category_ids[i] for i in range(len(classes))],
    )


def load_model(
    cfg: CfgNode, heads: Sequence[str] | None = None
) -> tuple[GeneralizedRCNN, tuple[str, ...]]:
    """
    Build a model and load ``MODEL.WEIGHTS`` into it.

    Where a checkpoint lacks a parameter, ``DetectionCheckpointer`` only warns and the model would
    run with random numbers; here that is an error.

    Args:
        cfg: see :func:`load_config`; not changed.
        heads: the mask heads that will be used, of "student" and "teacher"; None = all that the
            model has. The mask head of a model without a teacher is its "student".

    Returns:
        The model in evaluation mode, and ``heads``, each once.

    Raises:
        ValueError: the model has no mask head of that name or is no :class:`GeneralizedRCNN` with
            masks and an RPN, or the checkpoint cannot be read or lacks a parameter that these
            heads need.
    """
    cfg = cfg.clone()
    cfg.defrost()
    # Nothing makes pseudo masks at inference, and "crf" would ask for its package here.
    cfg.MODEL.PSEUDO_MASK.METHOD = "none"
    model = build_model(cfg)
    if (
        not isinstance(model, GeneralizedRCNN)
        or model.proposal_generator is None
        or not cfg.MODEL.MASK_ON
    ):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, MODEL.MASK_ON is "
            f"{cfg.MODEL.MASK_ON} and MODEL.LOAD_PROPOSALS is {cfg.MODEL.LOAD_PROPOSALS}; what "
            "runs here is a GeneralizedRCNN with an RPN and a mask head."
        )
    has_teacher = isinstance(model.roi_heads, TeacherStudentROIHeads)
    existing = HEADS if has_teacher else HEADS[:1]
    heads = existing if heads is None else tuple(dict.fromkeys(heads))
    if not heads or set(heads) - set(existing):
        raise ValueError(
            f"heads is {heads!r}; a model with MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME!r} "
            f"has: {', '.join(existing)}."
        )
    _load_weights(model, cfg, heads)
    return model.eval(), heads


def _load_weights(model: GeneralizedRCNN, cfg: CfgNode, heads: tuple[str, ...]) -> None:
    weights, missing = cfg.MODEL.WEIGHTS, []
    # The checkpointer keeps for itself what was missing; parameters of another shape are among it.
    hook = model.register_load_state_dict_post_hook(
        lambda _, incompatible: missing.extend(incompatible.missing_keys)
    )
    try:
        with safe_loading(weights, cfg.MODEL.TRUST_PICKLED_WEIGHTS):
            DetectionCheckpointer(model).load(weights, checkpointables=[])
    except (EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"The weights {weights} cannot be read as a checkpoint: {error}"
        ) from error
    finally:
        hook.remove()

    unused = tuple(prefix for head, prefix in _HEAD_PREFIXES.items() if head not in heads)
    # Buffers are left to the checkpointer: it knows which of them old checkpoints lack.
    parameters = {name for name, _ in model.named_parameters()}
    needed = [x for x in missing if x in parameters and not x.startswith(unused)]
    if not needed:
        return
    only_teacher = all(x.startswith(_HEAD_PREFIXES["teacher"]) for x in needed)
    hint = ", or run the head 'student' alone" if only_teacher and "student" in heads else ""
    raise ValueError(
        f"The checkpoint {weights} lacks {len(needed)} parameters of the model, or has them in "
        f"another shape: {', '.join(needed[:8])}{', ...' if len(needed) > 8 else ''}. Give the "
        f"checkpoint and the config of the same training{hint}."
    )
