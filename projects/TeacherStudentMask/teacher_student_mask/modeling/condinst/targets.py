"""What locations and mask planes should predict: FCOS's assignment, and masks at a stride."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

from ..mask_targets import has_mask_of, has_model_mask_of

__all__ = [
    "Grid",
    "PlaneTargets",
    "assign_objects",
    "box_distances",
    "centreness_of",
    "make_plane_targets",
]


@dataclass(frozen=True)
class Grid:
    """
    The locations of all levels of a feature pyramid, level after level and row by row.

    Attributes:
        points: float, shape (L, 2), x and y in pixels: s // 2 + s * index at stride s.
        levels: int64, shape (L,), positions in ``shapes``.
        strides, shapes: of each level, pixels, and (height, width).
        starts: of each level, the index of its first location.
    """

    points: torch.Tensor
    levels: torch.Tensor
    strides: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]

    @classmethod
    def of(
        cls, shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device
    ) -> Grid:
        """The grid of levels of these shapes, (height, width), and strides in pixels."""
        points, levels, starts = [], [], [0]
        for level, ((height, width), stride) in enumerate(zip(shapes, strides)):
            ys = torch.arange(height, device=device) * stride + stride // 2
            xs = torch.arange(width, device=device) * stride + stride // 2
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            points.append(torch.stack([x, y], dim=-1).reshape(-1, 2).float())
            levels.append(torch.full_like(points[-1][:, 0], level, dtype=torch.int64))
            starts.append(starts[-1] + height * width)
        shapes = tuple((h, w) for h, w in shapes)
        return cls(torch.cat(points), torch.cat(levels), tuple(strides), shapes, tuple(starts[:-1]))

    @property
    def stride_of_each(self) -> torch.Tensor:
        """The stride of each location in pixels, float, shape (L,)."""
        return self.points.new_tensor(self.strides)[self.levels]

    def nearest(self, points: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Index of the location nearest each point, (R, 2) in pixels, on its level, (R,)."""
        shapes = torch.tensor(self.shapes, device=points.device)[levels]
        cells = (points / points.new_tensor(self.strides)[levels, None]).floor().long()
        x = torch.minimum(cells[:, 0].clamp(min=0), shapes[:, 1] - 1)
        y = torch.minimum(cells[:, 1].clamp(min=0), shapes[:, 0] - 1)
        return torch.tensor(self.starts, device=points.device)[levels] + y * shapes[:, 1] + x


def box_distances(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Distances from points (..., 2) to the left, top, right and lower side of boxes (..., 4)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def centreness_of(distances: torch.Tensor) -> torch.Tensor:
    """FCOS's centreness of points inside boxes, shape (R,) in [0, 1], of distances (R, 4)."""
    pairs = torch.stack([distances[:, 0::2], distances[:, 1::2]], dim=1)
    # Of a box without width or height it would be 0 / 0.
    return (pairs.amin(2) / pairs.amax(2).clamp(min=1e-12)).prod(1).clamp(min=0).sqrt()


def assign_objects(
    grid: Grid, boxes: torch.Tensor, centres: torch.Tensor, sizes: Sequence[float], radius: float
) -> torch.Tensor:
    """
    Which object each location of an image should detect, as FCOS with centre sampling.

    The location lies in the object's box and within ``radius`` strides of its centre along both
    axes, neither on the border; the largest distance to a side of the box is in the range of the
    location's level. Of several objects the smallest box wins, of equal ones the first.

    Args:
        grid: of L locations.
        boxes, centres: of G objects, shapes (G, 4), XYXY, and (G, 2), in pixels.
        sizes: limits between the levels' ranges in pixels, one fewer than levels; a distance that
            is a limit belongs to both levels.
        radius: in strides.

    Returns:
        Index of the object, -1 = background; int64, shape (L,).
    """
    if len(boxes) == 0:
        return torch.full_like(grid.levels, -1)
    to_box = box_distances(grid.points[:, None], boxes[None])
    reach = (radius * grid.stride_of_each)[:, None, None]
    near = (grid.points[:, None] - centres[None]).abs() < reach
    is_candidate = (to_box.amin(2) > 0) & near.all(2)
    limits = to_box.new_tensor([-1, *sizes, float("inf")])
    largest = to_box.amax(2)
    is_candidate &= largest >= limits[grid.levels][:, None]
    is_candidate &= largest <= limits[grid.levels + 1][:, None]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).expand(len(grid.points), -1)
    areas = areas.masked_fill(~is_candidate, float("inf"))
    smallest = areas.amin(1, keepdim=True)
    # Of a bool tensor argmax is not defined everywhere. The first of equal maxima.
    first = (areas == smallest).to(torch.int32).argmax(1)
    return torch.where(smallest[:, 0].isinf(), -1, first)


