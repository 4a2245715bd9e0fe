"""Gradients of a process group, and those of one process that could equal them."""

from __future__ import annotations

import copy

import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from distributed_training import EVERY_METHOD, make_cfg, make_input
from test_base_methods import ON_GT_BOXES

GRADIENT_METHODS = ("baseline", "ours", "opmask + boxinst + ours")
SYNC_METHODS = ("ours, naiveSyncBN_N",)


def compare_gradients(method: str) -> dict[str, dict[str, torch.Tensor]]:
    """
    Gradients of DDP, and those of one process that could equal them, {case: {name: gradient}}.

    - "different, DDP": other kinds of image on each rank; "different, mean": the mean over the
      ranks of what each batch gives alone.
    - "equal, DDP": on each rank other pixels, but the same boxes; "equal, one batch": all images
      in one batch without DDP.
    - "mask, DDP": loss_mask alone, other numbers of objects on the ranks; "mask, one batch", and
      "mask, rank 0", "mask, rank 1", ... of each batch alone.

    Nothing is random: all anchors, or given proposals, are sampled.
    """
    ranks = range(comm.get_world_size())
    sample_all = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 4096]
    sample_all += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512]
    given = [*sample_all, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    # Without an RPN the ROIs alone give the pyramid's levels their gradients.
    given += ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
    kinds = ["normal", "no seen object", "no object"][: len(ranks)]
    found = {}

    opts = EVERY_METHOD[method]
    if method not in SYNC_METHODS:
        model = _seeded_model(make_cfg([*opts, *sample_all]))
        batches = [[make_input(kind, seed)] for seed, kind in enumerate(kinds)]
        found["different, DDP"] = _gradients(model, batches[comm.get_rank()], with_ddp=True)
        found["different, mean"] = _mean([_gradients(model, x) for x in batches])

    # Every process computes what one process would, in step with the others: there, naiveSyncBN_N
    # gathers equal statistics.
    # The pairwise loss is a mean over pairs of cells; how many depends on the pixels.
    equal = [*opts, *given, "MODEL.BOX_SUPERVISION.PAIRWISE_WEIGHT", 0.0]
    model = _seeded_model(make_cfg(equal))
    batches = [[make_input("normal", seed)] for seed in ranks]
    found["equal, DDP"] = _gradients(model, batches[comm.get_rank()], with_ddp=True)
    found["equal, one batch"] = _gradients(model, sum(batches, []))

    if method not in SYNC_METHODS:
        model = _seeded_model(make_cfg([*opts, *given, *ON_GT_BOXES]))
        batches = [[make_input(kind, seed)] for seed, kind in enumerate(kinds)]
        only = "loss_mask"
        found["mask, DDP"] = _gradients(model, batches[comm.get_rank()], only, with_ddp=True)
        found["mask, one batch"] = _gradients(model, sum(batches, []), only)
        for rank, batch in enumerate(batches):
            found[f"mask, rank {rank}"] = _gradients(model, batch, only)
    return found


def _seeded_model(cfg: CfgNode) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg).train()
    for name, parameter in model.named_parameters():
        # The predictors start at almost 0, and so would most gradients.
        if name.endswith("mask_head.predictor.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def _gradients(
    model: torch.nn.Module, batch: list[dict], only: str | None = None, with_ddp: bool = False
) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    wrapped = model
    if with_ddp:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    with EventStorage(0):
        losses = wrapped(batch)
    # A factor of 0 instead of leaving it out: DDP waits for a gradient of each parameter.
    sum(x * (only in (None, name)) for name, x in losses.items()).backward()
    return {name: x.grad for name, x in model.named_parameters()}


def _mean(gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(x[name] for x in gradients) / len(gradients) for name in gradients[0]}
