"""CIE Lab colours, whose distances follow what the eye tells apart, on the device of the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch.nn import functional as F

__all__ = ["crop_lab", "rgb_to_lab"]

# Linear sRGB -> CIE XYZ and the white point, both for the illuminant D65 and the 2 degree observer.
_RGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)

# Side of the squares of pixels whose colours are averaged before a crop, as in BoxInst.
_STRIDE = 4


@torch.no_grad()
def rgb_to_lab(images: torch.Tensor) -> torch.Tensor:
    """
    Convert sRGB images to CIE Lab, D65, as ``skimage.color.rgb2lab`` does on the CPU.

    Args:
        images: shape (N, 3, H, W), RGB in 0-255; values outside, such as rounding leaves behind
            when the input normalisation is undone, count as the nearest end.

    Returns:
        shape (N, 3, H, W), L in [0, 100], a and b roughly in [-110, 110]; float32, or float64 for
        float64 images; without gradient.
    """
    images = images.to(torch.promote_types(images.dtype, torch.float32)).clamp(0, 255) / 255
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    # Written out, because autocast would round a matrix product to half precision.
    channels = linear.unbind(1)
    xyz = [
        sum(weight * channel for weight, channel in zip(row, channels)) / white
        for row, white in zip(_RGB_TO_XYZ, _WHITE)
    ]
    x, y, z = (torch.where(t > 0.008856, t ** (1 / 3), 7.787 * t + 16 / 116) for t in xyz)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


@torch.no_grad()
def crop_lab(
    pixels: torch.Tensor,
    image_sizes: Sequence[tuple[int, int]],
    roi_boxes: list[Boxes],
    mask_side_len: int,
    bottom_rows: float = 10,
    original_heights: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cut the colours of each ROI's cells out of the images.

    The RGB image is averaged over 4 x 4 pixels and then converted, as in BoxInst; ROIAlign comes
    last. It averages and interpolates, which in Lab, but not in RGB, leads evenly from one colour
    to the next, and the cost of the conversion does not grow with R.

    Args:
        pixels: shape (N, 3, H, W), RGB in 0-255, padded at the right and at the bottom.
        image_sizes: (height, width) of each image without padding.
        roi_boxes: XYXY in the frame of ``pixels``, one :class:`Boxes` per image, R boxes in all.
        mask_side_len: M.
        bottom_rows: so many rows at the bottom of each image are not valid; BoxInst's authors
            found COCO's annotations there unreliable.
        original_heights: of the images before they were resized; then ``bottom_rows`` counts
            their rows, as in BoxInst. None = it counts rows of ``pixels``.

    Returns:
        The colours, shape (R, 3, M, M), CIE Lab, and whether they are valid, bool, shape
        (R, M, M): the cell's centre lies inside the image and not in its bottom rows. Both
        without gradient.
    """
    if original_heights is None:
        original_heights = [height for height, _ in image_sizes]
    limits = [
        boxes.tensor.new_tensor([width, height - bottom_rows * height / original_height])
        for (height, width), original_height, boxes in zip(
            image_sizes, original_heights, roi_boxes, strict=True
        )
    ]
    limits = torch.cat([limit.expand(len(boxes), 2) for limit, boxes in zip(limits, roi_boxes)])
    corners = Boxes.cat(roi_boxes).tensor

    # Without FPN the padded size need not be a multiple of the stride.
    averaged = F.avg_pool2d(pixels, _STRIDE, ceil_mode=True)
    pooler = ROIPooler(
        mask_side_len, scales=(1 / _STRIDE,), sampling_ratio=0, pooler_type="ROIAlignV2"
    )
    lab = pooler([rgb_to_lab(averaged)], roi_boxes)

    # Shape (R, 2, M): x and y of the centres of columns and rows.
    cells = (torch.arange(mask_side_len, device=corners.device) + 0.5) / mask_side_len
    centres = corners[:, :2, None] + cells * (corners[:, 2:, None] - corners[:, :2, None])
    in_columns, in_rows = ((centres >= 0) & (centres < limits[:, :, None])).unbind(1)
    return lab, in_rows[:, :, None] & in_columns[:, None, :]
