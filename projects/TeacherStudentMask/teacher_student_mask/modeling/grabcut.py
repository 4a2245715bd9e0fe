"""
Mask GrabCut: the mask of an object from its box and the colours of the image, without training.

No code was published: the sizes, the margin, and the answer where GrabCut finds nothing are ours.
"""

import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Instances

__all__ = ["GrabCutRCNN", "grab_cut"]

_NUM_ITERS = 5
# The longer side of what GrabCut works on, in pixels.
_MAX_SIDE = 256
# Smaller boxes have too few colours.
_MIN_BOX_SIDE = 8
# Background beside the box, on each side: a share of the box, and in pixels.
_MARGIN, _MIN_MARGIN = 0.2, 5


def grab_cut(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """
    The object in a box by OpenCV's GrabCut: around the box is background, inside it is to be found.

    The full box, every pixel that it touches, is the answer for one with a side under 8 pixels in
    the image, and where GrabCut finds nothing or fails. The same image and box give the same mask.

    Args:
        image: uint8, shape (H, W, 3); any order of the channels.
        box: x0, y0, x1, y1 in pixels; the part outside the image does not count.

    Returns:
        bool, shape (H, W), False outside the box.
    """
    mask = np.zeros(image.shape[:2], dtype=bool)
    box = np.clip(np.asarray(box, dtype=np.float64), 0, np.array(image.shape[1::-1] * 2))
    x0, y0, x1, y1 = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int).tolist()
    if x0 >= x1 or y0 >= y1:
        return mask
    mask[y0:y1, x0:x1] = True
    # Of the box itself, whose corners in float32 may make a side of 8 one of 7.99999.
    if (box[2:] - box[:2]).min() < _MIN_BOX_SIDE - 1e-3:
        return mask
    margin_x = max(_MIN_MARGIN, round(_MARGIN * (x1 - x0)))
    margin_y = max(_MIN_MARGIN, round(_MARGIN * (y1 - y0)))
    around = np.s_[max(0, y0 - margin_y) : y1 + margin_y, max(0, x0 - margin_x) : x1 + margin_x]
    height, width = mask[around].shape
    labels = np.where(mask[around], cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    scale = min(1.0, _MAX_SIDE / max(height, width))
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    crop = np.ascontiguousarray(cv2.resize(image[around], size, interpolation=cv2.INTER_AREA))
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    if (labels == cv2.GC_PR_FGD).all():
        # A box as large as the image: without any background OpenCV would stop.
        labels[[0, -1]] = labels[:, [0, -1]] = cv2.GC_BGD
    # OpenCV's random numbers, of its k-means, are of the thread.
    cv2.setRNGSeed(zlib.crc32(np.array([x0, y0, x1, y1], dtype=np.int32).tobytes()) & 0x7FFFFFFF)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(crop, labels, None, *models, _NUM_ITERS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return mask
    found = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    found = cv2.resize(found, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    found &= mask[around]
    if found.any():
        mask[around] = found
    return mask


@META_ARCH_REGISTRY.register()
class GrabCutRCNN(GeneralizedRCNN):
    """
    A detector whose masks at inference are GrabCut's, in the boxes that it detects or is given.

    Training is that of :class:`GeneralizedRCNN`, with or without a mask head, so weights of any
    such model can be tested with it. Test-time augmentation gets no masks from GrabCut.
    """

    def inference(
        self,
        batched_inputs: list[dict],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ):
        """As the parent's; with ``do_postprocess`` masks are GrabCut's, bool, shape (n, H, W)."""
        results = super().inference(batched_inputs, detected_instances, do_postprocess)
        if not do_postprocess:
            return results
        for inputs, result in zip(batched_inputs, results):
            instances = result["instances"]
            height, width = instances.image_size
            image = inputs["image"].permute(1, 2, 0).to(torch.uint8).cpu().numpy()
            image = cv2.resize(np.ascontiguousarray(image), (width, height))
            boxes = instances.pred_boxes.tensor
            # OpenCV works outside of Python's lock.
            with ThreadPoolExecutor() as pool:
                masks = list(pool.map(lambda box: grab_cut(image, box), boxes.cpu().numpy()))
            masks = np.array(masks, dtype=bool).reshape(-1, height, width)
            instances.pred_masks = torch.from_numpy(masks).to(boxes.device)
        return results
