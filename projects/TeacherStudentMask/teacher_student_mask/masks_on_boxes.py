"""Masks for boxes that somebody has drawn: by a trained model's mask heads, or by GrabCut."""

from __future__ import annotations

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import GeneralizedRCNN
from torch.nn import functional as F

from .coco_json import MODEL
from .modeling import grab_cut
from .modeling.inference import predict_masks_on_boxes
from .modeling.pseudo_masks import fit_to_boxes

__all__ = ["grabcut_masks", "make_mask", "mask_to_polygons", "model_masks"]

# From which probability on a pixel belongs to a mask, as in Detectron2.
_THRESHOLD = 0.5
# The lowest threshold that "box_fit" tries. Where no cell has as much, the head says nothing.
_LEAST_PROBABILITY = 0.05
# Polygons may be this far, in pixels, from the edges of a mask's pixels, the coarsest first, as
# long as their IoU with the mask is high enough.
_POLYGON_TOLERANCES, _MIN_POLYGON_IOU = (1.0, 0.5, 0.0), 0.98


def grabcut_masks(task: dict) -> list[dict]:
    """
    Make the masks of one image by GrabCut.

    Args:
        task: "image", uint8 (3, H, W), BGR; "objects", (row, category id, XYWH box in pixels) each.

    Returns:
        For each object "row", with "segmentation", "area" and "mask_source", or with "problem".
    """
    image = np.ascontiguousarray(task["image"].permute(1, 2, 0).numpy())
    made = []
    for row, _, (x, y, width, height) in task["objects"]:
        mask = grab_cut(image, (x, y, x + width, y + height))
        new = {"segmentation": _encode(mask), "area": int(mask.sum()), "mask_source": MODEL}
        nothing = {"problem": "the box has no area inside the image"}
        made.append({"row": row, **(new if mask.any() else nothing)})
    return made


def model_masks(
    model: GeneralizedRCNN,
    class_ids: dict[int, int],
    masks_of: str,
    mask_format: str,
    task: dict,
) -> list[dict]:
    """
    Make the masks of one image by a model's mask heads.

    Args:
        model: in evaluation mode.
        class_ids: {category id: contiguous id}.
        masks_of, mask_format: see :func:`make_mask`.
        task: an input of the model, with the "height" and "width" of the image itself and
            "objects", (row, category id, XYWH box in pixels of the image itself) each.

    Returns:
        For each object "row" and what :func:`make_mask` returns, in any order.
    """
    size = task["height"], task["width"]
    made, todo = [], []
    for row, category, (x, y, width, height) in task["objects"]:
        x0, y0, x1, y1 = max(0, x), max(0, y), min(size[1], x + width), min(size[0], y + height)
        # In the precision in which the model sees it.
        if np.float32(x1) > np.float32(x0) and np.float32(y1) > np.float32(y0):
            todo.append((row, class_ids[category], [float(v) for v in (x0, y0, x1, y1)]))
        else:
            made.append({"row": row, "problem": "the box has no area inside the image"})
    if not todo:
        return made
    rows, classes, boxes = zip(*todo)
    # At test time the only transform is a resize.
    height, width = task["image"].shape[-2:]
    scale = torch.tensor([width / size[1], height / size[0]]).repeat(2)
    scaled = torch.tensor(boxes) * scale
    probs = predict_masks_on_boxes(model, task, scaled, torch.tensor(classes))
    probs = {head: x.float().cpu() for head, x in probs.items()}
    for k, (row, box) in enumerate(zip(rows, boxes)):
        of_object = {head: x[k] for head, x in probs.items()}
        mask = make_mask(of_object, box, size, masks_of=masks_of, mask_format=mask_format)
        made.append({"row": row, **mask})
    return made


