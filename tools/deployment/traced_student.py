"""A detector as one graph of tensors: TorchScript and ONNX, and what tells that both are right."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import nn

__all__ = [
    "ONNX_OPSET",
    "OUTPUTS",
    "TOLERANCES",
    "Agreement",
    "Finder",
    "compare",
    "detect",
    "make_traceable",
    "missing_onnx_package",
    "onnx_finder",
    "onnx_graph",
    "torchscript_graph",
]

logger = logging.getLogger("teacher_student_mask")

# The names of what a graph returns for an image, in this order; see :func:`detect`.
OUTPUTS = ("boxes", "scores", "classes", "masks")

# The first in which ROIAlign knows the half-pixel shift of Detectron2's ROIAlignV2 is 16.
ONNX_OPSET = 17

# Largest differences that count as the same: boxes in pixels of the graph's input, scores and mask
# probabilities. float32 has 24 bits: a coordinate around 1,000 is stored in steps of 6e-5, and the
# sums over some thousand products before it are added in another order by another runtime. Masks
# are pooled from the boxes, so the rounding of a box is magnified in them where features vary from
# pixel to pixel. What was measured stands in docs/DEPLOY.md.
TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "masks": 1e-2}
# Of the objects this many may have no counterpart: two boxes whose IoU or score lies on a
# threshold up to rounding may change places.
MAX_UNMATCHED = 0.01

# Returns OUTPUTS of an image, float32 (3, H, W).
Finder = Callable[[torch.Tensor], tuple[np.ndarray, ...]]

# Where Detectron2 counts objects with len(), which makes a traced number a constant.
_COUNTING_MODULES = ("fast_rcnn", "mask_head")


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


def make_traceable(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """
    Wrap a model so that ``wrapped(image)`` is :func:`detect` and can be traced.

    This is Detectron2's own ``TracingAdapter``. The package of it does not import in Detectron2
    0.6, which asks for caffe2 there; an adapter of ours then does the same for this one case.

    Args:
        model: as in :func:`detect`; its parameters get no gradient any more.
        image: an example.
    """
    model.requires_grad_(False)
    try:
        from detectron2.export import TracingAdapter
    except ImportError as error:
        logger.info(f"detectron2.export cannot be imported ({error}); using an adapter of ours.")
        return _OneImageAdapter(model).eval()
    inputs = ([{"image": image}],)
    adapter = TracingAdapter(model, inputs, lambda model, x: detect(model, x[0]["image"]))
    return adapter.eval()


class _OneImageAdapter(nn.Module):
    """:func:`detect` as a module in whose trace the number of objects is no constant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for name in _COUNTING_MODULES:
                module = importlib.import_module(f"detectron2.modeling.roi_heads.{name}")
                # Unlike len() the method may return a tensor, which a trace follows.
                count = mock.patch.object(module, "len", lambda x: x.__len__(), create=True)
                stack.enter_context(count)
            return detect(self.model, image)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The tracer warns at each place of Detectron2 where a value becomes a constant; that the
    # result is right on other images is tested on other images.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torchscript_graph(adapter: nn.Module, image: torch.Tensor) -> tuple[bytes, Finder]:
    """
    Trace.

    Args:
        adapter: of :func:`make_traceable`.
        image: an example; others may have other sizes.

    Returns:
        The content of a file for ``torch.jit.load``, where torchvision has been imported for its
        operators; and what runs it.
    """
    buffer = io.BytesIO()
    with _quiet():
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
        torch.jit.save(traced, buffer)

    def find(image: torch.Tensor) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(x.numpy() for x in traced(image))

    return buffer.getvalue(), find


def missing_onnx_package() -> str | None:
    """The name of a package that ONNX needs and that is not there; None: all are."""
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            return name
    return None


def onnx_graph(adapter: nn.Module, image: torch.Tensor) -> tuple[bytes, Finder]:
    """
    Export with PyTorch's exporter for traces; arguments as of :func:`torchscript_graph`.

    The newer exporter (``dynamo=True``) does not follow Detectron2's code.

    Returns:
        The content of an ONNX file whose input "image" may have any height and width, and whose
        outputs :data:`OUTPUTS` any number of objects, 0 among them; and what runs it.
    """
    import torchvision  # noqa: F401  its operators are known to the exporter once it is imported

    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            adapter,
            (image,),
            buffer,
            dynamo=False,
            opset_version=ONNX_OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "objects"} for name in OUTPUTS},
            },
        )
    return buffer.getvalue(), onnx_finder(buffer.getvalue())


def onnx_finder(file: str | bytes) -> Finder:
    """Run a file of :func:`onnx_graph`, its path or its content, in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not its advice on shapes of intermediate values
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: tuple(session.run(list(OUTPUTS), {"image": image.numpy()}))


@dataclass
class Agreement:
    """
    How much two runtimes agree on some images.

    Attributes:
        images: number of images.
        objects: of the first runtime.
        unmatched: objects of one that the other does not have.
        differences: the largest of the others' boxes, scores and masks; see :data:`TOLERANCES`.
    """

    images: int = 0
    objects: int = 0
    unmatched: int = 0
    differences: dict[str, float] = None

    def is_good(self) -> bool:
        """Whether all differences are those of rounding."""
        return self.unmatched <= MAX_UNMATCHED * self.objects and all(
            self.differences[name] <= limit for name, limit in TOLERANCES.items()
        )

    def __str__(self) -> str:
        largest = ", ".join(f"{name} {x:.1e}" for name, x in self.differences.items())
        return (
            f"{self.objects} objects on {self.images} images, {self.unmatched} without a "
            f"counterpart; largest differences: {largest}"
        )


def compare(first: Finder, second: Finder, images: Iterable[torch.Tensor]) -> Agreement:
    """
    Compare what two runtimes find.

    An object has a counterpart if the other runtime has one of the same class whose box and score
    lie within the tolerances; the nearest box counts.
    """
    total = Agreement(differences=dict.fromkeys(TOLERANCES, 0.0))
    for image in images:
        a, b = (dict(zip(OUTPUTS, find(image))) for find in (first, second))
        rows, columns = _counterparts(a, b)
        total.images += 1
        total.objects += len(a["scores"])
        total.unmatched += len(a["scores"]) + len(b["scores"]) - 2 * len(rows)
        for name in TOLERANCES:
            difference = np.abs(a[name][rows] - b[name][columns]).max(initial=0.0)
            # A number that is none is no agreement.
            difference = float("inf") if np.isnan(difference) else float(difference)
            total.differences[name] = max(total.differences[name], difference)
    return total


def _counterparts(a: dict, b: dict) -> tuple[list[int], list[int]]:
    rows, columns = [], []
    for i in range(len(a["scores"])):
        distance = np.abs(b["boxes"] - a["boxes"][i]).max(1, initial=0.0)
        is_same = (
            (distance <= TOLERANCES["boxes"])
            & (np.abs(b["scores"] - a["scores"][i]) <= TOLERANCES["scores"])
            & (b["classes"] == a["classes"][i])
        )
        is_same[columns] = False
        if is_same.any():
            rows.append(i)
            columns.append(int(np.where(is_same, distance, np.inf).argmin()))
    return rows, columns
