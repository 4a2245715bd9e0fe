"""The student without this project: a plain Detectron2 model, TorchScript and ONNX."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import detectron2
import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import detection_utils as utils
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_model,
)
from torch import nn

from .errors import InputError
from .trained_model import TrainedModel

__all__ = ["FORMATS", "Agreement", "compare", "detect", "export_student", "plain_config"]

FORMATS = ("plain", "torchscript", "onnx")

# What a graph returns for an image, in this order; see :func:`detect`.
OUTPUTS = ("boxes", "scores", "classes", "masks")

# The first in which ROIAlign knows the half-pixel shift of Detectron2's ROIAlignV2 is 16.
ONNX_OPSET = 17

# Largest differences that count as the same: boxes in pixels of the model's input, scores and mask
# probabilities. Of a graph: float32 has 24 bits, so a coordinate around 1,000 is stored in steps of
# 6e-5, and another runtime adds some thousand products in another order. Masks are pooled from the
# boxes, so the rounding of a box is magnified in them. What was measured stands in docs/DEPLOY.md.
TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-2}
# Of a plain model boxes and scores are those of the same operations. Of the masks our heads compute
# one class each, and add the products of the last layer in another order.
PLAIN_TOLERANCES = {"boxes": 1e-4, "scores": 1e-4, "masks": 1e-4}
# Of the objects this many may have no counterpart: two boxes whose IoU or score lies on a
# threshold up to rounding may change places.
MAX_UNMATCHED = 0.01
# Height and width of random images. The first is traced: the others and photos differ from it.
RANDOM_SIZES = ((256, 320), (320, 192), (200, 200))

# Ours -> what computes the same in Detectron2, where it can.
_ROI_HEADS = {
    "TeacherStudentROIHeads": "StandardROIHeads",
    "PartiallySupervisedROIHeads": "StandardROIHeads",
}
_MASK_HEADS = {"MaskRCNNConvMultiUpsampleHead": "MaskRCNNConvUpsampleHead"}
# What else of a model can be somebody's own.
_REGISTRIES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_BOX_HEAD": ROI_BOX_HEAD_REGISTRY,
    "ROI_MASK_HEAD": ROI_MASK_HEAD_REGISTRY,
}

# What is written last, so that a folder which has it is an export.
_DESCRIPTION = "deployment.json"
_FILES = ("config.yaml", "model.pth", "model.ts", "model.onnx", "run_onnx.py", "classes.json")

# Returns OUTPUTS of an image, float32 (3, H, W).
Detector = Callable[[torch.Tensor], tuple[np.ndarray, ...]]


def export_student(
    trained: TrainedModel,
    output_dir: str | Path,
    formats: Sequence[str] = ("plain",),
    check_images: Sequence[str | Path] = (),
) -> dict[str, str]:
    """
    Write the student (or the only mask head of a baseline) without this project.

    Every format runs on the same images as the model first, and must find the same. Nothing is
    written unless all do.

    Args:
        trained: the model; not changed.
        output_dir: made if new; an earlier export in it is replaced.
        formats: of :data:`FORMATS`.
        check_images: files on which the formats are compared, beside random images.

    Returns:
        {name of the file of each format: what was compared}.

    Raises:
        InputError: the model cannot be written in a format, or finds something else in it; or the
            folder holds files of these names that no export has written.
    """
    output_dir = Path(output_dir)
    taken = [name for name in _FILES if (output_dir / name).exists()]
    if taken and not (output_dir / _DESCRIPTION).exists():
        raise InputError(
            f"{output_dir} holds {', '.join(taken)}, which no export has written (the folder of a "
            "training?); name another folder."
        )
    if set(formats) - set(FORMATS) or not formats:
        raise InputError(f"The formats are {list(formats)}; allowed: {', '.join(FORMATS)}.")
    packages = ("onnx", "onnxruntime") if "onnx" in formats else ()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"The format onnx needs {' and '.join(missing)}, not installed here: pip install -c "
            "constraints.txt onnx onnxruntime"
        )
    model = copy.deepcopy(trained.model).cpu().requires_grad_(False)
    if hasattr(model.roi_heads, "teacher_mask_head"):
        model.roi_heads.teacher_mask_head = None
        model.roi_heads.test_mask_head = "student"
    images = _check_images(trained, check_images)
    files, reports = {}, {}
    if "plain" in formats:
        config, files["model.pth"], reports["model.pth"] = _plain(trained.cfg, model, images)
        config.MODEL.WEIGHTS = str(output_dir / "model.pth")
        changes = {"VERSION": config.VERSION, **_changed_keys(config, get_cfg())}
        files["config.yaml"] = yaml.safe_dump(changes).encode()
    for kind, name, make in (
        ("torchscript", "model.ts", _trace),
        ("onnx", "model.onnx", _to_onnx),
    ):
        if kind in formats:
            files[name], reports[name] = _graph(kind, make, model, images)
    description = _describe(trained.cfg, trained.class_names, reports)
    files["classes.json"] = (json.dumps(trained.class_names, indent=1) + "\n").encode()
    files[_DESCRIPTION] = (json.dumps(description, indent=1) + "\n").encode()
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (output_dir / name).write_bytes(content)
    if "onnx" in formats:
        shutil.copy(Path(__file__).with_name("run_onnx.py"), output_dir)
    return reports


def _check_images(trained: TrainedModel, paths: Sequence[str | Path]) -> list[torch.Tensor]:
    """Random images, then files: float32, shape (3, H, W) each, as the model takes them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) * 255 for size in RANDOM_SIZES]
    for path in paths:
        try:
            images.append(trained.make_inputs(utils.read_image(str(path), "BGR"))["image"])
        except (OSError, ValueError) as error:
            raise InputError(f"The image {path} cannot be read: {error}") from error
    return images


