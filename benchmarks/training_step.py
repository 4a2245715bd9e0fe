#!/usr/bin/env python
"""
Time of a training step, forward and backward without the optimizer, of methods in turns.

All models have the same random weights where they have the same layers, and in one round all get
the same images and the same proposals around the objects (--foreground per image). R50-FPN, 80
classes, masks of the VOC classes. Beside the time, with --costs: the multiply-adds of a step's
convolutions and matrix products, and on a GPU what its tensors take at the worst moment, the
gradients of the weights included, the weights themselves not.

  the paper's two heads:  training_step.py --baseline ../other-checkout
  every base method:      training_step.py --methods mask_rcnn opmask shapeprop ... --costs
"""

import argparse

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from models import add_model_arguments, build_models, make_cfg
from paired import Programs, main, on_next
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from teacher_student_mask import TeacherStudentDatasetMapper


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, size=320)
    add = parser.add_argument
    add("--dataset", default="coco_2017_val", help="(%(default)s)")
    add("--batches", type=int, default=2, help="(%(default)s)")
    add("--batch-size", type=int, default=1, help="images (%(default)s)")
    add("--foreground", type=int, default=64, help="proposals added per image (%(default)s)")
    add("--amp", action="store_true", help="under autocast, as SOLVER.AMP.ENABLED")
    add("--costs", action="store_true", help="count multiply-adds and memory, too")
    add("--threads", nargs="+", type=int, help="numbers of CPU threads (that of torch)")


def make_programs(args: argparse.Namespace) -> Programs:
    batches = read_batches(args)
    models = build_models(args, [{"image": batches[0][0]["image"]}])
    programs = {}
    for name, model in models.items():
        model.train()
        rpn = model.proposal_generator
        if rpn is not None:  # CondInst has none
            model.proposal_generator = WithProposalsAroundObjects(rpn, args.foreground)
        for threads in args.threads or [torch.get_num_threads()]:
            key = f"{name}, {threads} threads" if args.threads else name
            programs[key] = on_next(step, [(model, x, args.amp, threads) for x in batches])
        if args.costs:
            print_costs(name, model, batches[0], args.amp)
    return programs


def read_batches(args: argparse.Namespace) -> list[list[dict]]:
    """Mapped examples of a registered dataset; they are read and resized before the timing."""
    cfg = make_cfg(args.methods[0], args)
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TRAIN = (args.dataset,), (args.size,)
    mapper = TeacherStudentDatasetMapper(cfg, True)
    np.random.seed(0)
    dicts = [x for x in DatasetCatalog.get(args.dataset) if x["annotations"]]
    num_images = args.batches * args.batch_size
    examples = [mapper(x) for x in dicts[:: max(1, len(dicts) // num_images)][:num_images]]
    starts = range(0, num_images, args.batch_size)
    return [examples[i : i + args.batch_size] for i in starts]


def step(model: nn.Module, batch: list[dict], amp: bool, threads: int) -> float:
    """Forward and backward, with the same proposals drawn each time; returns the loss."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    with EventStorage():
        with torch.autocast(model.device.type, enabled=amp):
            loss = sum(model(batch).values())
        loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.item()


def print_costs(name: str, model: nn.Module, batch: list[dict], amp: bool) -> None:
    is_on_gpu = model.device.type == "cuda"
    step(model, batch, amp, torch.get_num_threads())  # nothing is counted that stays
    if is_on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        step(model, batch, amp, torch.get_num_threads())
    costs = f"{counter.get_total_flops() / 2e9:.1f} G multiply-adds"
    if is_on_gpu:
        costs += f", {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
    print(f"{name}: {costs}")


class WithProposalsAroundObjects(nn.Module):
    """An RPN to whose proposals boxes with an IoU above 0.5 with an object are added."""

    def __init__(self, rpn: nn.Module, num_boxes: int):
        """
        Args:
            rpn: to be wrapped.
            num_boxes: added per image, in turns to its objects.
        """
        super().__init__()
        self.rpn = rpn
        self.num_boxes = num_boxes

    def forward(self, images, features, gt_instances=None):
        """As of :class:`RPN`."""
        proposals, losses = self.rpn(images, features, gt_instances)
        if self.training:
            proposals = [self._add_boxes(*pair) for pair in zip(proposals, gt_instances)]
        return proposals, losses

    def _add_boxes(self, proposals: Instances, targets: Instances) -> Instances:
        rows = torch.arange(self.num_boxes, device=targets.gt_classes.device) % len(targets)
        boxes = targets.gt_boxes.tensor[rows]
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        # Each edge by at most 10 % of the side: at worst IoU 0.64.
        boxes = Boxes(boxes + 0.1 * sides * (2 * torch.rand_like(boxes) - 1))
        boxes.clip(proposals.image_size)
        added = Instances(proposals.image_size, proposal_boxes=boxes)
        added.objectness_logits = torch.zeros(len(boxes), device=boxes.device)
        return Instances.cat([proposals, added])


if __name__ == "__main__":
    raise SystemExit(main(__doc__, add_arguments, make_programs, rounds=8))
