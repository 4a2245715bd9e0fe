"""The same image side by side: as it is, with the masks of each head, with the ground truth."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer

from inference.annotated_images import AnnotatedImages, AnnotatedObject
from inference.media import Source, SourceError
from inference.overlays import color_of, draw_overlay, overlay_scale
from teacher_student_mask.modeling import TeacherStudentROIHeads

__all__ = ["BothHeads", "Comparison", "GroundTruth", "draw_objects"]

logger = logging.getLogger("teacher_student_mask")

_HEADS = ("teacher", "student")
_GAP = 6
_HEADER = 30
# How boxes are drawn, as matplotlib names line styles; objects without a mask have nothing else.
_LINE_STYLES = {"human": "-", "model": "-.", "unused": "-", "box": "--", "crowd": ":"}
_SUFFIXES = {"model": " (model)", "box": " (box only)", "crowd": " (crowd)"}


class BothHeads:
    """
    Runs a predictor with the teacher's and with the student's masks.

    Each head gives what it gives with ``TEST.MASK_HEAD``: the detections are the same, the masks
    differ. A model with one mask head runs once.
    """

    def __init__(self, predictor: DefaultPredictor) -> None:
        self._predictor = predictor
        heads = predictor.model.roi_heads
        self.has_teacher = isinstance(heads, TeacherStudentROIHeads)
        if not self.has_teacher:
            logger.warning(
                f"--compare: {type(heads).__name__} has no teacher; the pictures show its masks."
            )

    def __call__(self, image: np.ndarray) -> dict:
        """
        Args:
            image: uint8 (H, W, 3), BGR.

        Returns:
            "instances" as the predictor gives them; also "teacher" and "student" where the model
            has both.
        """
        if not self.has_teacher:
            return self._predictor(image)
        heads = self._predictor.model.roi_heads
        chosen = heads.test_mask_head
        outputs = {}
        try:
            for head in _HEADS:
                heads.test_mask_head = head
                outputs[head] = self._predictor(image)["instances"]
        finally:
            heads.test_mask_head = chosen
        return {**outputs, "instances": outputs[chosen]}


class GroundTruth:
    """The annotated objects of images, which are found by their file names."""

    def __init__(self, json_file: str) -> None:
        """
        Raises:
            UsageError: of :class:`AnnotatedImages`.
        """
        self._annotated = AnnotatedImages(json_file)
        self.json_file, self.names = json_file, self._annotated.names
        self._by_name: dict[str, list[dict]] = defaultdict(list)
        for image in self._annotated.images:
            self._by_name[Path(image["file_name"]).name].append(image)

    def objects_of(self, path: Path, size: tuple[int, int]) -> list[AnnotatedObject] | None:
        """
        Args:
            path: of the image; its last parts are the ``file_name`` of the json.
            size: height and width of the image.

        Returns:
            None where the json does not have the image.

        Raises:
            SourceError: the json says another size, or names several such images.
        """
        parts = path.absolute().parts
        matches = [
            (len(names), image)
            for image in self._by_name.get(path.name, [])
            if parts[-len(names := Path(image["file_name"]).parts) :] == names
        ]
        if not matches:
            return None
        longest = max(length for length, _ in matches)
        images = [image for length, image in matches if length == longest]
        if len(images) > 1:
            raise SourceError(f"{path}: {self.json_file} has {len(images)} images of this name.")
        (image,) = images
        if (image["height"], image["width"]) != size:
            raise SourceError(
                f"{path}: the image has (height, width) {size}, but {self.json_file} says "
                f"{(image['height'], image['width'])}."
            )
        return self._annotated.objects_of([image["id"]], with_overlaps=False)[image["id"]]


class Comparison:
    """
    Draws the panels: image, teacher, student (or the only head), ground truth.

    It is an :data:`overlays.Draw`. A class has one colour in all of them.

    Attributes:
        num_unknown: how many images the ground truth did not have.
    """

    def __init__(self, names: list[str], truth: GroundTruth | None) -> None:
        """
        Args:
            names: of the model's classes.
            truth: None: without that panel.
        """
        self._names, self._truth = names, truth
        self.num_unknown = 0

    def __call__(self, source: Source, image: np.ndarray, outputs: dict) -> np.ndarray:
        scale = 1 if source.is_video else overlay_scale(image)
        size = (image.shape[1] * scale, image.shape[0] * scale)
        panels = {"image": cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)}
        heads = {x: x for x in _HEADS} if "teacher" in outputs else {"instances": "model"}
        for key, title in heads.items():
            found = outputs[key].to("cpu")
            panels[title] = draw_overlay(
                image, found, self._names, color_by_class=True, scale=scale
            )
        if self._truth is not None:
            objects = self._truth.objects_of(source.path, image.shape[:2])
            self.num_unknown += objects is None
            title = "ground truth" if objects is not None else "no ground truth for this image"
            panels[title] = draw_objects(image, objects or [], self._truth.names, self._names)
        return _join(panels)


def draw_objects(
    image: np.ndarray, objects: list[AnnotatedObject], names: list[str], model_names: list[str]
) -> np.ndarray:
    """
    Draw annotated objects: masks filled, with a solid box; a dashed box where there is no mask.

    Args:
        image: uint8 (H, W, 3), BGR.
        objects: of the image; not changed.
        names: of the json's classes.
        model_names: of the classes whose colours those of the same name get.

    Returns:
        uint8 BGR, enlarged as by :func:`overlay_scale`.
    """
    visualizer = Visualizer(image[:, :, ::-1], scale=overlay_scale(image))
    # Small objects last, so that they are not painted over.
    for x in sorted(objects, key=lambda x: -x.box[2] * x.box[3]):
        name = names[x.class_index]
        known = name in model_names
        color = color_of(model_names.index(name) if known else len(model_names) + x.class_index)
        left, top, width, height = x.box
        if x.rle is not None and x.kind != "crowd":
            mask = mask_util.decode(x.rle)
            visualizer.draw_binary_mask(mask, color=color, alpha=0.45, area_threshold=0)
        visualizer.draw_box(
            (left, top, left + width, top + height),
            alpha=1,
            edge_color=color,
            line_style=_LINE_STYLES[x.kind],
        )
        text = f"{name}{_SUFFIXES.get(x.kind, '')}"
        light = tuple(0.4 * v + 0.6 for v in color)
        visualizer.draw_text(text, (left, top), color=light, horizontal_alignment="left")
    return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


def _join(panels: dict[str, np.ndarray]) -> np.ndarray:
    height, width = next(iter(panels.values())).shape[:2]
    total = len(panels) * (width + _GAP) - _GAP
    joined = np.full((height + _HEADER, total, 3), 255, dtype=np.uint8)
    for k, (title, panel) in enumerate(panels.items()):
        left = k * (width + _GAP)
        joined[_HEADER:, left : left + width] = panel
        # Narrow panels get smaller titles.
        (length, _), _ = cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, 0.65, 1)
        size = 0.65 * min(1.0, (width - 8) / length)
        place = (left + 4, _HEADER - 9)
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(joined, title, place, font, size, (0, 0, 0), 1, cv2.LINE_AA)
    return joined