# ---- plain Detectron2 ----


def plain_config(cfg: CfgNode) -> CfgNode:
    """
    The values of a config for Detectron2's own keys.

    Args:
        cfg: with this project's keys; not changed.

    Returns:
        A config with Detectron2's keys alone, whose ROI heads and mask head are Detectron2's where
        they compute the same as ours.

    Raises:
        InputError: what the student computes depends on a part that Detectron2 does not have.
    """
    plain = get_cfg()
    _copy_values(cfg, plain)
    plain.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    if cfg.MODEL.ROI_MASK_PRIOR.NAME:
        raise InputError(
            f"MODEL.ROI_MASK_PRIOR.NAME is {cfg.MODEL.ROI_MASK_PRIOR.NAME!r}; a plain Mask R-CNN "
            "has no mask prior."
        )
    mask_head = plain.MODEL.ROI_MASK_HEAD
    if mask_head.NAME in _MASK_HEADS:
        if cfg.MODEL.ROI_MASK_HEAD.NUM_DECONV != 1:
            raise InputError(
                f"MODEL.ROI_MASK_HEAD.NUM_DECONV is {cfg.MODEL.ROI_MASK_HEAD.NUM_DECONV}; the mask "
                "head of a plain Mask R-CNN has one deconvolution."
            )
        mask_head.NAME = _MASK_HEADS[mask_head.NAME]
    for key, registry in _REGISTRIES.items():
        value = plain.MODEL[key]
        name = value if isinstance(value, str) else value.NAME
        package = registry.get(name).__module__.partition(".")[0]
        if package != "detectron2":
            raise InputError(
                f"MODEL.{key} is {name!r}, of the package {package}; a plain Mask R-CNN does not "
                "have it."
            )
    if plain.MODEL.ROI_HEADS.NAME not in _ROI_HEADS:
        raise InputError(
            f"MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME!r}; what can be exported: "
            f"{', '.join(_ROI_HEADS)}."
        )
    plain.MODEL.ROI_HEADS.NAME = _ROI_HEADS[plain.MODEL.ROI_HEADS.NAME]
    return plain


def _copy_values(source: CfgNode, target: CfgNode) -> None:
    for key, value in target.items():
        if isinstance(value, CfgNode):
            _copy_values(source[key], value)
        else:
            target[key] = source[key]


def _changed_keys(cfg: CfgNode, default: CfgNode) -> dict:
    # Nested; the keys of another release of Detectron2 may differ.
    changes = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            below = _changed_keys(value, default[key])
            changes.update({key: below} if below else {})
        elif value != default[key]:
            changes[key] = value
    return changes


