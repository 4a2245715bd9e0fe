"""A field of :class:`detectron2.structures.Instances` that Detectron2 does not have."""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign

__all__ = ["ImageMask"]


class ImageMask:
    """
    One (H, W) bool map that stands in an :class:`Instances` as if every instance had its own.

    Detectron2's samplers copy each ``gt_*`` field to every proposal. This field is a reference to
    the map of the image, so it costs H * W bytes an image whatever the number of proposals. It
    offers the part of the interface of :class:`BitMasks` that training needs.

    Attributes:
        tensor: bool, shape (H, W), in the frame of the (augmented) image.
    """

    def __init__(self, tensor: torch.Tensor, length: int):
        """``tensor`` is a map of shape (H, W); ``length`` instances share it."""
        self.tensor = tensor.to(torch.bool)
        self._length = int(length)

    def to(self, *args, **kwargs) -> ImageMask:
        """A copy on another device; takes the arguments of :meth:`torch.Tensor.to`."""
        return ImageMask(self.tensor.to(*args, **kwargs), self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: slice | torch.Tensor) -> ImageMask:
        """Select instances by what indexes a tensor of length N; the map itself is shared."""
        if isinstance(item, torch.Tensor):
            item = item.to("cpu")
        return ImageMask(self.tensor, len(torch.arange(self._length)[item]))

    def crop_and_resize(self, boxes: torch.Tensor, mask_side_len: int) -> torch.Tensor:
        """
        Crop the map with one box per instance and resize each crop to a square.

        Samples as :meth:`BitMasks.crop_and_resize` does: aligned ROIAlign, then >= 0.5.

        Args:
            boxes: shape (N, 4), XYXY, absolute coordinates of the map's frame.
            mask_side_len: side M of the crops, in cells.

        Returns:
            bool, shape (N, M, M), on the device of ``boxes``.
        """
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1).to(torch.float32)
        image = self.tensor.to(device=boxes.device, dtype=torch.float32)[None, None]
        crops = ROIAlign((mask_side_len, mask_side_len), 1.0, 0, aligned=True)(image, rois)
        return crops[:, 0] >= 0.5
