"""
The way from a config and weights to a model that is known to fit, for every program.

Both may come from anybody, so nothing in them runs: configs are values, weights are tensors. What
does not fit the model is an error, where Detectron2 warns and goes on with random numbers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle  # nosec B403  # Only its exception is used.
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from torch import nn

from .class_splits import match_classes
from .config import add_teacher_student_mask_config
from .data import dataset_classes, register_json_datasets, resolve_auto_settings
from .errors import InputError
from .modeling import GTBoxInference, has_teacher
from .run_folder import find_model, find_moved, read_class_names

if TYPE_CHECKING:
    import supervision as sv

__all__ = [
    "TrainedModel",
    "check_weights",
    "choose_device",
    "find_model_classes",
    "find_test_dataset",
    "load_config",
    "load_model",
    "load_weights",
    "read_config",
    "refuse_missing",
    "safe_loading",
]

logger = logging.getLogger(__name__)

# Mask heads, and where their parameters are in the model.
_HEAD_PREFIXES = {"student": "roi_heads.mask_head.", "teacher": "roi_heads.teacher_mask_head."}
# Pickles that are Detectron2's own.
_TRUSTED_PREFIXES = (
    "detectron2://",
    "https://dl.fbaipublicfiles.com/detectron2/",
    "https://dl.fbaipublicfiles.com/detectron/",
)
_UNTRUSTED = (
    "a pickle can run any code when it is read. If you trust who made it, add "
    "MODEL.TRUST_PICKLED_WEIGHTS True to the command line."
)


@dataclass(frozen=True)
class TrainedModel:
    """
    A model whose weights fit.

    Attributes:
        cfg: its config.
        model: in evaluation mode.
        class_names: by contiguous class id.
        category_ids: the dataset's category ids, by contiguous class id.
        heads: mask heads that may be used, of "student" and "teacher".
    """

    cfg: CfgNode
    model: GeneralizedRCNN
    class_names: list[str]
    category_ids: list[int]
    heads: tuple[str, ...]

    def make_inputs(self, image_bgr: np.ndarray) -> dict:
        """
        Resize an image, uint8 (H, W, 3), as ``INPUT.MIN_SIZE_TEST`` says, for the model.

        Returns:
            "image" (float32, shape (3, H', W')), and "height" and "width" of ``image_bgr``.
        """
        height, width = image_bgr.shape[:2]
        size = self.cfg.INPUT.MIN_SIZE_TEST
        resize = T.ResizeShortestEdge([size, size], self.cfg.INPUT.MAX_SIZE_TEST)
        image = image_bgr[:, :, ::-1] if self.cfg.INPUT.FORMAT == "RGB" else image_bgr
        image = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(image.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    @torch.no_grad()
    def predict(self, image_bgr: np.ndarray, threshold: float | None = None) -> Instances:
        """
        Detect and segment the objects of an image, with the mask head of ``TEST.MASK_HEAD``.

        Args:
            image_bgr: uint8, shape (H, W, 3); not changed.
            threshold: smallest score, in [0, 1]; None: all that the config's
                ``SCORE_THRESH_TEST`` lets through.

        Returns:
            ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks`` (bool, shape (N, H, W))
            on the CPU, in the frame of ``image_bgr``.
        """
        found = self.model([self.make_inputs(image_bgr)])[0]["instances"].to("cpu")
        return found if threshold is None else found[found.scores >= threshold]

    @torch.no_grad()
    def masks_for(
        self, image_bgr: np.ndarray, boxes: Sequence, classes: Sequence[str]
    ) -> Instances:
        """
        Segment the objects in given boxes; nothing is detected.

        Args:
            image_bgr: uint8, shape (H, W, 3); not changed.
            boxes: shape (N, 4), XYXY in pixels of the image.
            classes: N names of the model's classes.

        Returns:
            As :meth:`predict`, one for each box in their order, with score 1.

        Raises:
            InputError: a class is unknown, a box has no area in the image, or the numbers of both
                differ.
        """
        height, width = image_bgr.shape[:2]
        given = torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)
        if len(given) != len(classes):
            raise InputError(f"There are {len(given)} boxes and {len(classes)} classes.")
        inside = Boxes(given.clone())
        inside.clip((height, width))
        for box, has_area in zip(given.tolist(), inside.nonempty()):
            if not has_area:
                raise InputError(f"The box {box}, XYXY, has no area in the {width}x{height} image.")
        inputs = self.make_inputs(image_bgr)
        targets = Instances(tuple(inputs["image"].shape[1:]))
        targets.gt_boxes = inside
        targets.gt_boxes.scale(targets.image_size[1] / width, targets.image_size[0] / height)
        ids = match_classes(list(classes), self.class_names, "masks_for")
        targets.gt_classes = torch.tensor(ids, dtype=torch.int64)
        (found,) = GTBoxInference(self.model)([{**inputs, "instances": targets}])
        return found["instances"].to("cpu")

    def to_supervision(self, found: Instances) -> sv.Detections:
        """What the other methods return, as detections of supervision with ``class_name``."""
        import supervision as sv

        detections = sv.Detections.from_detectron2({"instances": found})
        names = [self.class_names[i] for i in detections.class_id]
        detections.data["class_name"] = np.array(names, dtype=str)
        return detections


def load_model(
    model: str | os.PathLike,
    *,
    weights: str | None = None,
    opts: Sequence = (),
    score_threshold: float | None = None,
    heads: Sequence[str] | None = None,
) -> TrainedModel:
    """
    Read a config, build its model and load its weights.

    Args:
        model: folder of a training or of an export, or path of a yaml, see :func:`find_model`.
        weights: path or URL of a checkpoint; None = the folder's, or the yaml's ``MODEL.WEIGHTS``.
        opts: KEY, VALUE, KEY, VALUE, ...; they win over the file.
        score_threshold: of detections, in [0, 1]; None = the config's.
        heads: mask heads that will be used, of "student" and "teacher"; None = all that the model
            has. The only mask head of a model is its "student".

    Raises:
        InputError: config or weights are missing, cannot be read, are not trusted or do not fit one
            another; or the model does not have these mask heads.
    """
    config_file, found = find_model(model)
    if found:
        opts = ["MODEL.WEIGHTS", found, *opts]
    cfg = load_config(config_file, opts, weights=weights)
    if score_threshold is not None:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = score_threshold
    built = cfg.clone()
    # Nothing makes pseudo masks at inference, and "crf" may ask for a package that is not there.
    built.MODEL.PSEUDO_MASK.METHOD = "none"
    network = build_model(built)
    if not isinstance(network, GeneralizedRCNN) or not cfg.MODEL.MASK_ON:
        raise InputError("needed is a GeneralizedRCNN with MODEL.MASK_ON True; this is another.")
    existing = ("student", "teacher") if has_teacher(network) else ("student",)
    heads = existing if heads is None else tuple(heads)
    if set(heads) - set(existing):
        name = f"{cfg.MODEL.META_ARCHITECTURE!r} with {cfg.MODEL.ROI_HEADS.NAME!r}"
        raise InputError(f"No such head: {heads}; {name} has: {', '.join(existing)}.")
    load_weights(network, cfg, heads=heads)
    names, ids = find_model_classes(cfg, [cfg.MODEL.WEIGHTS, config_file])
    return TrainedModel(cfg, network.eval(), names, ids, heads)


# ---- configs ----


def load_config(config_file: str, opts: Sequence = (), *, weights: str | None = None) -> CfgNode:
    """
    Read the config of a trained model; arguments and errors as of :func:`load_model`.

    Returns:
        The config, not frozen, with NUM_CLASSES as the data say where it was 0, and
        ``MODEL.DEVICE`` "cpu" where there is no GPU.
    """
    cfg = read_config(config_file, opts, weights=weights)
    cfg = resolve_auto_settings(cfg, needs_seen_classes=False)
    choose_device(cfg)
    return cfg


def choose_device(cfg: CfgNode) -> None:
    """Set ``MODEL.DEVICE`` to "cpu", and say so, where it is a GPU and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: using the CPU.")
        cfg.MODEL.DEVICE = "cpu"


