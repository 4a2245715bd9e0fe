"""Images from files, and objects drawn on them by supervision's annotators."""

import colorsys
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util
import supervision as sv
from detectron2.data import detection_utils as utils
from detectron2.structures import Instances
from PIL import Image

from .coco_json import DEEP_MODES
from .coco_json.masks import MaskState, compress_mask, measure_masks
from .errors import InputError

__all__ = [
    "annotations_to_detections",
    "class_color",
    "draw_instances",
    "draw_predictions",
    "read_image",
]

# Labels are not legible on pictures smaller than this, so those are enlarged.
_MIN_SIDE = 400


def read_image(path: str | os.PathLike) -> np.ndarray:
    """
    Read a file as training does, turned by its EXIF orientation: uint8 (H, W, 3), BGR.

    Raises:
        InputError: it cannot be read, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(DEEP_MODES):
                raise ValueError(f"more than 8 bits a channel ({image.mode}); convert it first")
        return utils.read_image(os.fspath(path), "BGR").copy()
    except Exception as error:  # PIL's readers raise many kinds on broken files
        raise InputError(f"{path}: the image cannot be read: {error}.") from error


def class_color(index: int) -> str:
    """Colour "#rrggbb" of a class, of any number of hues, on all of which black text is legible."""
    rgb = colorsys.hls_to_rgb(index * 0.618034 % 1.0, 0.65, 0.8)
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


def annotations_to_detections(
    annotations: Sequence[Mapping], image_size: tuple[int, int], class_ids: Sequence[int]
) -> sv.Detections:
    """
    Convert checked annotations, in COCO's format, of one image of (height, width) ``image_size``.

    Returns:
        One detection for each annotation, in their order. An object without a mask has an empty
        one in ``mask``, bool (N, H, W).
    """
    masks = np.zeros((len(annotations), *image_size), dtype=bool)
    segmentations = [x.get("segmentation") for x in annotations]
    # Warnings alone are no reason not to draw: a mask that training does not read may be broken.
    state = measure_masks(segmentations, np.full((len(annotations), 2), image_size)).state
    for i in np.flatnonzero(state == MaskState.MASK):
        masks[i] = mask_util.decode(compress_mask(segmentations[i], image_size))
    boxes = np.array([x["bbox"] for x in annotations], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return sv.Detections(xyxy=boxes, mask=masks, class_id=np.array(class_ids, dtype=int))


def draw_instances(
    image: np.ndarray,
    detections: sv.Detections,
    labels: Sequence[str] | None = None,
    *,
    colors: Sequence[str] | None = None,
) -> np.ndarray:
    """
    Draw masks, boxes and labels; a small image is enlarged until labels are legible.

    Args:
        image: uint8 (H, W, 3), BGR; not changed.
        detections: in the frame of the image; ``mask`` may be None.
        labels: a text for each detection, such as "dog 97%"; None draws none.
        colors: "#rrggbb" for each detection; None: by ``class_id``, which keeps colours from one
            frame of a video to the next.

    Returns:
        uint8 (k * H, k * W, 3), BGR, k being 1 or, of a small image, more.
    """
    scale = max(1, -(-_MIN_SIDE // max(image.shape[:2])))
    picture = cv2.resize(image, None, fx=scale, fy=scale) if scale > 1 else image.copy()
    if not len(detections):
        return picture
    if colors is None:
        colors = [class_color(int(x)) for x in detections.class_id]
    mask = detections.mask
    if mask is not None and scale > 1:
        mask = mask.repeat(scale, axis=1).repeat(scale, axis=2)
    detections = sv.Detections(
        xyxy=detections.xyxy * scale, mask=mask, class_id=np.arange(len(detections))
    )
    size = picture.shape[1::-1]
    palette = sv.ColorPalette.from_hex(list(colors))
    thickness = max(1, sv.calculate_optimal_line_thickness(size) // 2)
    picture = sv.MaskAnnotator(palette).annotate(picture, detections)
    picture = sv.PolygonAnnotator(palette, thickness=thickness).annotate(picture, detections)
    picture = sv.BoxAnnotator(palette, thickness=thickness).annotate(picture, detections)
    if labels is None:
        return picture
    annotator = sv.LabelAnnotator(
        palette,
        text_color=sv.Color.BLACK,
        text_scale=min(0.7 * sv.calculate_optimal_text_scale(size), 1.0),
        text_padding=3,
        smart_position=True,
    )
    return annotator.annotate(picture, detections, list(labels))


def draw_predictions(image: np.ndarray, found: Instances, class_names: Sequence[str]) -> np.ndarray:
    """Draw what a model has found, on the CPU and in the frame of the image, with its scores."""
    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    labels = [f"{class_names[k]} {x:.0%}" for k, x in zip(classes, scores)]
    detections = sv.Detections.from_detectron2({"instances": found})
    return draw_instances(image, detections, labels)
