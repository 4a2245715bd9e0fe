"""The student without this project: a plain Detectron2 model, TorchScript and ONNX."""

import contextlib
import copy
import functools
import importlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_model,
)
from torch import nn

from .drawing import read_image
from .errors import InputError
from .run_folder import write_class_names
from .trained_model import TrainedModel

__all__ = ["compare", "detect", "export_student"]

# What a graph returns for an image, in this order; see :func:`detect`.
OUTPUTS = ("boxes", "scores", "classes", "masks")
# The first in which ROIAlign knows the half-pixel shift of Detectron2's ROIAlignV2 is 16.
_ONNX_OPSET = 17
# Largest differences that count as the same: boxes in pixels of the model's input, scores and mask
# probabilities. Rounding of boxes is magnified in masks.
_TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-2}
# Of the objects this many may have no counterpart: two boxes whose IoU or score lies on a
# threshold up to rounding may change places.
_MAX_UNMATCHED = 0.01
# Height and width of random images. The first is traced: the others and photos differ from it.
_RANDOM_SIZES = ((256, 320), (320, 192), (200, 200))
# What is written last, so that a folder which has it is an export.
_DESCRIPTION = "deployment.json"
# What else an export may hold beside the names of the classes.
_FILES = ("categories.json", "config.yaml", "model.onnx", "model.pth", "model.ts", "run_onnx.py")


def export_student(
    trained: TrainedModel,
    output_dir: str | Path,
    formats: Sequence[str] = ("plain",),
    check_images: Sequence[str | Path] = (),
) -> dict[str, str]:
    """
    Write the student (or the only mask head of a baseline) without this project.

    Every format runs on the same images as the model first; nothing is written unless all find the
    same.

    Args:
        trained: the model; not changed.
        output_dir: made if new; an earlier export in it is replaced.
        formats: of "plain", "torchscript" and "onnx".
        check_images: files on which the formats are compared, beside random images.

    Returns:
        {name of the file of each format: what was compared}.

    Raises:
        InputError: the model cannot be written in a format, or finds something else in it; or the
            folder holds files of these names that no export has written.
    """
    output_dir = Path(output_dir)
    found = [x for x in (*_FILES, "classes.json") if (output_dir / x).exists()]
    if found and not (output_dir / _DESCRIPTION).exists():
        raise InputError(
            f"{output_dir} holds {found[0]}, which no export has written to its end (a training?); "
            "name another folder."
        )
    if "onnx" in formats and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        raise InputError("The format onnx needs: pip install -c constraints.txt onnx onnxruntime")
    model = copy.deepcopy(trained.model).cpu().requires_grad_(False)
    if hasattr(model.roi_heads, "teacher_mask_head"):
        model.roi_heads.teacher_mask_head = None
        model.roi_heads.test_mask_head = "student"
    # Float32, shape (3, H, W) each, as the model takes them.
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) * 255 for size in _RANDOM_SIZES]
    images += [trained.make_inputs(read_image(path))["image"] for path in check_images]
    files, reports = {}, {}
    if "plain" in formats:
        content, weights, reports["model.pth"] = _make_plain(trained.cfg, model, images)
        content["MODEL"]["WEIGHTS"] = str(output_dir / "model.pth")
        files = {"model.pth": weights, "config.yaml": yaml.safe_dump(content).encode()}
    for name, make in (("torchscript", _trace), ("onnx", _to_onnx)):
        if name in formats:
            name = "model.ts" if name == "torchscript" else "model.onnx"
            files[name], reports[name] = _make_graph(make, model, images)
    if "onnx" in formats:
        files["run_onnx.py"] = Path(__file__).with_name("run_onnx.py").read_bytes()
    files["classes.json"] = json.dumps(trained.class_names, indent=1).encode()
    cfg = trained.cfg
    description = {
        "input": {
            "channels": cfg.INPUT.FORMAT,
            "value_range": [0, 255],
            # Normalisation and padding are in the graph.
            "shortest_edge": cfg.INPUT.MIN_SIZE_TEST or None,
            "longest_edge_at_most": cfg.INPUT.MAX_SIZE_TEST,
            "resize": "bilinear with antialiasing, as Pillow's BILINEAR, on uint8",
        },
        "outputs": OUTPUTS,
        "score_threshold": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        "nms_threshold": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
        "max_objects": cfg.TEST.DETECTIONS_PER_IMAGE,
        "classes": trained.class_names,
        "files": reports,
        "torch": torch.__version__,
    }
    files[_DESCRIPTION] = json.dumps(description, indent=1).encode()
    output_dir.mkdir(parents=True, exist_ok=True)
    if (output_dir / _DESCRIPTION).exists():
        for name in _FILES:
            (output_dir / name).unlink(missing_ok=True)
    if "plain" in formats:
        write_class_names(output_dir, trained.class_names, trained.category_ids)
    for name, content in files.items():
        (output_dir / name).write_bytes(content)
    return reports