def _plain(
    cfg: CfgNode, model: nn.Module, images: Sequence[torch.Tensor]
) -> tuple[CfgNode, bytes, str]:
    """The config and the weights of a plain model, and what was compared."""
    config = plain_config(cfg)
    config.MODEL.DEVICE = "cpu"
    plain = build_model(config).eval()
    config.MODEL.DEVICE = cfg.MODEL.DEVICE
    try:
        plain.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise InputError(f"The weights do not fit a plain Mask R-CNN: {error}") from error
    predictors = [x.roi_heads.box_predictor for x in (model, plain)]
    thresholds = [x.test_score_thresh for x in predictors]
    # With the threshold of the config a model may find nothing in noise.
    for predictor in predictors:
        predictor.test_score_thresh = 0.0
    agreement = compare(_run(model), _run(plain), images, PLAIN_TOLERANCES)
    for predictor, threshold in zip(predictors, thresholds):
        predictor.test_score_thresh = threshold
    if not agreement.is_good():
        raise InputError(f"The plain model finds something else than the model ({agreement}).")
    weights = io.BytesIO()
    torch.save({"model": plain.state_dict()}, weights)
    return config, weights.getvalue(), f"compared with the model: {agreement}"


# ---- graphs ----


def detect(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Run a Mask R-CNN without its postprocessing.

    Args:
        model: a ``GeneralizedRCNN`` in evaluation mode.
        image: float32, shape (3, H, W), in 0-255, channels in the order of ``INPUT.FORMAT``,
            already resized.

    Returns:
        N objects, best score first: boxes, float32 (N, 4), x0 y0 x1 y1 in pixels of ``image``;
        scores, float32 (N,), in [0, 1]; classes, int64 (N,); masks, float32 (N, M, M),
        probabilities on a grid over each box.
    """
    found = model.inference([{"image": image}], do_postprocess=False)[0]
    return found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks[:, 0]


def _run(model: Callable) -> Detector:
    @torch.no_grad()
    def run(image: torch.Tensor) -> tuple[np.ndarray, ...]:
        found = detect(model, image) if hasattr(model, "roi_heads") else model(image)
        return tuple(x.numpy() for x in found)

    return run


class _TraceableDetector(nn.Module):
    """:func:`detect` as a module in whose trace the number of objects is not a constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            # Detectron2 counts objects with len() in these, which makes a traced number a constant.
            # The method may return a tensor, which a trace follows. Its own TracingAdapter does the
            # same, but cannot be imported in Detectron2 0.6, which asks for caffe2 there.
            for name in ("fast_rcnn", "mask_head"):
                module = importlib.import_module(f"detectron2.modeling.roi_heads.{name}")
                count = mock.patch.object(module, "len", lambda x: x.__len__(), create=True)
                stack.enter_context(count)
            return detect(self.model, image)


def _trace(detector: nn.Module, image: torch.Tensor) -> tuple[bytes, Detector]:
    """The content of a file for ``torch.jit.load``, and what runs it."""
    buffer = io.BytesIO()
    traced = torch.jit.trace(detector, (image,), check_trace=False)
    torch.jit.save(traced, buffer)
    return buffer.getvalue(), _run(traced)


def _to_onnx(detector: nn.Module, image: torch.Tensor) -> tuple[bytes, Detector]:
    """The content of an ONNX file, and what runs it in onnxruntime, on the CPU."""
    import onnxruntime
    import torchvision  # noqa: F401  Its operators are known to the exporter once it is imported.

    buffer = io.BytesIO()
    torch.onnx.export(
        detector,
        (image,),
        buffer,
        dynamo=False,  # The newer exporter does not follow Detectron2's code.
        opset_version=ONNX_OPSET,
        input_names=["image"],
        output_names=list(OUTPUTS),
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "objects"} for name in OUTPUTS},
        },
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # Not its advice on shapes of intermediate values.
    session = onnxruntime.InferenceSession(
        buffer.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    return buffer.getvalue(), lambda x: tuple(session.run(list(OUTPUTS), {"image": x.numpy()}))


def _graph(
    kind: str, make: Callable, model: nn.Module, images: Sequence[torch.Tensor]
) -> tuple[bytes, str]:
    """A graph, and what was compared."""
    try:
        # The tracer warns wherever a value becomes a constant; that the result is right on other
        # images is tested on other images.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content, run = make(_TraceableDetector(model).eval(), images[0])
    except Exception as error:  # Whatever an operator that no graph has raises.
        raise InputError(
            f"The format {kind}: the model has a part that cannot be exported: "
            f"{type(error).__name__}: {error}"
        ) from error
    agreement = compare(_run(model), run, images)
    if not agreement.is_good():
        raise InputError(
            f"The format {kind}: the graph finds something else than the model ({agreement})."
        )
    report = f"compared with the model: {agreement}"
    if agreement.objects == 0:
        report += ". Nothing was found on them, so give images with objects (--check-images)"
    return content, report


# ---- comparing ----


@dataclass
class Agreement:
    """
    How much two runtimes agree on some images.

    Attributes:
        tolerances: of "boxes", "scores" and "masks"; see :data:`TOLERANCES`.
        images: number of images.
        objects: of the first runtime.
        unmatched: objects of one that the other does not have.
        differences: the largest of the others' boxes, scores and masks.
    """

    tolerances: dict[str, float]
    images: int = 0
    objects: int = 0
    unmatched: int = 0
    differences: dict[str, float] = field(default_factory=dict)

    def is_good(self) -> bool:
        """Whether all differences are those of rounding."""
        return self.unmatched <= MAX_UNMATCHED * self.objects and all(
            self.differences[name] <= limit for name, limit in self.tolerances.items()
        )

    def __str__(self) -> str:
        largest = ", ".join(
            f"{name} {x:.1e} of {self.tolerances[name]:g} allowed"
            for name, x in self.differences.items()
        )
        return (
            f"{self.objects} objects on {self.images} images, {self.unmatched} without a "
            f"counterpart; largest differences: {largest}"
        )


def compare(
    first: Detector,
    second: Detector,
    images: Iterable[torch.Tensor],
    tolerances: dict[str, float] = TOLERANCES,
) -> Agreement:
    """
    Compare what two runtimes find.

    An object has a counterpart if the other runtime has one of the same class whose box and score
    lie within the tolerances; the nearest box counts.

    Args:
        first, second: return :data:`OUTPUTS` of an image.
        images: float32, shape (3, H, W) each, in 0-255.
        tolerances: of boxes, scores and masks.
    """
    total = Agreement(tolerances, differences=dict.fromkeys(tolerances, 0.0))
    for image in images:
        a, b = (dict(zip(OUTPUTS, run(image))) for run in (first, second))
        rows, columns = [], []
        for i in range(len(a["scores"])):
            distance = np.abs(b["boxes"] - a["boxes"][i]).max(1, initial=0.0)
            is_same = (
                (distance <= tolerances["boxes"])
                & (np.abs(b["scores"] - a["scores"][i]) <= tolerances["scores"])
                & (b["classes"] == a["classes"][i])
            )
            is_same[columns] = False
            if is_same.any():
                rows.append(i)
                columns.append(int(np.where(is_same, distance, np.inf).argmin()))
        total.images += 1
        total.objects += len(a["scores"])
        total.unmatched += len(a["scores"]) + len(b["scores"]) - 2 * len(rows)
        for name in tolerances:
            difference = np.abs(a[name][rows] - b[name][columns]).max(initial=0.0)
            # NaN is not an agreement.
            difference = float("inf") if np.isnan(difference) else float(difference)
            total.differences[name] = max(total.differences[name], difference)
    return total


def _describe(cfg: CfgNode, names: Sequence[str], reports: dict[str, str]) -> dict:
    """What a program that runs the files must know."""
    side = cfg.INPUT.MIN_SIZE_TEST
    return {
        "input": {
            "name": "image",
            "dtype": "float32",
            "axes": ["channel", "height", "width"],
            "channels": cfg.INPUT.FORMAT,
            "value_range": [0, 255],
            # Normalisation and padding are in the graph.
            "shortest_edge": side or None,
            "longest_edge_at_most": cfg.INPUT.MAX_SIZE_TEST if side else None,
            "resize": "bilinear with antialiasing, as Pillow's BILINEAR, on uint8",
        },
        "outputs": {
            "boxes": "float32 (N, 4): x0, y0, x1, y1 in pixels of the resized image",
            "scores": "float32 (N,): in [0, 1], best first",
            "classes": "int64 (N,): indices of the list below",
            "masks": "float32 (N, M, M): probabilities on a grid over the box; paste them and cut "
            "at 0.5",
        },
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        "max_objects": cfg.TEST.DETECTIONS_PER_IMAGE,
        "classes": list(names),
        "files": reports,
        "made_with": {
            "torch": torch.__version__,
            "detectron2": detectron2.__version__,
            "onnx_opset": ONNX_OPSET,
        },
    }
