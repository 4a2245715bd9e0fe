"""Batches of the mapper, and training steps in which models with random weights get enough ROIs."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from coco_data import read_dataset
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from teacher_student_mask import TeacherStudentDatasetMapper


def add_batch_arguments(
    parser: argparse.ArgumentParser, *, batches: int, batch_size: int, size: int
) -> None:
    """Add the arguments of :func:`read_batches`, with these defaults, --foreground and --amp."""
    add = parser.add_argument
    add("--dataset", default="coco_2017_val", help="synthetic if it is not there")
    add("--batches", type=int, default=batches)
    add("--batch-size", type=int, default=batch_size, help="images")
    add("--size", type=int, default=size, help="short side of the images")
    add("--foreground", type=int, default=64, help="proposals added per image")
    add(
        "--amp",
        action="store_true",
        help="train under autocast, as SOLVER.AMP.ENABLED does: float16 on a GPU, bfloat16 on a "
        "CPU (without its gradient scaler, which is the optimizer's)",
    )


def read_batches(
    cfg: CfgNode, dataset: str, num_batches: int, batch_size: int, size: int
) -> tuple[list[list[dict]], str]:
    """
    Mapped examples; the images are read and resized before the timing.

    Args:
        cfg: whose mapper and seen classes are used.
        dataset: a registered name; synthetic images if it is not there.
        num_batches: how many.
        batch_size: images of each.
        size: short side of the images.

    Returns:
        The batches, and a line that says what they are.
    """
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.INPUT.MIN_SIZE_TRAIN = (size,)
    mapper = TeacherStudentDatasetMapper(cfg, True)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dicts, source = read_dataset(dataset, num_batches * batch_size, folder)
        examples = [mapper(x) for x in dicts]
    starts = range(0, len(examples), batch_size)
    batches = [examples[i : i + batch_size] for i in starts]
    return batches, f"{source}; {num_batches} batches of {batch_size} at short side {size}"


class WithProposalsAroundObjects(nn.Module):
    """An RPN to whose proposals boxes with an IoU above 0.5 with an object are added."""

    def __init__(self, rpn: nn.Module, num_boxes: int):
        """
        Args:
            rpn: what it wraps.
            num_boxes: added per image, in turns to its objects.
        """
        super().__init__()
        self.rpn = rpn
        self.num_boxes = num_boxes

    def forward(self, images, features, gt_instances=None):
        """As of :class:`RPN`."""
        proposals, losses = self.rpn(images, features, gt_instances)
        if not self.training:
            return proposals, losses
        return [self._add_boxes(*pair) for pair in zip(proposals, gt_instances)], losses

    def _add_boxes(self, proposals: Instances, targets: Instances) -> Instances:
        if len(targets) == 0:
            return proposals
        rows = torch.arange(self.num_boxes, device=targets.gt_classes.device) % len(targets)
        boxes = targets.gt_boxes.tensor[rows]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        # Each edge by at most 10 % of the side: at worst IoU 0.64.
        boxes = Boxes(boxes + 0.1 * sides * (2 * torch.rand_like(boxes) - 1))
        boxes.clip(proposals.image_size)
        added = Instances(proposals.image_size, proposal_boxes=boxes)
        added.objectness_logits = torch.zeros(len(boxes), device=boxes.device)
        return Instances.cat([proposals, added])


def step(model: nn.Module, batch: list[dict], amp: bool = False) -> None:
    """Forward and backward, with the same proposals drawn each time; amp: forward in autocast."""
    torch.manual_seed(0)
    forward_and_backward(model, lambda: model(batch), amp)


def forward_and_backward(
    model: nn.Module, compute_losses: Callable[[], dict[str, torch.Tensor]], amp: bool
) -> None:
    """Losses of the model or of a part of it, in autocast if amp, and their backward pass."""
    with EventStorage():
        with torch.autocast(model.device.type, enabled=amp):
            losses = compute_losses()
        sum(losses.values()).backward()
    model.zero_grad(set_to_none=True)


def count_madds(program: Callable) -> int:
    """Multiply-adds of the convolutions and matrix products of one call."""
    with FlopCounterMode(display=False) as counter:
        program()
    return counter.get_total_flops() // 2
