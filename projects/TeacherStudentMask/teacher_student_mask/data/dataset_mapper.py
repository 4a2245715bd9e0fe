"""The mapper that forgets the masks of unseen classes and says which instances have one."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    PolygonMasks,
    polygons_to_bitmask,
)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import Image

from ..checks.image_checks import DEEP_MODES
from ..checks.mask_measures import covers_image, measure_polygons, measure_rles
from ..checks.object_checks import MAX_PIXELS_OUTSIDE
from ..class_splits import resolve_seen_classes
from ..structures import ImageMask

__all__ = ["TeacherStudentDatasetMapper"]

logger = logging.getLogger(__name__)


class TeacherStudentDatasetMapper(DatasetMapper):
    """
    Map a dataset dict to a training example in which masks may be missing.

    Before any augmentation the ``segmentation`` of every object that training must not use is
    replaced by the rectangle of its box: objects of unseen classes, and objects that have no mask
    (key missing, ``null``, ``[]``, or a mask that covers nothing of the image, which is warned of).
    From there on nothing of an unseen mask exists. The ``instances`` have, beside ``gt_boxes`` and
    ``gt_classes``:

    * ``gt_masks``: :class:`PolygonMasks`, or :class:`BitMasks` if the config says so or one of the
      image's usable masks is an RLE; a rectangle where ``gt_has_mask`` is False.
    * ``gt_has_mask``: bool tensor of shape (N,).
    * ``gt_exclusion_masks``: :class:`ImageMask`, the union of the image's usable masks.

    Crowd regions are left out, as in Detectron2. Objects are dropped only if augmentation leaves
    nothing of their box, or of their mask where they have one. The input dict is not changed.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        seen_classes: Collection[int],
        add_gt_boxes_at_test: bool = False,
        **kwargs,
    ):
        """
        Args:
            is_train: whether to apply training augmentation and to load annotations.
            seen_classes: contiguous ids of the classes whose masks training may use.
            add_gt_boxes_at_test: if not ``is_train``, give each example ``instances`` with
                ``gt_boxes`` and ``gt_classes`` of the non-crowd objects, for ``TEST.GT_BOXES``.
            **kwargs: of :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.seen_classes = frozenset(seen_classes)
        self.add_gt_boxes_at_test = add_gt_boxes_at_test
        self._num_empty_masks = 0

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        ret = super().from_config(cfg, is_train)
        ret["seen_classes"] = cls._resolve_seen_classes(cfg) if is_train else ()
        ret["add_gt_boxes_at_test"] = cfg.TEST.GT_BOXES
        return ret

    @classmethod
    def _resolve_seen_classes(cls, cfg: CfgNode) -> list[int]:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
        names = {}
        for dataset in cfg.DATASETS.TRAIN:
            metadata = MetadataCatalog.get(dataset)
            if not metadata.get("thing_classes"):
                DatasetCatalog.get(dataset)  # json datasets learn their classes when they are read
            names[dataset] = list(metadata.thing_classes)
        thing_classes = next(iter(names.values()))
        for dataset, classes in names.items():
            if classes != thing_classes:
                raise ValueError(
                    "The datasets of DATASETS.TRAIN must have the same classes in the same order; "
                    f"{cfg.DATASETS.TRAIN[0]!r} and {dataset!r} differ."
                )
        seen = resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, thing_classes)
        unseen = [name for i, name in enumerate(thing_classes) if i not in set(seen)]
        logger.info(
            f"DATASETS.SEEN_CLASSES {cfg.DATASETS.SEEN_CLASSES!r}: training uses the masks of "
            f"{len(seen)} classes; of {len(unseen)} classes it uses the boxes alone: "
            f"{', '.join(unseen) or '-'}"
        )
        return seen

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Args:
            dataset_dict: one image in Detectron2's standard dataset format.

        Returns:
            The format that Detectron2's models take.

        Raises:
            ValueError: a usable segmentation that cannot be read; names file and annotation.
        """
        where = f"{dataset_dict['file_name']} (image id {dataset_dict.get('image_id')})"
        try:
            # The header alone; PathManager, as for all files of a dataset, also gets remote ones.
            with PathManager.open(dataset_dict["file_name"], "rb") as f, Image.open(f) as image:
                if image.mode.startswith(DEEP_MODES):
                    raise ValueError(
                        f"{where}: the image has PIL's mode {image.mode!r}, whose values above 255 "
                        "would be cut; convert it to 8 bits a channel."
                    )
            example = super().__call__(dataset_dict)
        except (OSError, SyntaxError, Image.DecompressionBombError, utils.SizeMismatchError) as e:
            raise ValueError(
                f"{where}: the image cannot be used: {e} Replace it, or correct the json; "
                "tools/check_annotations.py --images finds all such images."
            ) from e
        # A json may have 480.0; the image has been found to have this size.
        example.update(height=int(example["height"]), width=int(example["width"]))
        if not self.is_train and self.add_gt_boxes_at_test:
            example["instances"] = self._gt_boxes_of(dataset_dict, example["image"].shape[-2:])
        return example

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        if not self.use_instance_mask:
            return super()._transform_annotations(dataset_dict, transforms, image_shape)

        annotations = [
            annotation
            for annotation in dataset_dict.pop("annotations")
            if annotation.get("iscrowd", 0) == 0
        ]
        # First of all, so that no later step can see an unseen mask.
        has_mask = torch.tensor(
            [self._keep_or_forget_mask(x, dataset_dict) for x in annotations], dtype=torch.bool
        )
        mask_format = self._mask_format_for(annotations)
        for annotation in annotations:
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            utils.transform_instance_annotations(
                annotation,
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
        instances = utils.annotations_to_instances(annotations, image_shape, mask_format)
        if len(instances) == 0:
            instances.gt_masks = PolygonMasks([])
        instances.gt_has_mask = has_mask

        if self.recompute_boxes and has_mask.any():
            # After a crop the box of a mask is tighter than the cropped box. Only for objects with
            # a mask: for the others there is nothing to tighten to.
            tight_boxes = instances.gt_masks[has_mask].get_bounding_boxes()
            instances.gt_boxes.tensor[has_mask] = tight_boxes.tensor
        # Not by_mask=True, Detectron2's default, for it would judge the boxes by rectangles.
        instances = utils.filter_empty_instances(instances, by_mask=False)
        is_visible = _have_pixels(instances.gt_masks, image_shape) | ~instances.gt_has_mask
        instances = instances[is_visible]
        # Of those that are left: UnseenMaskGuard wants to know where each pixel comes from.
        union = _union_of_masks(instances.gt_masks[instances.gt_has_mask], image_shape)
        instances.gt_exclusion_masks = ImageMask(union, len(instances))
        dataset_dict["instances"] = instances

    def _keep_or_forget_mask(self, annotation: dict, dataset_dict: dict) -> bool:
        """
        Prepare ``annotation["segmentation"]`` in place; return whether it is a usable mask.
        """
        segmentation = None
        if annotation["category_id"] in self.seen_classes:
            segmentation = _read_segmentation(annotation.get("segmentation"), dataset_dict)
            if segmentation is None and annotation.get("segmentation"):
                self._warn_of_empty_mask(dataset_dict)
        annotation["segmentation"] = segmentation or _box_as_polygons(annotation)
        return segmentation is not None

    def _warn_of_empty_mask(self, dataset_dict: dict) -> None:
        self._num_empty_masks += 1
        number = str(self._num_empty_masks)
        if number.strip("0") == "1":  # the first, the tenth, the hundredth, ...
            logger.warning(
                f"{dataset_dict.get('file_name')} (image id {dataset_dict.get('image_id')}): the "
                "mask of an object covers nothing of the image; the object is taken as one without "
                f"a mask (number {number} in this process, counted each time it is read). "
                "tools/check_annotations.py finds all of them."
            )

    def _mask_format_for(self, annotations: list[dict]) -> str:
        has_rle = any(isinstance(x["segmentation"], dict) for x in annotations)
        if has_rle and self.instance_mask_format != "bitmask":
            log_first_n(
                logging.INFO,
                "Found masks in RLE: images that have one use bitmasks instead of "
                f"INPUT.MASK_FORMAT {self.instance_mask_format!r}.",
                name=__name__,
            )
        return "bitmask" if has_rle else self.instance_mask_format

    @staticmethod
    def _gt_boxes_of(dataset_dict: dict, image_shape: tuple[int, int]) -> Instances:
        annotations = [x for x in dataset_dict["annotations"] if x.get("iscrowd", 0) == 0]
        # At test time the only transform is a resize, so boxes follow from the two sizes.
        scale_x = image_shape[1] / dataset_dict["width"]
        scale_y = image_shape[0] / dataset_dict["height"]
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
        instances = Instances(tuple(image_shape))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        instances.gt_boxes.scale(scale_x, scale_y)
        instances.gt_classes = torch.tensor(
            [x["category_id"] for x in annotations], dtype=torch.int64
        )
        return instances


def _box_as_polygons(annotation: dict) -> list[list[float]]:
    x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _read_segmentation(segmentation, dataset_dict: dict) -> list | dict | None:
    """
    Check a COCO segmentation and make an RLE compressed; None if it holds no mask.
    """
    where = f"{dataset_dict.get('file_name')} (image id {dataset_dict.get('image_id')})"
    if segmentation is None or (isinstance(segmentation, list) and not segmentation):
        return None
    if isinstance(segmentation, list):
        polygons = [_read_polygon(x, where) for x in segmentation]
        size = np.array([dataset_dict["height"], dataset_dict["width"]])
        return segmentation if covers_image(*measure_polygons(polygons), size).any() else None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise ValueError(
            f"{where}: 'segmentation' must be a list of polygons, an RLE dict with 'size' and "
            f"'counts', or null for an object without a mask, got {str(segmentation)[:80]}."
        )
    size = (int(dataset_dict["height"]), int(dataset_dict["width"]))
    if tuple(segmentation["size"]) != size:
        raise ValueError(
            f"{where}: an RLE has size {list(segmentation['size'])}, but the image is "
            f"{list(size)} (height, width)."
        )
    # pycocotools would read beyond the runs, or make masks of what is none.
    counts = segmentation["counts"]
    (num_pixels,), (area,), _ = measure_rles([counts.decode() if type(counts) is bytes else counts])
    if num_pixels != size[0] * size[1]:
        raise ValueError(
            f"{where}: the runs of an RLE must have {size[0] * size[1]} pixels in all, those of "
            f"the image, got {str(segmentation)[:80]}."
        )
    if isinstance(counts, list):
        segmentation = mask_util.frPyObjects(segmentation, *size)
    return segmentation if area > 0 else None


def _read_polygon(polygon, where: str) -> list[float]:
    try:
        values = np.asarray(polygon)
    except ValueError:  # lists of different lengths
        values = np.zeros(0)
    if values.ndim != 1 or len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{where}: a polygon of 'segmentation' must be a flat list of at least 3 x,y "
            f"pairs, got {str(polygon)[:80]}. Use null for an object without a mask."
        )
    if not _are_pixels(values):
        raise ValueError(
            f"{where}: a polygon of 'segmentation' must be in pixels, at most "
            f"{MAX_PIXELS_OUTSIDE} from the image, got {str(polygon)[:80]}."
        )
    return values.tolist()


