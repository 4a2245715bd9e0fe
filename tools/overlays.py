"""Drawing detected objects on images, and writing these as pictures and videos."""

from __future__ import annotations

import colorsys
import logging
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from media import Source, SourceError, video_property

logger = logging.getLogger("teacher_student_mask")

# Labels are not legible on pictures smaller than this; overlays of such pictures are enlarged.
MIN_OVERLAY_SIDE = 400


def draw_overlay(
    image: np.ndarray, instances: Instances, names: list[str], *, color_by_class: bool = False
) -> np.ndarray:
    """
    Draw masks, boxes, classes and scores.

    Args:
        image: uint8 (H, W, 3), BGR.
        instances: the detections, on the CPU.
        names: of the classes.
        color_by_class: give each class its colour, not each object, so that colours stay from one
            frame of a video to the next.

    Returns:
        uint8 BGR; larger than the image by a whole factor if the image is small.
    """
    scale = max(1, -(-MIN_OVERLAY_SIDE // max(image.shape[:2])))
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    visualizer = Visualizer(image[:, :, ::-1], scale=scale)
    output = visualizer.overlay_instances(
        masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        boxes=instances.pred_boxes,
        labels=[f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, scores)],
        assigned_colors=[_color(k) for k in (classes if color_by_class else range(len(classes)))],
    )
    return np.ascontiguousarray(output.get_image()[:, :, ::-1])


def _color(k: int) -> tuple[float, float, float]:
    # Steps of the golden ratio spread any number of hues. Lightness and saturation leave room for
    # the lighter text: Detectron2 0.6 does not clip it.
    return colorsys.hls_to_rgb(k * 0.618034 % 1.0, 0.5, 0.8)


class OverlayWriter:
    """
    Writes the overlay of one image or video: a context manager that ends the video.

    Whatever cannot be written raises SourceError.
    """

    def __init__(self, source: Source, overlay_dir: Path, names: list[str]) -> None:
        """
        Args:
            source: the overlay is named by it.
            overlay_dir: made if new, with the first overlay.
            names: of the classes.
        """
        self._source = source
        self._path = overlay_dir / source.overlay
        self._names = names
        self._video: cv2.VideoWriter | None = None

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(self, *_) -> None:
        if self._video is not None:
            self._video.release()

    def write(self, image: np.ndarray, instances: Instances) -> None:
        """Write the picture, or the next frame. Arguments as of :func:`draw_overlay`."""
        is_video = self._source.is_video
        overlay = draw_overlay(image, instances, self._names, color_by_class=is_video)
        if self._video is None:
            self._make_folder()
        if not is_video:
            if not cv2.imwrite(str(self._path), overlay):
                raise self._error(f"cannot write its overlay {self._path}.")
            return
        if self._video is None:
            self._video = self._open_video(*overlay.shape[:2])
        self._video.write(overlay)

    def _make_folder(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(f"cannot write its overlay {self._path}: {error}") from error

    def _open_video(self, height: int, width: int) -> cv2.VideoWriter:
        fps = video_property(self._source.path, cv2.CAP_PROP_FPS)
        if fps == 0:
            fps = 25.0
            logger.warning(
                f"{self._source.path} does not say its frame rate; its overlay has {fps}."
            )
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        video = cv2.VideoWriter(str(self._path), codec, fps, (width, height))
        if not video.isOpened():
            raise self._error(f"OpenCV cannot write its overlay {self._path} (mp4v).")
        return video

    def _error(self, message: str) -> SourceError:
        return SourceError(f"{self._source.path}: {message}")
