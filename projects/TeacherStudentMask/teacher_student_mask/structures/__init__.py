"""Fields of :class:`detectron2.structures.Instances` that Detectron2 does not have."""

from .image_mask import ImageMask
from .sparse_masks import SparseMasks

__all__ = ["ImageMask", "SparseMasks"]
