"""Drawing detected objects on images, and writing these as pictures and videos."""

from __future__ import annotations

import colorsys
import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from inference.media import Source, SourceError

__all__ = ["Draw", "OverlayWriter", "color_of", "draw_overlay", "overlay_scale", "plain_overlays"]

logger = logging.getLogger("teacher_student_mask")

# Labels are not legible on pictures smaller than this; overlays of such pictures are enlarged.
MIN_OVERLAY_SIDE = 400

# From a source, its image (uint8 BGR) and what the predictor returned for it to a picture (the
# same). All pictures of a source have one size.
Draw = Callable[[Source, np.ndarray, dict], np.ndarray]


def overlay_scale(image: np.ndarray) -> int:
    """The whole factor that makes an image large enough for labels to be legible."""
    return max(1, -(-MIN_OVERLAY_SIDE // max(image.shape[:2])))


def draw_overlay(
    image: np.ndarray,
    instances: Instances,
    names: list[str],
    *,
    color_by_class: bool = False,
    scale: int | None = None,
) -> np.ndarray:
    """
    Draw masks, boxes, classes and scores.

    Args:
        image: uint8 (H, W, 3), BGR.
        instances: the detections, on the CPU.
        names: of the classes.
        color_by_class: give each class its colour, not each object, so that colours stay from one
            frame of a video to the next.
        scale: enlarge the image by this factor; None: by :func:`overlay_scale`.

    Returns:
        uint8 BGR, shape (scale * H, scale * W, 3).
    """
    scale = overlay_scale(image) if scale is None else scale
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    visualizer = Visualizer(image[:, :, ::-1], scale=scale)
    output = visualizer.overlay_instances(
        masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        boxes=instances.pred_boxes,
        labels=[f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, scores)],
        assigned_colors=[color_of(k) for k in (classes if color_by_class else range(len(classes)))],
    )
    return np.ascontiguousarray(output.get_image()[:, :, ::-1])


def color_of(k: int) -> tuple[float, float, float]:
    """The k-th of any number of colours that differ in hue: RGB in [0, 1]."""
    # Steps of the golden ratio spread any number of hues. Lightness and saturation leave room for
    # the lighter text: Detectron2 0.6 does not clip it.
    return colorsys.hls_to_rgb(k * 0.618034 % 1.0, 0.5, 0.8)


def plain_overlays(names: list[str]) -> Draw:
    """
    Draw the detections on the image alone.

    Videos keep their size, and their classes the colours; small images are enlarged, and their
    objects differ in colour.
    """

    def draw(source: Source, image: np.ndarray, outputs: dict) -> np.ndarray:
        is_video = source.is_video
        scale = 1 if is_video else None
        instances = outputs["instances"].to("cpu")
        return draw_overlay(image, instances, names, color_by_class=is_video, scale=scale)

    return draw


class OverlayWriter:
    """
    Writes the overlay of one image or video: a context manager that ends the video.

    Whatever cannot be written raises SourceError.
    """

    def __init__(self, source: Source, overlay_dir: Path, draw: Draw) -> None:
        """
        Args:
            source: the overlay is named by it.
            overlay_dir: made if new, with the first overlay.
            draw: makes the pictures.
        """
        self._source = source
        self._path = overlay_dir / source.overlay
        self._draw = draw
        self._video: cv2.VideoWriter | None = None

    def __enter__(self) -> OverlayWriter:
        return self

    def __exit__(self, *_) -> None:
        if self._video is not None:
            self._video.release()

    def write(self, image: np.ndarray, outputs: dict) -> np.ndarray:
        """Write the picture, or the next frame, and return it. Arguments as of :data:`Draw`."""
        overlay = self._draw(self._source, image, outputs)
        if self._video is None:
            self._make_folder()
        if not self._source.is_video:
            self._write_picture(overlay)
            return overlay
        if self._video is None:
            self._video = self._open_video(*overlay.shape[:2])
        for _ in range(self._source.repeats()):
            self._video.write(overlay)
        return overlay

    def _make_folder(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(f"cannot write its overlay {self._path}: {error}") from error

    def _write_picture(self, overlay: np.ndarray) -> None:
        # OpenCV encodes but does not write: a name that is not UTF-8 makes cv2.imwrite crash.
        is_encoded, content = cv2.imencode(self._path.suffix, overlay)
        try:
            if not is_encoded:
                raise OSError(f"OpenCV cannot encode {self._path.suffix}")
            self._path.write_bytes(content)
        except OSError as error:
            raise self._error(f"cannot write its overlay {self._path}: {error}") from error

    def _open_video(self, height: int, width: int) -> cv2.VideoWriter:
        fps = self._source.fps()
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
