"""
Models, images and trainings of which each process of a process group runs one.

The mask branch is that of the tiny model of the other tests, the backbone is smaller still.
"""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import test_base_methods
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from roi_heads_factory import SIZE, add_model_masks, make_proposals, make_targets
from test_base_methods import AGNOSTIC, OURS, WITH_EXTERNAL_MASKS
from tiny_model import TINY_MODEL

from teacher_student_mask import add_teacher_student_mask_config

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_STEPS = 10

# An image of 64 x 64 as roi_heads_factory.make_targets takes it. Class 1 is unseen.
_TWO_BOXES = [[4, 4, 30, 30], [20, 20, 50, 56]]
IMAGES = {
    "normal": ([*_TWO_BOXES, [8, 10, 40, 30]], [0, 2, 1], [True, True, False]),
    "no seen object": (_TWO_BOXES, [1, 1], [False, False]),
    "no unseen object": ([*_TWO_BOXES, [8, 10, 40, 30]], [0, 2, 2], [True, True, True]),
    "no object": ([], [], []),
}


def _norm_of_both_heads(name: str, num_channels: int) -> list:
    heads = ("MODEL.ROI_MASK_HEAD", "MODEL.TEACHER_MASK_HEAD")
    opts = [[f"{x}.NORM", name, f"{x}.CONV_DIM", num_channels] for x in heads]
    return [*itertools.chain(*opts)]


EVERY_METHOD = {
    **test_base_methods.EVERY_METHOD,
    "oracle": [],
    "ours, crf": [*OURS, "MODEL.PSEUDO_MASK.METHOD", "crf"]
    + ["MODEL.PSEUDO_MASK.CRF.BACKEND", "torch"],
    "ours, 56x56 teacher": [*OURS, "MODEL.TEACHER_MASK_HEAD.NUM_DECONV", 2],
    "ours, few ROIs": [*OURS, "MODEL.PSEUDO_MASK.MAX_ROIS_PER_IMAGE", 1],
    # The gate opens in the middle of the run.
    "ours, warm-up": [*OURS, "MODEL.PSEUDO_MASK.WARMUP_ITERS", NUM_STEPS // 2],
    "ours, pictures": [*OURS, "VIS_PERIOD", NUM_STEPS // 2],
    # 32 groups need 32 channels.
    "ours, GN": [*OURS, *_norm_of_both_heads("GN", 32)],
    "ours, naiveSyncBN_N": [*OURS, *_norm_of_both_heads("naiveSyncBN_N", 8)],
    "baseline, naiveSyncBN_N": [*AGNOSTIC, *_norm_of_both_heads("naiveSyncBN_N", 8)],
}


def schedule() -> list[tuple[str, str]]:
    """
    Which image of ``IMAGES`` each of 2 ranks gets in each of the ``NUM_STEPS`` steps.

    Each of the 10 unordered pairs once; every second pair is reversed, so that each rank meets each
    kind.
    """
    pairs = itertools.combinations_with_replacement(IMAGES, 2)
    return [pair[::-1] if i % 2 else pair for i, pair in enumerate(pairs)]


@BACKBONE_REGISTRY.register()
class FourConvolutions(Backbone):
    """
    Levels p2 to p5 of a pyramid in a hundredth of the time that the smallest ResNet takes.

    Without batch statistics, so that gradients of one process and of several can be compared.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        sizes = [(input_shape.channels, 4), (16, 2), (16, 2), (16, 2)]
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(c, 16, s, s) for c, s in sizes)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for level, layer in enumerate(self.layers, start=2):
            x = features[f"p{level}"] = layer(x).relu()
        return features

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"p{level}": ShapeSpec(channels=16, stride=2**level) for level in range(2, 6)}


def make_cfg(opts=()) -> CfgNode:
    """
    A config of the tiny model, with a loss on each level of the feature pyramid.

    configs/shapes has none on the last one, the parameters of which DDP would wait for.
    """
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / "configs/Base-Shapes.yaml"))
    cfg.merge_from_list(
        [*TINY_MODEL, "MODEL.BACKBONE.NAME", "FourConvolutions", "MODEL.ROI_HEADS.NUM_CLASSES", 3]
        + ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5"]]
        + ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [24], [36], [54]]]
        + ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
        + ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.PSEUDO_MASK.WARMUP_ITERS", 0, *opts]
    )
    return cfg


def make_input(kind: str, seed: int = 0, with_external: bool = False) -> dict:
    """
    One image as the mapper gives it, and proposals for a model without an RPN.

    ``with_external``: the first object without a mask, if there is one, has a model's.
    """
    targets = make_targets(*IMAGES[kind])
    if with_external:
        _add_model_mask(targets)
    (rois,) = make_proposals([targets])
    proposals = Instances((SIZE, SIZE))
    background = torch.tensor([[40.0, 2, 62, 20], [0, 40, 18, 62], [52, 44, 63, 63]])
    proposals.proposal_boxes = Boxes(torch.cat([rois.proposal_boxes.tensor, background]))
    proposals.objectness_logits = torch.zeros(len(proposals.proposal_boxes))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=generator).to(torch.uint8)
    return {
        "image": image,
        "instances": targets,
        "proposals": proposals,
        "height": SIZE,
        "width": SIZE,
        "file_name": kind,
    }


def _add_model_mask(targets: Instances) -> None:
    rows = (~targets.gt_has_mask).nonzero()[:1, 0].tolist()
    add_model_masks([targets], {0: rows})


def train(
    cfg: CfgNode, batches: Iterator[list[dict]] | None = None, with_external: bool = False
) -> dict:
    """
    Train over :func:`schedule`, or over other batches, with Detectron2's trainer and DDP.

    ``with_external`` is that of :func:`make_input`. Detectron2 leaves ``find_unused_parameters``
    False: DDP stops at the next step where a parameter of a rank had no gradient.

    Returns:
        "losses": those of each step on this rank; "state": the weights and buffers at the end.
    """
    rank = comm.get_rank()
    torch.manual_seed(rank)  # DDP makes the weights those of rank 0
    model = build_model(cfg)
    losses = []
    model.register_forward_hook(
        lambda module, args, output: losses.append({k: float(v) for k, v in output.items()})
    )
    if batches is None:
        kinds = [x[rank] for x in schedule()]
        batches = iter([[make_input(x, i, with_external)] for i, x in enumerate(kinds)])
    # On the CPU DDP wants no device.
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    SimpleTrainer(ddp, batches, optimizer).train(0, NUM_STEPS)
    return {"losses": losses, "state": model.state_dict()}


def train_method(name: str) -> dict:
    """:func:`train` with a method of ``EVERY_METHOD``."""
    return train(make_cfg(EVERY_METHOD[name]), with_external=name in WITH_EXTERNAL_MASKS)


def train_and_fail(folder: str, failure: str) -> None:
    """Train "ours"; in step 3 rank 1 fails. A rank that gets to the end leaves a file."""
    torch.set_num_threads(1)
    opts = list(OURS)
    if failure != "kill":
        opts += _norm_of_both_heads("naiveSyncBN", 8)
    train(make_cfg(opts), _failing_batches(failure if comm.get_rank() == 1 else None, folder))
    (Path(folder) / f"finished {comm.get_rank()}").touch()


def _failing_batches(failure: str | None, folder: str) -> Iterator[list[dict]]:
    for i in range(NUM_STEPS):
        if i < 3 or failure is None:
            yield [make_input("normal", seed=i)]
            continue
        (Path(folder) / f"failed {comm.get_rank()}").touch()
        if failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        yield [make_input("no object", seed=i)]
