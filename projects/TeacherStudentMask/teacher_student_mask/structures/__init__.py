"""Data structures that travel inside Detectron2's :class:`Instances`."""

from .image_mask import ImageMask

__all__ = ["ImageMask"]