def make_mask(
    probs: dict[str, torch.Tensor],
    box: list[float],
    image_size: tuple[int, int],
    *,
    masks_of: str = "student",
    mask_format: str = "rle",
) -> dict:
    """
    Make the mask of one object from mask probabilities over its box.

    The probabilities p of the chosen head lie over the box in M x M cells; of "both" it is their
    mean, the coarser grid brought to the finer one bilinearly. The mask is where p, brought to the
    image's pixels as Detectron2 does it, is at least 0.5. Where that is nowhere, the mask is that
    of the threshold that fills the box best (:func:`fit_to_boxes`), if any cell has p >= 0.05.
    Pixels whose centre is outside of the box never belong to it.

    Args:
        probs: "student", and "teacher" if there is one: float, shape (M, M) each, on the CPU.
        box: XYXY in pixels, inside the image.
        image_size: (height, width).
        masks_of: "student", "teacher" or "both", of heads in ``probs``.
        mask_format: "rle" or "polygon"; a mask with a hole is an RLE in any case.

    Returns:
        Keys of a COCO annotation: "segmentation"; "area", its pixels; "score", the mean of p over
        the cells that were taken for the mask, in [0, 1]; "mask_source"; of two heads
        "teacher_student_agreement", the IoU, in pixels, of their masks, both at 0.5 and in the box,
        0 if both are empty; "mask_fallback" where the threshold was not 0.5. Or "problem" alone:
        why there is no mask.
    """
    if masks_of == "both":
        side = max(x.shape[-1] for x in probs.values())
        grids = [
            F.interpolate(x[None, None], (side, side), mode="bilinear") for x in probs.values()
        ]
        chosen = torch.cat(grids)[:, 0].mean(dim=0)
    else:
        chosen = probs[masks_of]
    cells = chosen >= _THRESHOLD
    mask = _paste(chosen, box, image_size)
    is_fallback = not mask.any()
    if is_fallback:
        if not float(chosen.max()) >= _LEAST_PROBABILITY:  # NaN is not, either.
            return {"problem": "the model finds nothing in the box"}
        cells = fit_to_boxes(chosen[None], torch.ones_like(cells)[None])[0]
        mask = _paste(cells.float(), box, image_size)
        if not mask.any():
            return {"problem": "no pixel has its centre in the box, or the mask is too thin"}
    made = {"segmentation": _encode(mask), "area": int(mask.sum()), "mask_source": MODEL}
    if mask_format == "polygon" and (polygons := mask_to_polygons(mask)) is not None:
        # They may differ in a few pixels from the mask.
        rle = mask_util.merge(mask_util.frPyObjects(polygons, *image_size))
        made.update(segmentation=polygons, area=int(mask_util.area(rle)))
    made["score"] = round(float(chosen[cells].mean()), 4)
    if len(probs) > 1:
        first, second = (_paste(x, box, image_size) for x in probs.values())
        iou = (first & second).sum() / max(1, (first | second).sum())
        made["teacher_student_agreement"] = round(float(iou), 4)
    if is_fallback:
        made["mask_fallback"] = "box_fit"
    return made


def _paste(probs: torch.Tensor, box: list[float], image_size: tuple[int, int]) -> np.ndarray:
    # Bool, shape (H, W). One at a time: a thousand masks of a large image would not fit.
    boxes = torch.tensor([box], dtype=torch.float32)
    mask = paste_masks_in_image(probs[None], boxes, image_size, threshold=_THRESHOLD)[0].numpy()
    x0, y0, x1, y1 = box
    columns, rows = np.arange(image_size[1]) + 0.5, np.arange(image_size[0]) + 0.5
    mask &= ((rows >= y0) & (rows <= y1))[:, None]
    mask &= (columns >= x0) & (columns <= x1)
    return mask


def _encode(mask: np.ndarray) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def mask_to_polygons(mask: np.ndarray) -> list[list[float]] | None:
    """
    Trace the outlines of a mask along the edges of its pixels; points that do not matter are left
    out.

    A pixel (x, y) is the square from (x, y) to (x + 1, y + 1), as in COCO; OpenCV's own contours
    run through the centres of the pixels and would lose half a pixel on every side.

    Args:
        mask: bool or uint8, shape (H, W).

    Returns:
        COCO's polygons [[x, y, x, y, ...], ...], one for each part of the mask, whose mask (as
        pycocotools fills it) has an IoU of at least 0.98 with the given one. None where polygons
        cannot say it: the mask has a hole, or is empty.
    """
    # With two by two points a pixel, a point of an outline tells which corner of its pixel it
    # stands for: the left or upper one if even, else the right or lower one. The margin keeps the
    # outline from the border.
    doubled = np.pad(mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1), 2)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # A contour with a parent is a hole.
    if not contours or (hierarchy[0, :, 3] >= 0).any():
        return None
    for tolerance in _POLYGON_TOLERANCES:
        outlines = [cv2.approxPolyDP((x - 1) // 2, tolerance, closed=True) for x in contours]
        if any(len(x) < 3 for x in outlines):
            continue
        polygons = [x.astype(float).ravel().tolist() for x in outlines]
        filled = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
        if mask_util.iou([filled], [_encode(mask)], [0])[0, 0] >= _MIN_POLYGON_IOU:
            return polygons
    return None
