"""The unseen objects of an image: what training knows of them, and their true masks."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from pycocotools.coco import COCO

from ..coco_json import is_from_model
from ..data import TeacherStudentDatasetMapper, load_partial_coco_json, resolve_auto_settings
from ..evaluation import compute_overlaps
from ..structures import ImageMask
from .trained_model import CocoDataset

__all__ = ["UnseenObjectReader", "UnseenObjects"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnseenObjects:
    """
    The n unseen objects of an image, in the frame of the resized image.

    Attributes:
        inputs: of the model; it holds nothing of the objects.
        rois: ``proposal_boxes``, ``gt_boxes``, ``gt_classes``, ``gt_exclusion_masks``: what
            training knows of them.
        truth: ``proposal_boxes``, ``gt_masks``, ``gt_has_mask``: their true masks.
        overlaps: O of each.
    """

    inputs: dict
    rois: Instances
    truth: Instances
    overlaps: list[float]


class UnseenObjectReader:
    """
    Reads images with their unseen objects.

    Image and exclusion masks come from the training mapper, which forgets unseen masks before
    anything else; the true masks are read beside it.
    """

    def __init__(self, cfg: CfgNode, dataset: CocoDataset):
        """
        Args:
            cfg: of the model; not changed. ``DATASETS.SEEN_CLASSES`` says who is unseen.
            dataset: whose images are read.

        Raises:
            ValueError: annotation ids that are not unique, or contiguous class ids that are not in
                the order of the json's.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco = COCO(dataset.annotations)
        annotations = self._coco.dataset["annotations"]
        if len(self._coco.anns) < len(annotations):
            raise ValueError(
                f"{dataset.annotations}: {len(annotations)} annotations have only "
                f"{len(self._coco.anns)} different ids; every id must be unique."
            )
        if sorted(self._coco.cats) != dataset.category_ids:
            raise ValueError(
                f"{dataset.annotations}: the classes of {dataset.name!r} are not in the order of "
                "their category ids; register the json with register_partial_coco."
            )
        self.images = load_partial_coco_json(dataset.annotations, dataset.image_root)
        self._overlaps = compute_overlaps(self._coco)
        self._file = dataset.annotations
        self._mask_format = cfg.INPUT.MASK_FORMAT
        self._num_without_mask = self._num_without_area = 0

        cfg = resolve_auto_settings(cfg).clone()
        cfg.defrost()
        # The mapper looks there for the classes.
        cfg.DATASETS.TRAIN = (dataset.name,)
        self._mapper = TeacherStudentDatasetMapper(
            cfg,
            is_train=True,
            augmentations=utils.build_augmentation(cfg, is_train=False),
        )
        if len(self._mapper.seen_classes) == len(dataset.classes):
            logger.warning(
                f"DATASETS.SEEN_CLASSES {cfg.DATASETS.SEEN_CLASSES!r} are all classes: there is no "
                "unseen object whose pseudo mask could be measured."
            )

    def read(self, image: dict) -> UnseenObjects | None:
        """
        Args:
            image: one of ``self.images``.

        Returns:
            None if the image has no unseen object that has a true mask and a box with area inside
            the image.
        """
        # Both lists are in the order of the json.
        pairs = zip(image["annotations"], self._coco.imgToAnns[image["image_id"]], strict=True)
        unseen, overlaps = [], []
        for annotation, entry in pairs:
            if annotation["iscrowd"] or annotation["category_id"] in self._mapper.seen_classes:
                continue
            segmentation = None
            if not is_from_model(annotation):
                segmentation = _read_segmentation(annotation.get("segmentation"), image)
            if segmentation is None:
                self._num_without_mask += 1
                continue
            kept = {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
            unseen.append({**kept, "segmentation": segmentation})
            overlaps.append(self._overlaps[entry["id"]])
        if not unseen:
            return None
        example = self._mapper(image)
        truth = self._transform(unseen, image, example["image"].shape[-2:])
        has_area = truth.gt_boxes.nonempty(threshold=1e-5)  # as the mapper judges
        self._num_without_area += int((~has_area).sum())
        truth = truth[has_area]
        if len(truth) == 0:
            return None

        rois = Instances(truth.image_size)
        rois.gt_boxes, rois.gt_classes = truth.gt_boxes, truth.gt_classes
        rois.proposal_boxes = truth.proposal_boxes = truth.gt_boxes
        union = example["instances"].gt_exclusion_masks.tensor
        rois.gt_exclusion_masks = ImageMask(union, len(rois))
        truth.gt_has_mask = torch.ones(len(truth), dtype=torch.bool)
        inputs = {"image": example["image"], "file_name": image["file_name"]}
        return UnseenObjects(inputs, rois, truth, list(itertools.compress(overlaps, has_area)))

    def _transform(self, annotations: list[dict], image: dict, shape: Sequence[int]) -> Instances:
        # As the mapper transforms objects with a mask: the resize of testing is all there is.
        resize = T.ResizeTransform(image["height"], image["width"], *shape)
        annotations = [
            utils.transform_instance_annotations(x, T.TransformList([resize]), tuple(shape))
            for x in annotations
        ]
        is_polygon = all(isinstance(x["segmentation"], list) for x in annotations)
        mask_format = self._mask_format if is_polygon else "bitmask"
        return utils.annotations_to_instances(annotations, tuple(shape), mask_format)

    def log_left_out(self) -> None:
        """Warn of the unseen objects that :meth:`read` has left out so far."""
        if self._num_without_mask or self._num_without_area:
            logger.warning(
                f"{self._file}: of the unseen objects {self._num_without_mask} have no true mask "
                f"and {self._num_without_area} a box without area inside their image; their pseudo "
                "masks are not measured."
            )


def _read_segmentation(segmentation: list | dict | None, image: dict) -> list | dict | None:
    # None where there is no pixel; RLEs compressed, for that is what Detectron2 transforms.
    if not isinstance(segmentation, dict):
        return segmentation or None
    if isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, image["height"], image["width"])
    return segmentation if mask_util.area(segmentation) > 0 else None