def _plain_config(cfg: CfgNode) -> dict:
    """Values of Detectron2's keys that are not its defaults; InputError if it lacks a part."""
    cfg = cfg.clone()
    if cfg.MODEL.ROI_MASK_PRIOR.NAME:
        prior = cfg.MODEL.ROI_MASK_PRIOR.NAME
        raise InputError(f"MODEL.ROI_MASK_PRIOR.NAME is {prior!r}; a plain model has no prior.")
    if cfg.MODEL.ROI_HEADS.NAME in ("TeacherStudentROIHeads", "PartiallySupervisedROIHeads"):
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    head = cfg.MODEL.ROI_MASK_HEAD
    if head.NAME == "MaskRCNNConvMultiUpsampleHead" and head.NUM_DECONV == 1:
        head.NAME = "MaskRCNNConvUpsampleHead"
    registries = {"ROI_HEADS": ROI_HEADS_REGISTRY, "ROI_MASK_HEAD": ROI_MASK_HEAD_REGISTRY}
    registries.update(META_ARCHITECTURE=META_ARCH_REGISTRY, BACKBONE=BACKBONE_REGISTRY)
    for key, registry in registries.items():
        value = cfg.MODEL[key]
        name = value if isinstance(value, str) else value.NAME
        if not registry.get(name).__module__.startswith("detectron2."):
            raise InputError(
                f"MODEL.{key} is {name!r}, which a plain Mask R-CNN does not have; the formats "
                "torchscript and onnx do without Detectron2."
            )
    cfg.OUTPUT_DIR = get_cfg().OUTPUT_DIR
    return {"VERSION": cfg.VERSION, **_changed_values(cfg, get_cfg())}


def _changed_values(cfg: CfgNode, default: CfgNode) -> dict:
    # Only these: the keys of another release of Detectron2 may differ.
    changes = {}
    for key, value in default.items():
        if isinstance(value, CfgNode):
            below = _changed_values(cfg[key], value)
            changes.update({key: below} if below else {})
        elif cfg[key] != value:
            changes[key] = cfg[key]
    return changes


def _make_plain(
    cfg: CfgNode, model: nn.Module, images: Sequence[torch.Tensor]
) -> tuple[dict, bytes, str]:
    """The content of the config, the weights of a plain model, and what was compared."""
    content = _plain_config(cfg)
    config = get_cfg()
    config.merge_from_other_cfg(CfgNode.load_cfg(yaml.safe_dump(content)))
    config.MODEL.DEVICE = "cpu"
    plain = build_model(config).eval()
    plain.load_state_dict(model.state_dict())
    predictors = [x.roi_heads.box_predictor for x in (model, plain)]
    threshold = predictors[0].test_score_thresh
    # With the threshold of the config a model may find nothing in noise.
    for predictor in predictors:
        predictor.test_score_thresh = 0.0
    report = compare(*(functools.partial(_detect_arrays, x) for x in (model, plain)), images)
    predictors[0].test_score_thresh = threshold
    weights = io.BytesIO()
    torch.save({"model": plain.state_dict()}, weights)
    return content, weights.getvalue(), report


