"""The pixels of a batch, as the mask branch needs them: for the CRF, colour losses and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

__all__ = ["PIXELS", "InputPixels", "crop_pixels"]

# Key under which the batch's RGB pixels stand beside the feature maps: the mask branch is given
# feature maps only, so the pixels travel among them.
PIXELS = "pixels"


class InputPixels:
    """Undoes the input normalisation of a model."""

    def __init__(
        self,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        image_format: str = "BGR",
    ):
        """
        Args:
            pixel_mean, pixel_std: ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``.
            image_format: order of the model's channels, "BGR" or "RGB".

        Raises:
            ValueError: another image format.
        """
        if image_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT is {image_format!r}; allowed: 'BGR', 'RGB'.")
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)
        self.image_format = image_format

    def to_rgb(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: shape (N, 3, H, W), as the model sees them.

        Returns:
            shape (N, 3, H, W), RGB in 0-255.
        """
        mean, std = images.new_tensor(self.pixel_mean), images.new_tensor(self.pixel_std)
        pixels = images * std[:, None, None] + mean[:, None, None]
        return pixels.flip(1) if self.image_format == "BGR" else pixels


def crop_pixels(images: torch.Tensor, boxes: list[Boxes], side: int) -> torch.Tensor:
    """
    Cut a square crop out of the images for each box.

    Args:
        images: shape (N, 3, H, W).
        boxes: one :class:`Boxes` per image, R boxes in all, in the frame of ``images``.
        side: of the crops.

    Returns:
        shape (R, 3, side, side).
    """
    pooler = ROIPooler(side, scales=(1.0,), sampling_ratio=0, pooler_type="ROIAlignV2")
    return pooler([images], boxes)
