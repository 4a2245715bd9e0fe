"""The mapper that forgets the masks of unseen classes and says which instances have one."""

from collections.abc import Collection, Sequence
from itertools import chain, compress

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..class_splits import resolve_seen_classes
from ..coco_json import DEEP_MODES, is_from_model, valid_polygons
from ..coco_json.masks import MaskState, compress_mask, decode_mask, measure_masks
from ..coco_json.report import shorten
from ..errors import InputError
from ..structures import ImageMask
from .datasets import resolve_auto_settings, training_classes

__all__ = ["TeacherStudentDatasetMapper", "lie_in_image", "union_of_masks", "usable_segmentations"]

# Of PIL and the file system; UnicodeError: a name that no file can have.
_IMAGE_ERRORS = (OSError, SyntaxError, UnicodeError)
_IMAGE_ERRORS += (Image.DecompressionBombError, utils.SizeMismatchError)


class TeacherStudentDatasetMapper(DatasetMapper):
    """
    Map a dataset dict to a training example in which masks may be missing.

    Before any augmentation the ``segmentation`` of every object is forgotten that training must not
    use: of unseen classes, and what is no mask (a mask that covers nothing of the image; with
    ``INPUT.RECTANGLE_AS_BOX_ONLY`` also a polygon that is the rectangle of the box). These objects,
    and those without one, have the rectangle of their augmented box in its place.
    A mask with ``mask_source`` "model" is not a human's, whatever its class. No keypoints are read.
    The ``instances`` have, beside ``gt_boxes`` and ``gt_classes``:

    * ``gt_masks``: :class:`PolygonMasks`, or :class:`BitMasks` if the config says so or one of the
      image's usable masks is an RLE: of a human, else of a model, else the rectangle of the box.
    * ``gt_has_mask``: bool tensor of shape (N,); whether there is a usable human mask.
    * ``gt_has_model_mask``: bool tensor of shape (N,); whether ``gt_masks`` holds a model's mask.
    * ``gt_exclusion_masks``: :class:`ImageMask`, the union of the image's usable human masks.
    * ``gt_resize_factor``: float tensor of shape (N,); the image's height in that of the file.

    Crowd regions are left out, as in Detectron2. Objects are dropped only if augmentation leaves
    nothing of their box, or of their human mask where they have one. The input dict is not changed.
    At test time they have ``gt_boxes`` and ``gt_classes`` alone, for ``TEST.GT_BOXES``.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        seen_classes: Collection[int],
        use_external_masks: bool = True,
        rectangle_as_box_only: bool = False,
        model_class_ids: Sequence[int] | None = None,
        **kwargs,
    ):
        """
        Args:
            is_train: whether to apply training augmentation and to load annotations.
            seen_classes: contiguous ids of the classes whose masks training may use.
            use_external_masks: False: forget the masks that a model made.
            rectangle_as_box_only: take human masks that are the rectangle of their box for none.
            model_class_ids: the model's id of each class of the dataset, for the ``gt_classes`` of
                testing; None: they are the same.
            **kwargs: of :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.seen_classes = frozenset(seen_classes)
        self.use_external_masks = use_external_masks
        self.rectangle_as_box_only = rectangle_as_box_only
        self.model_class_ids = model_class_ids

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        ret = super().from_config(cfg, is_train)
        ret["seen_classes"] = ()
        if is_train:
            spec = resolve_auto_settings(cfg).DATASETS.SEEN_CLASSES
            ret["seen_classes"] = resolve_seen_classes(spec, training_classes(cfg.DATASETS.TRAIN))
        is_ignored = cfg.MODEL.PSEUDO_MASK.EXTERNAL == "ignore"
        learns_model_masks = cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS
        ret["use_external_masks"] = learns_model_masks or not is_ignored
        ret["rectangle_as_box_only"] = cfg.INPUT.RECTANGLE_AS_BOX_ONLY
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Map one image in Detectron2's standard dataset format to the format of its models.

        Raises:
            InputError: an image or a usable segmentation cannot be read; names the file.
        """
        prepared = dataset_dict
        if self.is_train and self.use_instance_mask and "annotations" in dataset_dict:
            prepared = {**dataset_dict, "annotations": self._forget_masks(dataset_dict)}
        try:
            with PathManager.open(dataset_dict["file_name"], "rb") as f, Image.open(f) as image:
                mode = image.mode
            if mode.startswith(DEEP_MODES):
                raise OSError(f"Its mode {mode!r} has values above 255; convert it to 8 bits.")
            example = super().__call__(prepared)
        except _IMAGE_ERRORS as e:
            raise InputError(
                f"{_name_of(dataset_dict)}: the image cannot be used: {e} Replace it, or correct "
                "the json; tsmask check --images finds all such images."
            ) from e
        # A json may have 480.0; the image has been found to have this size.
        example.update(height=int(example["height"]), width=int(example["width"]))
        if not self.is_train and "annotations" in dataset_dict:
            example["instances"] = self._gt_boxes_of(dataset_dict, example["image"].shape[-2:])
        return example

    def _forget_masks(self, dataset_dict: dict) -> list[dict]:
        # First of all, so that no later step can see an unseen mask.
        annotations = [dict(x) for x in dataset_dict["annotations"] if x.get("iscrowd", 0) == 0]
        for annotation in annotations:
            is_seen = annotation["category_id"] in self.seen_classes
            is_used = self.use_external_masks if is_from_model(annotation) else is_seen
            if not is_used:
                annotation["segmentation"] = None
            annotation.setdefault("segmentation", None)
        if self.rectangle_as_box_only:
            human = [x for x in annotations if not is_from_model(x)]
            boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYWH_ABS) for x in human]
            segmentations = [x["segmentation"] for x in human]
            sizes = np.full((len(human), 2), np.inf)
            masks = measure_masks(segmentations, sizes, np.array(boxes, np.float64).reshape(-1, 4))
            for i in np.flatnonzero(masks.is_rectangle):
                human[i]["segmentation"] = None
        # Now, because Detectron2 copies arrays much faster than lists.
        size = (int(dataset_dict["height"]), int(dataset_dict["width"]))
        segmentations = [x["segmentation"] for x in annotations]
        usable = usable_segmentations(segmentations, size, _name_of(dataset_dict))
        for annotation, mask in zip(annotations, usable):
            annotation["segmentation"] = mask
        return annotations

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if not self.use_instance_mask:
            return super()._transform_annotations(dataset_dict, transforms, image_shape)

        annotations = dataset_dict.pop("annotations")
        masks = [x["segmentation"] for x in annotations]
        # Whether a model made the mask; None where there is none.
        made = [None if x["segmentation"] is None else is_from_model(x) for x in annotations]
        has_mask = torch.tensor([x is False for x in made], dtype=torch.bool)
        has_model_mask = torch.tensor([x is True for x in made], dtype=torch.bool)
        has_rle = any(isinstance(x, dict) for x in masks)
        mask_format = "bitmask" if has_rle else self.instance_mask_format
        for annotation, mask in zip(annotations, masks):
            annotation.pop("keypoints", None)
            if mask is None:
                del annotation["segmentation"]
            utils.transform_instance_annotations(annotation, transforms, image_shape)
            if mask is None:  # Instances have masks for all: the rectangle of the box.
                annotation["segmentation"] = [annotation["bbox"][[0, 1, 2, 1, 2, 3, 0, 3]]]
        instances = utils.annotations_to_instances(annotations, image_shape, mask_format)
        if len(instances) == 0:  # Detectron2 leaves the field out
            instances.gt_masks = PolygonMasks([])
        instances.gt_has_mask = has_mask
        instances.gt_has_model_mask = has_model_mask
        instances.gt_resize_factor = torch.full(
            (len(instances),), image_shape[0] / int(dataset_dict["height"])
        )

        if self.recompute_boxes and has_mask.any():
            # After a crop the box of a mask is tighter than the cropped box.
            tight_boxes = instances.gt_masks[has_mask].get_bounding_boxes()
            instances.gt_boxes.tensor[has_mask] = tight_boxes.tensor
        # Not by_mask=True, Detectron2's default, for it would judge the boxes by rectangles.
        instances = utils.filter_empty_instances(instances, by_mask=False)
        # A crop may leave the box and nothing of the mask. The object of a human mask goes; that of
        # a model's is then one without a mask.
        is_visible = lie_in_image(instances.gt_masks, image_shape)
        if not is_visible.all():
            instances.gt_has_model_mask &= is_visible
            instances = instances[is_visible | ~instances.gt_has_mask]
        # Of those that are left: UnseenMaskGuard wants to know where each pixel comes from.
        union = union_of_masks(instances.gt_masks, instances.gt_has_mask, image_shape)
        instances.gt_exclusion_masks = ImageMask(union, len(instances))
        dataset_dict["instances"] = instances

    def _gt_boxes_of(self, dataset_dict: dict, image_shape: tuple[int, int]) -> Instances:
        annotations = [x for x in dataset_dict["annotations"] if x.get("iscrowd", 0) == 0]
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
        classes = torch.tensor([x["category_id"] for x in annotations], dtype=torch.int64)
        if self.model_class_ids is not None:
            classes = torch.tensor(self.model_class_ids)[classes]
        instances = Instances(tuple(image_shape), gt_classes=classes)
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        # At test time the only transform is a resize, so boxes follow from the two sizes.
        scale_x = image_shape[1] / dataset_dict["width"]
        instances.gt_boxes.scale(scale_x, image_shape[0] / dataset_dict["height"])
        return instances


def _name_of(dataset_dict: dict) -> str:
    return f"{dataset_dict['file_name']} (image id {dataset_dict.get('image_id')})"


def usable_segmentations(segmentations: Sequence, size: tuple[int, int], where: str) -> list:
    """
    Check the segmentations of an image of a size (height, width), and make RLEs compressed.

    Returns:
        Polygons, a compressed RLE, or None where none is given or it covers nothing of the image.

    Raises:
        InputError: one that is broken; the sentence begins with ``where``.
    """
    masks = measure_masks(segmentations, np.full((len(segmentations), 2), size))
    usable = []
    for segmentation, state in zip(segmentations, masks.state.tolist()):
        if state >= MaskState.NOT_A_MASK:
            raise InputError(
                f"{where}: 'segmentation' is {shorten(segmentation)}, which is not a mask of its "
                "image; tsmask check says what is allowed."
            )
        if state != MaskState.MASK:
            usable.append(None)
        elif isinstance(segmentation, dict):
            usable.append(compress_mask(segmentation, size))
        else:
            # Detectron2 would cut coordinates that are whole numbers after it has scaled them.
            usable.append([np.array(x, dtype=np.float64) for x in valid_polygons(segmentation)])
    return usable


def lie_in_image(masks: PolygonMasks | BitMasks, image_shape: tuple[int, int]) -> torch.Tensor:
    """
    Which masks lie, at least with their extents, in the image: bool, shape (N,).

    :meth:`PolygonMasks.nonempty` asks for a polygon, wherever it lies.
    """
    if isinstance(masks, BitMasks):
        return masks.nonempty()
    # As get_bounding_boxes does, in a fraction of its time.
    polygons = [x or [np.zeros(2)] for x in masks.polygons]  # a crop leaves some without any
    points = np.concatenate([np.zeros(0), *chain.from_iterable(polygons)]).reshape(-1, 2)
    starts = np.cumsum([0, *(sum(map(len, x)) // 2 for x in polygons)])[:-1]
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    return torch.from_numpy((np.minimum(high, image_shape[::-1]) > low.clip(min=0)).all(axis=1))


def union_of_masks(
    masks: PolygonMasks | BitMasks, is_chosen: torch.Tensor, image_shape: tuple[int, int]
) -> torch.Tensor:
    """The pixels of any of the masks that ``is_chosen``, bool (N,), names: bool, shape (H, W)."""
    if isinstance(masks, BitMasks):
        return masks.tensor[is_chosen].any(dim=0)
    polygons = list(chain.from_iterable(compress(masks.polygons, is_chosen.tolist())))
    if not polygons:
        return torch.zeros(image_shape, dtype=torch.bool)
    rle = mask_util.merge(mask_util.frPyObjects(polygons, *image_shape))
    return torch.from_numpy(decode_mask(rle))
