"""Masks of models that are prompted with a box: Segment Anything and its relatives."""

import importlib
import os

from .errors import InputError

__all__ = ["load_predictor"]

# Name -> package. The first two share an interface, SAM 2's builder takes a config in the place of
# the architecture.
_PACKAGES = {"sam": "segment_anything", "mobile_sam": "mobile_sam", "sam2": "sam2"}


def load_predictor(model: str, weights: str | os.PathLike, device: str = "cpu"):
    """
    Load a model that is prompted with boxes.

    Args:
        model: "sam:vit_b" (also vit_l, vit_h), "mobile_sam:vit_t",
            "sam2:configs/sam2.1/sam2.1_hiera_t.yaml" (any config of the package), or
            "MODULE:FUNCTION", which is called with ``weights`` and ``device``. The packages are not
            installed with this project.
        weights: path of the checkpoint.
        device: of PyTorch.

    Returns:
        What has two methods of segment-anything's ``SamPredictor``: ``set_image(image)``, uint8
        (H, W, 3), RGB, and ``predict(box=box, multimask_output=False)``, XYXY in pixels, float
        (4,), which returns masks (N, H, W), above 0 inside; scores (N,) in [0, 1]; and more.

    Raises:
        InputError: the name is wrong, the package or the checkpoint is not there.
    """
    name, _, kind = model.partition(":")
    if not name or not kind:
        allowed = ", ".join(f"{x}:..." for x in _PACKAGES)
        raise InputError(f"The model is {model!r}; allowed: {allowed}, or MODULE:FUNCTION.")
    if not os.path.isfile(weights):
        raise InputError(f"The weights {os.fspath(weights)} do not exist.")
    try:
        if name == "sam2":
            build = importlib.import_module("sam2.build_sam").build_sam2
            predictor = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
            return predictor(build(kind, os.fspath(weights), device=device))
        module = importlib.import_module(_PACKAGES.get(name, name))
    except ImportError as error:
        package = _PACKAGES.get(name, name).replace("_", "-")
        raise InputError(f"{model!r} needs {error.name or package}: install {package}.") from error
    if name not in _PACKAGES:
        if not hasattr(module, kind):
            raise InputError(f"The module {name} has no function {kind!r}.")
        return getattr(module, kind)(os.fspath(weights), device)
    if kind not in module.sam_model_registry:
        allowed = ", ".join(module.sam_model_registry)
        raise InputError(f"{model!r}: {name} has no {kind!r}; allowed: {allowed}.")
    network = module.sam_model_registry[kind](checkpoint=os.fspath(weights))
    return module.SamPredictor(network.to(device).eval())
