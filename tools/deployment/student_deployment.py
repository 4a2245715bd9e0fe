"""The graphs of a student, compared with it, and a description of what they take and return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2 import __version__ as detectron2_version
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import nn

from deployment.traced_student import (
    ONNX_OPSET,
    TOLERANCES,
    compare,
    detect,
    make_traceable,
    onnx_graph,
    torchscript_graph,
)
from inference.media import SourceError, read_image_file
from inference.setup import UsageError

__all__ = ["describe_deployment", "export_graphs", "make_check_images", "prepare_image"]

# The name of the file of a graph, and what makes it.
GRAPHS = {
    "torchscript": ("model.ts", torchscript_graph),
    "onnx": ("model.onnx", onnx_graph),
}
# Height and width of random images. The first is traced: the others and photos differ from it.
RANDOM_SIZES = ((256, 320), (320, 192), (200, 200))


def prepare_image(cfg: CfgNode, image: np.ndarray) -> torch.Tensor:
    """
    Prepare an image as ``DefaultPredictor`` does.

    Args:
        cfg: its INPUT says the order of channels and the size.
        image: uint8, shape (H, W, 3), BGR.

    Returns:
        float32, shape (3, H', W'), in 0-255.
    """
    if cfg.INPUT.FORMAT == "RGB":
        image = image[:, :, ::-1]
    side = cfg.INPUT.MIN_SIZE_TEST
    resize = T.ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
    image = resize.apply_image(np.ascontiguousarray(image))
    return torch.as_tensor(image.astype("float32").transpose(2, 0, 1))


def make_check_images(cfg: CfgNode, paths: Sequence[Path]) -> list[torch.Tensor]:
    """
    The images on which runtimes are compared: random ones, then files.

    Returns:
        float32, shape (3, H, W) each, in 0-255.

    Raises:
        UsageError: a file cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) * 255 for size in RANDOM_SIZES]
    for path in paths:
        try:
            images.append(prepare_image(cfg, read_image_file(path)))
        except SourceError as error:
            raise UsageError(f"--check-images {error}") from error
    return images


def export_graphs(
    model: nn.Module, formats: Sequence[str], images: Sequence[torch.Tensor]
) -> Iterator[tuple[str, bytes, str]]:
    """
    Make graphs and compare them with the model.

    Args:
        model: in evaluation mode; moved to the CPU, and its parameters get no gradient any more.
        formats: keys of :data:`GRAPHS`.
        images: the first is the example of the trace.

    Yields:
        The name of the file, its content, and what was compared.

    Raises:
        UsageError: the model cannot be traced, or the graph finds something else.
    """
    model = model.cpu()
    adapter = make_traceable(model, images[0])

    def find(image: torch.Tensor) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(x.numpy() for x in detect(model, image))

    for kind in formats:
        name, make = GRAPHS[kind]
        try:
            content, run = make(adapter, images[0])
        except Exception as error:  # whatever an operator of the model that no graph has raises
            raise UsageError(
                f"--formats {kind}: the model has a part that cannot be exported: "
                f"{type(error).__name__}: {error}"
            ) from error
        agreement = compare(find, run, images)
        if not agreement.is_good():
            raise UsageError(
                f"--formats {kind}: the graph finds something else than the model ({agreement}; "
                f"allowed: {TOLERANCES}). Nothing was written."
            )
        report = f"compared with the model: {agreement}"
        if agreement.objects == 0:
            report += ". Nothing was found on them, so give --check-images with objects"
        yield name, content, report


def describe_deployment(cfg: CfgNode, names: Sequence[str], reports: dict[str, str]) -> dict:
    """
    What a program that runs the files must know, as deployment.json holds it.

    Args:
        cfg: of the model.
        names: of the classes.
        reports: what was compared, by the name of the file.
    """
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
            "detectron2": detectron2_version,
            "onnx_opset": ONNX_OPSET,
        },
    }
