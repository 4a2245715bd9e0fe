"""Masks of some of the instances of an image."""

from __future__ import annotations

import torch
from detectron2.structures import BitMasks, PolygonMasks

__all__ = ["SparseMasks"]


class SparseMasks:
    """
    Masks of some instances, which stand in an :class:`Instances` as if every instance had one.

    Indexing copies no mask: all selections share ``masks`` and differ in ``rows``.

    Attributes:
        masks: of K objects, in the frame of the (augmented) image.
        rows: int64, shape (N,), on the CPU: which of ``masks`` an instance has, -1 = none.
    """

    def __init__(self, masks: PolygonMasks | BitMasks, rows: torch.Tensor):
        """
        Args:
            masks: of K objects.
            rows: integers of shape (N,), in [-1, K).

        Raises:
            ValueError: ``rows`` has another shape or names a mask that is not there.
        """
        rows = rows.to(device="cpu", dtype=torch.int64)
        if rows.dim() != 1 or ((rows < -1) | (rows >= len(masks))).any():
            raise ValueError(
                f"SparseMasks needs rows of shape (N,) in [-1, {len(masks)}), got {rows.tolist()}."
            )
        self.masks, self.rows = masks, rows

    def to(self, *args, **kwargs) -> SparseMasks:
        """A copy whose masks are on another device, if they are bitmasks."""
        return SparseMasks(self.masks.to(*args, **kwargs), self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | slice | torch.Tensor) -> SparseMasks:
        """
        Select instances.

        Args:
            item: an index, a slice, a bool tensor of shape (N,) or an integer tensor, with the
                meaning that it has for a tensor of length N.

        Returns:
            As many instances as were selected (1 for a single index).

        Raises:
            IndexError: an index outside the instances.
        """
        if isinstance(item, int):
            item = [item]
        if isinstance(item, torch.Tensor):
            item = item.to("cpu")
        return SparseMasks(self.masks, self.rows[item])

    def crop_and_resize(self, boxes: torch.Tensor, mask_side_len: int) -> torch.Tensor:
        """
        Crop each instance's mask with its box and resize it, as PolygonMasks and BitMasks do.

        Args:
            boxes: shape (N, 4), XYXY, absolute coordinates of the masks' frame.
            mask_side_len: side M of the crops, in cells.

        Returns:
            bool, shape (N, M, M), on the device of ``boxes``; False where there is no mask.

        Raises:
            ValueError: another number of boxes than instances.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes were given for {len(self)} instances.")
        shape = (len(self), mask_side_len, mask_side_len)
        crops = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
        places = (self.rows >= 0).nonzero().squeeze(1)
        if len(places) > 0:
            on_device = places.to(boxes.device)
            found = self.masks[self.rows[places]].crop_and_resize(boxes[on_device], mask_side_len)
            crops[on_device] = found.to(device=boxes.device, dtype=torch.bool)
        return crops

    @staticmethod
    def cat(parts: list[SparseMasks]) -> SparseMasks:
        """
        Join selections from the masks of one image.

        Raises:
            ValueError: they are selections from different masks.
        """
        first = parts[0]
        if any(x.masks is not first.masks for x in parts):
            raise ValueError("Instances with different masks cannot share one SparseMasks.")
        return SparseMasks(first.masks, torch.cat([x.rows for x in parts]))

    def __repr__(self) -> str:
        return f"SparseMasks(num_instances={len(self)}, num_masks={len(self.masks)})"
