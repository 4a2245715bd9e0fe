"""Counts the masks of unseen objects that reach the model in training, and stops at the first."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Instances, PolygonMasks, polygons_to_bitmask
from detectron2.utils import comm
from torch import nn

from ..class_splits import resolve_seen_classes
from ..data.model_masks import ModelMaskCounts
from ..data.seen_classes import training_classes

__all__ = ["UnseenMaskGuard", "find_unseen_masks", "is_box_shaped"]

logger = logging.getLogger(__name__)

_SCALAR = "leak/num_unseen_masks"
_MAX_IMAGES_NAMED = 3
# Corners of a rectangle that was rotated and cut by a crop, and then once more.
_MAX_CORNERS = 12
# What of an object's width and height pixels have to span to be a mask of it.
_SPANNED = 0.9

_IS_MARKED = "gt_has_mask is True"
_IS_UNMARKED = "it has gt_masks, but no gt_has_mask"
_IS_NO_BOX = "gt_masks is not its box, though gt_has_mask is False"
_IS_NOT_OF_MODEL = "gt_has_model_mask is True, but the training data have no mask of a model for it"
_IS_EXCLUDED = "gt_exclusion_masks covers it, and no mask of a seen object does"


class UnseenMaskGuard(HookBase):
    """
    Looks at every training batch on its way into the model, see :func:`find_unseen_masks`.

    The number of masks of unseen objects since the start of the training is the scalar
    "leak/num_unseen_masks". It is 0 in every training that goes on: with the first such mask the
    hook raises, before the model sees the batch. What evaluation gives to the model is not looked
    at. Each rank looks at its own batches, on the CPU: the model moves them to its device later,
    so nothing waits for the device.
    """

    @configurable
    def __init__(
        self,
        seen_classes: Collection[int],
        class_names: Sequence[str],
        model_masks: Callable[[str], Mapping[int, int]] = lambda file_name: {},
    ):
        """
        Args:
            seen_classes: contiguous ids of the classes whose masks training may use.
            class_names: of all classes, by contiguous id; for the message.
            model_masks: from the file name of an image to its numbers of masks that a model made,
                {contiguous class id: number}.
        """
        self.model_masks = model_masks
        self.seen_classes = frozenset(seen_classes)
        self.class_names = tuple(class_names)
        self.num_masks = self.num_objects = 0
        self._num_batches = self._num_iterations = 0
        self._error: RuntimeError | None = None
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        names = training_classes(cfg)
        return {
            "seen_classes": resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, names),
            "class_names": names,
            "model_masks": ModelMaskCounts(cfg.DATASETS.TRAIN),
        }

    def before_train(self) -> None:
        # A function, not a method: a copy of the model must not want to copy the trainer.
        def look(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if model.training:
                for batch in (*args, *kwargs.values()):
                    if isinstance(batch, (list, tuple)):
                        self._look_at(batch)

        # Around the model of several ranks, too, which would move tensors first.
        self._handle = self.trainer.model.register_forward_pre_hook(look, with_kwargs=True)

    def after_step(self) -> None:
        self._num_iterations += 1

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._error is not None and self.trainer.iter + 1 >= self.trainer.max_iter:
            # Detectron2 takes a failure in the last iteration for the end of training, and would
            # evaluate.
            raise self._error
        if self._num_iterations > self._num_batches:
            logger.warning(
                f"Only {self._num_batches} batches of {self._num_iterations} iterations were "
                "looked at for masks of unseen objects: the others did not go through the "
                "trainer's model."
            )
        where = f" of rank {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        logger.info(
            f"{self.num_masks} masks of unseen objects reached the model in "
            f"{self._num_iterations} iterations{where} "
            f"({self.num_objects} objects of unseen classes)."
        )

    def _look_at(self, batch: Sequence[Mapping]) -> None:
        # Of a batch in the form that Detectron2's models take: a list of dicts.
        self._num_batches += 1
        images = []
        num_masks = 0
        for example in batch:
            instances = example.get("instances")
            if instances is None:
                continue
            self.num_objects += len(_rows_of_unseen(instances, self.seen_classes))
            model_masks = {}
            if _rows_of_unseen(instances, self.seen_classes, "gt_has_model_mask"):
                model_masks = self.model_masks(example.get("file_name", ""))
            found = find_unseen_masks(instances, self.seen_classes, model_masks)
            num_masks += len(found)
            if found:
                images.append(self._describe(example, found))
        self.num_masks += num_masks
        self.trainer.storage.put_scalar(_SCALAR, self.num_masks, smoothing_hint=False)
        if num_masks:
            more = f"; and {len(images) - _MAX_IMAGES_NAMED} images more"
            self._error = RuntimeError(
                f"Training stops at iteration {self.trainer.iter}: {num_masks} masks of objects of "
                f"unseen classes would reach the model, of {'; '.join(images[:_MAX_IMAGES_NAMED])}"
                f"{more if len(images) > _MAX_IMAGES_NAMED else ''}. DATASETS.SEEN_CLASSES says "
                "whose masks training may use; the mapper must forget all others, as "
                "TeacherStudentDatasetMapper does."
            )
            raise self._error

    def _describe(self, example: Mapping, found: list[tuple[int, str]]) -> str:
        image = f"{example.get('file_name', 'without file_name')} (image id "
        image += f"{example.get('image_id', 'unknown')})"
        names = dict(enumerate(self.class_names))
        masks = [
            f"{count} of {names.get(class_id, f'class id {class_id}')!r} ({reason})"
            for (class_id, reason), count in sorted(Counter(found).items())
        ]
        return f"{image}: {', '.join(masks)}"


def find_unseen_masks(
    instances: Instances,
    seen_classes: Collection[int],
    model_masks: Mapping[int, int] = MappingProxyType({}),
) -> list[tuple[int, str]]:
    """
    Find the objects of unseen classes whose masks are among the training data of an image.

    An object is found if

    * its ``gt_has_mask`` is True;
    * there are ``gt_masks``, but no ``gt_has_mask``: the example is of another mapper;
    * its mask is not what is left of a rectangle, see :func:`is_box_shaped`;
    * ``gt_exclusion_masks`` has pixels that span its box and belong to no mask of a seen object;
    * ``gt_has_model_mask`` is True for it, and for more of its class than have a mask of a
      model; then all of the class are found.

    A mask of an object marked as one without is not found where it could be a rectangle after
    rotations and crops, and one in ``gt_exclusion_masks`` not where masks of seen objects hide it,
    or a crop cut it short. No loss reads the former. Nor is a human mask found that takes the place
    of the model's mask of the same object, or of another one of its class in the image.

    Args:
        instances: of one image, with ``gt_classes``; not changed.
        seen_classes: contiguous ids.
        model_masks: how many masks of a model the image has, {contiguous class id: number}.

    Returns:
        (contiguous class id, why) of each object found.
    """
    rows = _rows_of_unseen(instances, seen_classes)
    if not rows or not instances.has("gt_masks"):
        return []
    classes = instances.gt_classes.tolist()
    if not instances.has("gt_has_mask"):
        return [(classes[i], _IS_UNMARKED) for i in rows]
    has_mask = instances.gt_has_mask.tolist()
    found = {i: _IS_MARKED for i in rows if has_mask[i]}
    external = _rows_of_unseen(instances, seen_classes, "gt_has_model_mask")
    for i in rows:
        if i not in found and i not in external and not is_box_shaped(instances.gt_masks, i):
            found[i] = _IS_NO_BOX
    for i in _excluded_without_reason(instances, rows):
        found.setdefault(i, _IS_EXCLUDED)
    counts = Counter(classes[i] for i in external)
    for i in external:
        if counts[classes[i]] > model_masks.get(classes[i], 0):
            found.setdefault(i, _IS_NOT_OF_MODEL)
    return [(classes[i], reason) for i, reason in sorted(found.items())]


def is_box_shaped(masks: PolygonMasks | BitMasks, index: int) -> bool:
    """
    Whether a mask may be a box after any flips, resizes, rotations, shears and crops.

    These leave a convex shape of few corners, or nothing. Masks of several parts, with a dent, or
    round ones are none; small or convex ones with few corners cannot be told from boxes.

    Args:
        masks: of an image; not changed.
        index: of the mask.
    """
    if isinstance(masks, PolygonMasks):
        polygons = masks.polygons[index]
        if len(polygons) != 1:
            return not polygons
        points = np.asarray(polygons[0], dtype=np.float32).reshape(-1, 2)
        return _is_convex(points, cv2.contourArea(points), tolerance=0.1)
    mask = masks.tensor[index].cpu().numpy()
    area = np.count_nonzero(mask)
    if area == 0:
        return True
    ys = np.flatnonzero(mask.any(axis=1))
    mask = mask[ys[0] : ys[-1] + 1]
    left, right = mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)
    is_full = mask.any(axis=1)
    ys = np.arange(len(mask))
    # The corners of the outermost pixels of each row.
    rows = [(x, y) for x in (left, right) for y in (ys, ys + 1)]
    points = np.concatenate([np.stack([x[is_full], y[is_full]], axis=1) for x, y in rows])
    return _is_convex(points.astype(np.float32), area, tolerance=1.5)


def _is_convex(points: np.ndarray, area: float, tolerance: float) -> bool:
    # Whether a region of this area fills the hull of its points, but for a rim of that many pixels,
    # and the hull has few corners.
    hull = cv2.convexHull(points) if len(points) > 2 else None
    if hull is None or len(hull) < 3:
        return True  # a line or a point, which no mask is
    rim = tolerance * cv2.arcLength(hull, True)
    if cv2.contourArea(hull) - area > rim:
        return False
    return len(cv2.approxPolyDP(hull, tolerance, True)) <= _MAX_CORNERS


def _rows_of_unseen(
    instances: Instances, seen_classes: Collection[int], flag: str | None = None
) -> list[int]:
    # Those where a bool field is True, or all.
    if not instances.has("gt_classes") or (flag is not None and not instances.has(flag)):
        return []
    classes = instances.gt_classes.tolist()
    flags = instances.get(flag).tolist() if flag is not None else [True] * len(classes)
    return [i for i, k in enumerate(classes) if flags[i] and k not in seen_classes]


def _excluded_without_reason(instances: Instances, rows: list[int]) -> list[int]:
    if not instances.has("gt_exclusion_masks") or not instances.has("gt_boxes"):
        return []
    excluded = instances.gt_exclusion_masks.tensor.cpu().numpy()
    boxes = instances.gt_boxes.tensor.tolist()
    rows = [i for i in rows if _spans(excluded, boxes[i])]
    if not rows:
        return []
    # Only now, because drawing polygons takes time.
    excluded = excluded & ~_union_of_usable_masks(instances, excluded.shape)
    return [i for i in rows if _spans(excluded, boxes[i])]


def _spans(pixels: np.ndarray, box: Sequence[float]) -> bool:
    # Whether the True pixels inside the box reach from side to side and from top to bottom.
    x0, y0 = (max(round(x), 0) for x in box[:2])
    x1, y1 = (round(x) for x in box[2:])
    inside = pixels[y0:y1, x0:x1]
    for axis in (0, 1):
        occupied = np.flatnonzero(inside.any(axis=axis))
        length = inside.shape[1 - axis]
        if not len(occupied) or occupied[-1] + 1 - occupied[0] < _SPANNED * length:
            return False
    return True


def _union_of_usable_masks(instances: Instances, image_size: tuple[int, int]) -> np.ndarray:
    masks = instances.gt_masks[instances.gt_has_mask]
    if isinstance(masks, BitMasks):
        return masks.tensor.any(dim=0).cpu().numpy()
    polygons = [polygon for polygons_of_one in masks.polygons for polygon in polygons_of_one]
    return polygons_to_bitmask(polygons, *image_size)
