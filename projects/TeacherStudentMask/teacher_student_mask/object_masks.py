"""Masks of objects whose boxes are known, as keys of COCO's annotations."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers import paste_masks_in_image
from torch.nn import functional as F

from .coco_json import MODEL
from .coco_json.masks import compress_mask
from .evaluation import draw_yardsticks
from .modeling import grab_cut
from .modeling.inference import predict_masks_on_boxes
from .modeling.pseudo_masks import fit_to_boxes

__all__ = [
    "PLAIN_IOU",
    "is_plain",
    "make_image_masks",
    "make_mask",
    "make_model_masks",
    "mask_to_polygons",
]

# From which probability on a pixel belongs to a mask, as in Detectron2; and the lowest threshold
# that "box_fit" tries. Where no cell has as much, the head says nothing.
_THRESHOLD, _LEAST_PROBABILITY = 0.5, 0.05
# Above it a mask is said to be no more than a filled box or ellipse.
PLAIN_IOU = 0.9
# Polygons may be this far, in pixels, from the edges of a mask's pixels, the coarsest first, as
# long as their IoU with the mask is high enough.
_POLYGON_TOLERANCES, _MIN_POLYGON_IOU = (1.0, 0.0), 0.98
_NO_AREA = {"problem": "the box has no area inside the image"}
_NOTHING = {"problem": "nothing is found in the box"}


def make_image_masks(predictor, mask_format: str, task: dict) -> list[dict]:
    """
    As :func:`make_model_masks`, of the original image, in BGR.

    ``predictor`` is of :func:`load_predictor`, whose score the object is given; None: GrabCut.
    """
    image = np.ascontiguousarray(task["image"].permute(1, 2, 0).numpy())
    if predictor is not None:
        predictor.set_image(np.ascontiguousarray(image[:, :, ::-1]))
    made = []
    for row, _, (x, y, width, height) in task["objects"]:
        box, score = np.array([x, y, x + width, y + height]), {}
        if predictor is None:
            mask = grab_cut(image, box)
        else:
            masks, scores, *_ = predictor.predict(box=box, multimask_output=False)
            mask, score = np.asarray(masks[0]) > 0, {"score": round(float(scores[0]), 4)}
        of_object = _encode(mask, mask_format) | score if mask.any() else _NOTHING
        made.append({"row": row, **of_object})
    return made


def make_model_masks(
    model: torch.nn.Module, class_ids: dict[int, int], masks_of: str, mask_format: str, task: dict
) -> list[dict]:
    """For each object of an image "row" and what :func:`make_mask` returns."""
    size = task["height"], task["width"]
    rows, categories, boxes = zip(*task["objects"])
    boxes = np.array(boxes, dtype=float)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, size[::-1] * 2)
    # In the precision in which the model sees it.
    has_area = (boxes[:, 2:].astype("f4") > boxes[:, :2].astype("f4")).all(axis=1)
    made = [{"row": row, **_NO_AREA} for row, x in zip(rows, has_area) if not x]
    kept = np.flatnonzero(has_area)
    if not len(kept):
        return made
    # At test time the only transform is a resize.
    height, width = task["image"].shape[-2:]
    scale = torch.tensor([width / size[1], height / size[0]]).repeat(2)
    inputs = torch.tensor(boxes[kept], dtype=torch.float32) * scale
    classes = torch.tensor([class_ids[categories[k]] for k in kept])
    probs = predict_masks_on_boxes(model, task, inputs, classes)
    probs = {head: x.float().cpu() for head, x in probs.items()}
    for i, k in enumerate(kept):
        of_object = {head: x[i] for head, x in probs.items()}
        box = boxes[k].tolist()
        mask = make_mask(of_object, box, size, masks_of=masks_of, mask_format=mask_format)
        made.append({"row": rows[k], **mask})
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

    Of "both" heads the probabilities are their mean, the coarser grid brought to the finer one
    bilinearly. The mask is where they come to 0.5 in the image's pixels; where that is nowhere, it
    is that of :func:`fit_to_boxes`, if any cell has 0.05.

    Args:
        probs: "student", and "teacher" if there is one: float, shape (M, M) each, on the CPU.
        box: XYXY in pixels, inside the image.
        image_size: (height, width).
        masks_of, mask_format: see :class:`CompletionSettings`.

    Returns:
        Keys of a COCO annotation, which docs/COMPLETE.md explains; or "problem" alone: why there
        is no mask.
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
            return dict(_NOTHING)
        cells = fit_to_boxes(chosen[None], torch.ones_like(cells)[None])[0]
        mask = _paste(cells.float(), box, image_size)
        if not mask.any():
            return {"problem": "no pixel has its centre in the box, or the mask is too thin"}
    made = _encode(mask, mask_format)
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
    # Beyond the box the grid is 0, so no pixel whose centre lies there comes to the threshold.
    return paste_masks_in_image(probs[None], boxes, image_size, threshold=_THRESHOLD)[0].numpy()


def _encode(mask: np.ndarray, mask_format: str) -> dict:
    """The keys "segmentation", "area" and "mask_source" of a COCO annotation."""
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}
    if mask_format == "polygon" and (polygons := mask_to_polygons(mask)) is not None:
        segmentation = polygons
        rle = mask_util.merge(mask_util.frPyObjects(polygons, *mask.shape))
    return {"segmentation": segmentation, "area": int(mask_util.area(rle)), "mask_source": MODEL}


def mask_to_polygons(mask: np.ndarray) -> list[list[float]] | None:
    """
    Trace the outlines of a mask along the edges of its pixels, without points that do not matter.

    A pixel (x, y) is the square from (x, y) to (x + 1, y + 1), as in COCO; OpenCV's own contours
    run through the centres of the pixels and would lose half a pixel on every side.

    Args:
        mask: bool or uint8, shape (H, W).

    Returns:
        COCO's polygons, one for each part of the mask, whose mask has an IoU of at least 0.98 with
        the given one. None where polygons cannot say it: the mask has a hole, or is empty.
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
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        if mask_util.iou([filled], [rle], [0])[0, 0] >= _MIN_POLYGON_IOU:
            return polygons
    return None


def is_plain(annotation: dict, image_size: tuple[int, int]) -> bool:
    """Whether a mask is one of the yardsticks of its box, but for a tenth."""
    rle = compress_mask(annotation["segmentation"], image_size)
    shapes = draw_yardsticks([annotation["bbox"]], image_size)
    return mask_util.iou([rle], [x for (x,) in shapes.values()], [0, 0]).max() > PLAIN_IOU
