"""From mask probabilities over boxes to masks of the image, with score and agreement."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers import paste_masks_in_image
from torch.nn import functional as F

from coco_json.mask_polygons import mask_to_polygons
from teacher_student_mask.modeling.pseudo_masks import fit_to_boxes

__all__ = ["FORMATS", "MASKS_OF", "clip_box", "make_mask"]

MASKS_OF = ("student", "teacher", "both")
FORMATS = ("rle", "polygon")

# From which probability on a pixel belongs to a mask, as in Detectron2.
_THRESHOLD = 0.5
# The lowest threshold that "box_fit" tries. Where no cell has as much, the head says nothing.
_LEAST_PROBABILITY = 0.05


def clip_box(box: list[float], image_size: tuple[int, int]) -> list[float] | None:
    """
    Args:
        box: [x, y, width, height] in pixels, as in COCO.
        image_size: (height, width).

    Returns:
        The part inside the image, XYXY; None if that has no area.
    """
    height, width = image_size
    x0, y0 = max(0.0, float(box[0])), max(0.0, float(box[1]))
    x1 = min(float(width), float(box[0]) + box[2])
    y1 = min(float(height), float(box[1]) + box[3])
    # In the precision in which the model sees it.
    is_box = np.float32(x1) > np.float32(x0) and np.float32(y1) > np.float32(y0)
    return [x0, y0, x1, y1] if is_box else None


def make_mask(
    probs: dict[str, torch.Tensor],
    masks_of: str,
    box: list[float],
    image_size: tuple[int, int],
    segmentation_format: str,
) -> dict:
    """
    Make the mask of one object.

    The probabilities p of the chosen head lie over the box in M x M cells; of "both" it is their
    mean, the coarser grid brought to the finer one bilinearly. The mask is where p, brought to the
    image's pixels as Detectron2 does it, is at least 0.5. Where that is nowhere, the mask is that
    of the threshold that fills the box best (:func:`fit_to_boxes`), if any cell has p >= 0.05.
    Pixels whose centre is outside of the box never belong to it.

    Args:
        probs: "student", and "teacher" if there is one: float, shape (M, M) each, on the CPU.
        masks_of: one of ``MASKS_OF``, of which the model must have the heads.
        box: XYXY in pixels, inside the image.
        image_size: (height, width).
        segmentation_format: one of ``FORMATS``; a mask with a hole is an RLE in any case.

    Returns:
        "segmentation", of COCO's annotations; "area", its pixels; "score", the mean of p over the
        cells that were taken for the mask, in [0, 1]; "agreement", the IoU, in pixels, of the
        student's mask with the teacher's, both at 0.5 and in the box, 0 if both are empty, None if
        there is one head only; "is_fallback", whether the threshold was not 0.5; "is_rle_instead",
        whether a polygon was wanted and could not be had. Or only "problem", a sentence's part.
    """
    chosen = _combine(probs) if masks_of == "both" else probs[masks_of]
    cells = chosen >= _THRESHOLD
    mask = _paste(chosen, box, image_size)
    is_fallback = not mask.any()
    if is_fallback:
        if not float(chosen.max()) >= _LEAST_PROBABILITY:
            return {"problem": "the model finds nothing in the box"}
        cells = fit_to_boxes(chosen[None], torch.ones_like(cells)[None])[0]
        mask = _paste(cells.float(), box, image_size)
        if not mask.any():
            return {
                "problem": "no pixel has its centre in the box, or the model's mask is too thin"
            }

    segmentation = mask_to_polygons(mask) if segmentation_format == "polygon" else None
    is_rle_instead = segmentation is None and segmentation_format == "polygon"
    if segmentation is None:
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation = {"size": list(image_size), "counts": rle["counts"].decode("ascii")}
    else:
        # Of the polygons, which may differ in a few pixels from the mask.
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, *image_size))
    agreement = None
    if len(probs) > 1:
        agreement = round(_iou(*(_paste(x, box, image_size) for x in probs.values())), 4)
    return {
        "segmentation": segmentation,
        "area": int(mask_util.area(rle)),
        "score": round(float(chosen[cells].mean()), 4),
        "agreement": agreement,
        "is_fallback": is_fallback,
        "is_rle_instead": is_rle_instead,
    }


def _combine(probs: dict[str, torch.Tensor]) -> torch.Tensor:
    side = max(x.shape[-1] for x in probs.values())
    same = [
        (
            x
            if x.shape[-1] == side
            else F.interpolate(x[None, None], size=(side, side), mode="bilinear")[0, 0]
        )
        for x in probs.values()
    ]
    return torch.stack(same).mean(dim=0)


def _paste(probs: torch.Tensor, box: list[float], image_size: tuple[int, int]) -> np.ndarray:
    # Bool, shape (H, W). One at a time: a thousand masks of a large image would not fit.
    boxes = torch.tensor([box], dtype=torch.float32)
    mask = paste_masks_in_image(probs[None], boxes, image_size, threshold=_THRESHOLD)[0].numpy()
    x0, y0, x1, y1 = box
    columns, rows = np.arange(image_size[1]) + 0.5, np.arange(image_size[0]) + 0.5
    mask &= ((rows >= y0) & (rows <= y1))[:, None]
    mask &= (columns >= x0) & (columns <= x1)
    return mask


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