def _have_pixels(masks: PolygonMasks | BitMasks, image_shape: tuple[int, int]) -> torch.Tensor:
    # bool, shape (N,). PolygonMasks.nonempty asks for a polygon, wherever it lies.
    if isinstance(masks, BitMasks):
        return masks.nonempty()
    have_pixels = np.zeros(len(masks), dtype=bool)
    owners = np.repeat(np.arange(len(masks)), [len(x) for x in masks.polygons])
    if len(owners):
        polygons = [x.tolist() for of_one in masks.polygons for x in of_one]
        covers = covers_image(*measure_polygons(polygons), np.array(image_shape))
        have_pixels[owners[covers]] = True
    return torch.from_numpy(have_pixels)


def _are_pixels(values: np.ndarray) -> bool:
    # Rasterising a polygon that ends far away, or nowhere, would take all memory. NaN is not <=.
    return values.dtype.kind in "iuf" and bool((np.abs(values) <= MAX_PIXELS_OUTSIDE).all())


def _union_of_masks(masks: PolygonMasks | BitMasks, image_shape: tuple[int, int]) -> torch.Tensor:
    if isinstance(masks, BitMasks):
        return masks.tensor.any(dim=0)
    polygons = [polygon for polygons_of_one in masks.polygons for polygon in polygons_of_one]
    return torch.from_numpy(polygons_to_bitmask(polygons, *image_shape))