def detect(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Run a Mask R-CNN in evaluation mode without its postprocessing.

    Args:
        image: float32, shape (3, H, W), in 0-255, channels in the order of ``INPUT.FORMAT``,
            already resized.

    Returns:
        N objects, best score first: boxes, float32 (N, 4), x0 y0 x1 y1 in pixels of ``image``;
        scores, float32 (N,), in [0, 1]; classes, int64 (N,); masks, float32 (N, M, M),
        probabilities on a grid over each box.
    """
    found = model.inference([{"image": image}], do_postprocess=False)[0]
    return found.pred_boxes.tensor, found.scores, found.pred_classes, found.pred_masks[:, 0]


@torch.no_grad()
def _detect_arrays(model: nn.Module, image: torch.Tensor) -> list[np.ndarray]:
    return [x.numpy() for x in detect(model, image)]


class _TraceableDetector(nn.Module):
    """:func:`detect` as a module in whose trace the number of objects is not a constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            # len() of a tensor is a constant in a trace; its method is followed. Detectron2's own
            # TracingAdapter does this, but asks for caffe2 in 0.6.
            for name in ("fast_rcnn", "mask_head"):
                module = importlib.import_module(f"detectron2.modeling.roi_heads.{name}")
                count = mock.patch.object(module, "len", lambda x: x.__len__(), create=True)
                stack.enter_context(count)
            head = self.model.roi_heads.mask_head
            if hasattr(head, "layers"):
                layers = functools.partial(_with_one_more_row, head.layers)
                stack.enter_context(mock.patch.object(head, "layers", layers))
            return detect(self.model, image)


def _with_one_more_row(layers: Callable, features: torch.Tensor) -> torch.Tensor:
    # ONNX's GroupNorm cannot reshape what has no rows, as in an image without objects.
    return layers(torch.cat([features.new_zeros(1, *features.shape[1:]), features]))[1:]


def _trace(detector: nn.Module, image: torch.Tensor) -> tuple[bytes, Callable]:
    """The content of a file for ``torch.jit.load``, and what runs it."""
    buffer = io.BytesIO()
    traced = torch.jit.trace(detector, (image,), check_trace=False)
    torch.jit.save(traced, buffer)
    return buffer.getvalue(), lambda x: [y.numpy() for y in traced(x)]


def _to_onnx(detector: nn.Module, image: torch.Tensor) -> tuple[bytes, Callable]:
    """The content of an ONNX file, and what runs it in onnxruntime, on the CPU."""
    import onnxruntime
    import torchvision  # noqa: F401  Its operators are known to the exporter once it is imported.

    buffer = io.BytesIO()
    torch.onnx.export(
        detector,
        (image,),
        buffer,
        dynamo=False,  # The newer exporter does not follow Detectron2's code.
        opset_version=_ONNX_OPSET,
        input_names=["image"],
        output_names=list(OUTPUTS),
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "objects"} for name in OUTPUTS},
        },
    )
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    return buffer.getvalue(), lambda x: session.run(list(OUTPUTS), {"image": x.numpy()})


def _make_graph(
    make: Callable, model: nn.Module, images: Sequence[torch.Tensor]
) -> tuple[bytes, str]:
    """A graph, and what was compared."""
    try:
        # The tracer warns wherever a value becomes a constant; that the result is right on other
        # images is tested on other images.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content, run = make(_TraceableDetector(model).eval(), images[0])
    except Exception as error:  # Whatever an operator that no graph has raises.
        raise InputError(f"The model cannot be exported as a graph: {error!r}") from error
    return content, compare(functools.partial(_detect_arrays, model), run, images)


def compare(expected: Callable, found: Callable, images: Sequence[torch.Tensor]) -> str:
    """
    Compare what two runtimes find; each returns :data:`OUTPUTS` of an image as arrays.

    An object has a counterpart if the other runtime has one of the same class whose box and score
    lie within the tolerances; the nearest box counts.

    Returns:
        A sentence: how many objects, and the largest differences.

    Raises:
        InputError: more than 1 % of the objects have no counterpart, or masks differ.
    """
    objects = unmatched = 0
    largest = dict.fromkeys(_TOLERANCES, 0.0)
    for image in images:
        a, b = (dict(zip(OUTPUTS, run(image))) for run in (expected, found))
        distance = np.abs(a["boxes"][:, None] - b["boxes"]).max(axis=-1, initial=0.0)
        is_same = distance <= _TOLERANCES["boxes"]
        is_same &= np.abs(a["scores"][:, None] - b["scores"]) <= _TOLERANCES["scores"]
        is_same &= a["classes"][:, None] == b["classes"]
        rows, columns = [], []
        for row in range(len(distance)):
            if is_same[row].any():
                rows.append(row)
                columns.append(np.where(is_same[row], distance[row], np.inf).argmin())
                is_same[:, columns[-1]] = False
        objects += len(a["scores"])
        unmatched += len(a["scores"]) + len(b["scores"]) - 2 * len(rows)
        for name in largest:
            difference = np.abs(a[name][rows] - b[name][columns]).max(initial=0.0)
            # NaN is not an agreement.
            largest[name] = max(largest[name], float(np.nan_to_num(difference, nan=np.inf)))
    report = f"{objects} objects on {len(images)} images, {unmatched} without a counterpart"
    report += "; largest differences: "
    report += ", ".join(f"{x} {largest[x]:.1e} of {_TOLERANCES[x]:g} allowed" for x in largest)
    if unmatched > _MAX_UNMATCHED * objects or any(largest[x] > _TOLERANCES[x] for x in largest):
        raise InputError(f"The export finds something else than the model: {report}.")
    if not objects:
        report += ". Nothing was found on them, so give images with objects (--check-images)"
    return report