class _PlainConfig(CfgNode):
    """A config whose bases are files on this machine, without tags of Python."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        if filename.startswith(("http://", "https://")):
            # The download would be kept under a name that other downloads trust.
            raise InputError(f"_BASE_ is {filename}; a base must be a file on this machine.")
        return super().load_yaml_with_base(filename, allow_unsafe=False)


def read_config(config_file: str, opts: Sequence = (), *, weights: str | None = None) -> CfgNode:
    """
    Detectron2's defaults, this project's keys, a yaml and changes, in this order.

    Nothing in the yaml is run; ``MODEL.TRUST_PICKLED_WEIGHTS`` counts in ``opts`` alone, as whoever
    wrote the file may have written the pickle, too. Jsons that are named as datasets are
    registered; nothing of them is read.

    Args:
        config_file: path of a yaml; "" = none.
        opts: KEY, VALUE, KEY, VALUE, ...
        weights: for ``MODEL.WEIGHTS``, whatever file and changes say.

    Raises:
        InputError: the file, a key or a value is wrong, or names a pickle that is not trusted.
    """
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    trusts = cfg.MODEL.TRUST_PICKLED_WEIGHTS
    try:
        if config_file:
            _PlainConfig.load_yaml_with_base(config_file)
            cfg.merge_from_file(config_file, allow_unsafe=False)
            for key in ("TRAIN", "TEST"):
                cfg.DATASETS[key] = tuple(find_moved(x, config_file) for x in cfg.DATASETS[key])
    except Exception as error:  # of a file, of yaml, of types: of many kinds
        where = " ".join(str(error).split())
        raise InputError(
            f"The config {config_file} cannot be read, and nothing of it was run: {where}"
        ) from error
    if cfg.MODEL.TRUST_PICKLED_WEIGHTS and not trusts:
        cfg.MODEL.TRUST_PICKLED_WEIGHTS = False
        logger.warning(f"MODEL.TRUST_PICKLED_WEIGHTS of {config_file} is ignored: use --opts.")
    try:
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        changes = " ".join(str(x) for x in opts)
        raise InputError(f"The config changes {changes!r} are wrong: {error}") from error
    cfg.MODEL.WEIGHTS = str(weights or cfg.MODEL.WEIGHTS)
    _check_source(cfg.MODEL.WEIGHTS, cfg.MODEL.TRUST_PICKLED_WEIGHTS)
    if cfg.MODEL.LOAD_PROPOSALS and not cfg.MODEL.TRUST_PICKLED_WEIGHTS:
        raise InputError(f"MODEL.LOAD_PROPOSALS is True: {_UNTRUSTED}")
    register_json_datasets(cfg)
    return cfg


# ---- weights ----


def _check_source(weights: str, trust_pickled: bool) -> None:
    if "://" in weights and ".." in weights:
        raise InputError(
            f"The weights {weights!r} were refused: a URL with '..' leaves its folder."
        )
    # Wherever ".pkl" stands: releases of Detectron2 differ in what they drop before they look.
    is_pickle = ".pkl" in "".join(weights.split())
    if is_pickle and not trust_pickled and not weights.startswith(_TRUSTED_PREFIXES):
        raise InputError(f"The weights {weights!r} were refused: {_UNTRUSTED}")


def check_weights(weights: str, trust_pickled: bool = False) -> None:
    """
    Find weights (a path or URL; "" = none); those with a URL are downloaded.

    Raises:
        InputError: they are not there, cannot be fetched, or could run code and are not trusted.
    """
    _check_source(weights, trust_pickled)
    if not weights or os.path.isfile(weights):
        return
    if "://" not in weights:
        raise InputError(f"The weights {weights} do not exist; give the path of a checkpoint.")
    try:
        PathManager.get_local_path(weights.partition("?")[0])
    except Exception as error:  # of a network: of many kinds
        url = weights.replace("detectron2://", _TRUSTED_PREFIXES[1])
        cached = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
        raise InputError(
            f"The weights {url} cannot be fetched ({error}). Download them where there is a "
            f"network and give their path as MODEL.WEIGHTS, or put them at {cached}. Without any: "
            'MODEL.WEIGHTS "" trains from scratch, and tsmask demo needs no network.'
        ) from error


@contextlib.contextmanager
def safe_loading(
    model: nn.Module, weights: str, trust_pickled: bool = False
) -> Iterator[list[str]]:
    """
    Around the code that lets Detectron2 read weights: check them before, explain what it refuses.

    Detectron2 unpickles files that end in ".pkl". It reads all others with ``torch.load``, which
    since PyTorch 2.6 takes tensors and plain values alone.

    Yields:
        A list that then holds the names of the parameters of ``model`` that the weights lack, or
        have in another shape: the checkpointer keeps them to itself.

    Raises:
        InputError: as :func:`check_weights`, or they cannot be read.
    """
    check_weights(weights, trust_pickled)
    missing = []
    # Buffers are left to the checkpointer: it knows which of them old checkpoints lack.
    parameters = {name for name, _ in model.named_parameters()}
    hook = model.register_load_state_dict_post_hook(
        lambda _, found: missing.extend(x for x in found.missing_keys if x in parameters)
    )
    try:
        yield missing
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"The weights {weights} cannot be used: {error}. Allowed: Detectron2's form, "
            '{"model": {name of a parameter: tensor}}. Tensors under another key, such as '
            "'state_dict' or 'ema', must be saved under 'model' first; to go on with a training "
            "needs the same model."
        ) from error
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        # PyTorch's own message may advise to switch the check off.
        reason = "" if "weights_only" in str(error) else f" ({error})"
        raise InputError(
            f"The weights {weights} were refused, and nothing of them was run: they cannot be read "
            f"as a checkpoint. They are damaged, or hold more than tensors and plain values{reason}"
        ) from error
    finally:
        hook.remove()


def load_weights(model: nn.Module, cfg: CfgNode, heads: Sequence[str]) -> None:
    """
    Load ``MODEL.WEIGHTS`` into a model of ``cfg``.

    Args:
        heads: mask heads that will be used; the parameters of others may be missing.

    Raises:
        InputError: the checkpoint cannot be used, or lacks a parameter, or has it in another shape.
    """
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise InputError("MODEL.WEIGHTS is empty; give the checkpoint of a trained model.")
    with safe_loading(model, weights, cfg.MODEL.TRUST_PICKLED_WEIGHTS) as missing:
        DetectionCheckpointer(model).load(weights, checkpointables=[])
    unused = tuple(prefix for head, prefix in _HEAD_PREFIXES.items() if head not in heads)
    refuse_missing(weights, [x for x in missing if not x.startswith(unused)])


def refuse_missing(weights: str, missing: Sequence[str]) -> None:
    """Raise an InputError, of the checkpoint ``weights``, if it lacks parameters of the model."""
    if missing:
        raise InputError(
            f"The checkpoint {weights} lacks {len(missing)} parameters of the model, or has them "
            f"in another shape: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. "
            "Give the checkpoint and the config of the same training."
        )


# ---- classes and datasets ----


def find_model_classes(cfg: CfgNode, files: Sequence[str]) -> tuple[list[str], list[int]]:
    """
    The classes of the model that a config and its weights make: names and category ids.

    They are those of its training: as it has written them beside one of ``files`` (weights or
    config; "" = none), else from its data. The test data, which may list other classes under other
    ids, are asked last. Outputs that the training had no class for are "class 0", "class 1", ...

    Raises:
        InputError: the file of the training cannot be read, or has more classes than the model.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    written = (read_class_names(os.path.dirname(x)) for x in files if x)
    names, ids = next(filter(None, written), ([], []))
    if len(names) > num_classes:
        raise InputError(
            f"The training had {len(names)} classes, {', '.join(names[:20])}, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}; give the config and the weights of the "
            "same training."
        )
    if not names:
        for source in (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1]):
            with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
                names, ids = dataset_classes(source)
                if len(names) == num_classes:
                    break
        else:
            names, ids, source = [], [], f"{num_classes} classes without names"
        if source not in cfg.DATASETS.TRAIN:
            logger.warning(
                "Neither categories.json beside the weights nor DATASETS.TRAIN tells the classes; "
                f"taken are those of the test data, or none: {source}."
            )
    more = range(len(names), num_classes)
    first = max(ids, default=-1) + 1 - len(names)
    return names + [f"class {i}" for i in more], ids + [first + i for i in more]


def find_test_dataset(cfg: CfgNode) -> tuple[str, str]:
    """Json and image folder of the first dataset of ``DATASETS.TEST``; InputError without one."""
    name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
    if metadata is None or not os.path.isfile(metadata.get("json_file") or ""):
        raise InputError(
            f"DATASETS.TEST names {name!r}; needed is the path of a COCO json, or a dataset that "
            "has one. Detectron2 looks for its own under $DETECTRON2_DATASETS."
        )
    return metadata.json_file, metadata.image_root