@dataclass(frozen=True)
class PlaneTargets:
    """
    The G objects of a batch, image after image, on planes: h x w cells over each padded image.

    A cell stands for one pixel of its square, ``stride // 2`` right of and below the first one.

    Attributes:
        masks: bool, shape (G, h, w), of objects with a mask of a human or a model, else False.
        box_masks: bool, shape (G, h, w), the cells whose pixel's centre lies in the object's box.
        has_mask, has_model_mask: bool, shape (G,), a human's, or a model's alone.
        centres: shape (G, 2), pixels: the centroid of a human mask, else the centre of the box.
        boxes: shape (G, 4), XYXY in pixels.
        classes, images: int64, shape (G,), contiguous ids and positions in the batch.
        exclusion_masks: bool, shape (N, h, w), the union of the human masks of each image.
        valid: bool, shape (N, h, w), the cells whose colours count, for box supervision.
    """

    masks: torch.Tensor
    box_masks: torch.Tensor
    has_mask: torch.Tensor
    has_model_mask: torch.Tensor
    centres: torch.Tensor
    boxes: torch.Tensor
    classes: torch.Tensor
    images: torch.Tensor
    exclusion_masks: torch.Tensor
    valid: torch.Tensor


@torch.no_grad()
def make_plane_targets(
    targets: list[Instances],
    size: tuple[int, int],
    stride: int,
    valid_sizes: Sequence[tuple[float, float]],
) -> PlaneTargets:
    """
    Sample what is known of the objects of a batch; no mask is read of an object that has none.

    Args:
        targets: one per image, with the fields of :class:`TeacherStudentDatasetMapper`; an image
            without objects may lack them.
        size: height and width of the padded images in pixels, multiples of ``stride``.
        stride: side of a cell in pixels.
        valid_sizes: see :meth:`BoxSupervision.valid_sizes`.
    """
    device = targets[0].gt_classes.device
    plane = (size[0] // stride, size[1] // stride)
    # Centres of pixels.
    ys = torch.arange(plane[0], device=device) * stride + stride // 2 + 0.5
    xs = torch.arange(plane[1], device=device) * stride + stride // 2 + 0.5
    fields: dict[str, list[torch.Tensor]] = {name: [] for name in PlaneTargets.__dataclass_fields__}
    for i, (x, (height, width)) in enumerate(zip(targets, valid_sizes)):
        boxes, is_human, is_model = x.gt_boxes.tensor, has_mask_of(x), has_model_mask_of(x)
        masks = torch.zeros(len(x), *plane, dtype=torch.bool, device=device)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        rows = (is_human | is_model).nonzero()[:, 0]
        if len(rows) > 0:
            given = x.gt_masks[rows]
            if not isinstance(given, BitMasks):
                given = BitMasks.from_polygon_masks(given, *x.image_size)
            pixels = given.tensor.to(device)
            masks[rows] = _sample(pixels, stride, plane)
            is_centred = is_human[rows] & pixels.flatten(1).any(1)
            centres[rows[is_centred]] = _centroids(pixels[is_centred]).to(centres.dtype)
        in_columns = (xs >= boxes[:, 0:1]) & (xs <= boxes[:, 2:3])
        in_rows = (ys >= boxes[:, 1:2]) & (ys <= boxes[:, 3:4])
        union = torch.zeros(1, *x.image_size, dtype=torch.bool, device=device)
        if x.has("gt_exclusion_masks"):
            union = x.gt_exclusion_masks.tensor[None]
        for name, value in {
            "masks": masks,
            "box_masks": in_rows[:, :, None] & in_columns[:, None, :],
            "has_mask": is_human,
            "has_model_mask": is_model,
            "centres": centres,
            "boxes": boxes,
            "classes": x.gt_classes,
            "images": torch.full_like(x.gt_classes, i),
            "exclusion_masks": _sample(union, stride, plane),
            "valid": ((ys < height)[:, None] & (xs < width))[None],
        }.items():
            fields[name].append(value)
    return PlaneTargets(**{name: torch.cat(values) for name, values in fields.items()})


def _sample(masks: torch.Tensor, stride: int, plane: tuple[int, int]) -> torch.Tensor:
    # (G, H, W) -> (G, h, w); False beyond the image.
    cells = masks[:, stride // 2 :: stride, stride // 2 :: stride]
    return F.pad(cells, [0, plane[1] - cells.shape[2], 0, plane[0] - cells.shape[1]])


def _centroids(masks: torch.Tensor) -> torch.Tensor:
    # Bool, (G, H, W), none empty -> (G, 2). A rectangle has the centre of its box.
    columns, rows = masks.sum(1).double(), masks.sum(2).double()
    xs = columns @ torch.arange(columns.shape[1], device=masks.device).double()
    ys = rows @ torch.arange(rows.shape[1], device=masks.device).double()
    return torch.stack([xs, ys], dim=1) / rows.sum(1, keepdim=True) + 0.5
