"""FCOS (Tian et al., ICCV 2019): the head, its losses, and what it detects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, batched_nms, get_norm
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss
from torch import nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ..mask_targets import at_least_float32
from .targets import Grid, box_distances, centreness_of

__all__ = ["FCOS", "FCOSOutput"]

# Of the focal loss, and the probability of every class at the start.
_ALPHA, _GAMMA, _PRIOR = 0.25, 2.0, 0.01
# Candidates of a level that non-maximum suppression sees.
_PRE_NMS_TOPK = 1000


@dataclass(frozen=True)
class FCOSOutput:
    """
    What the head says of the L locations of a batch of N images.

    Attributes:
        grid: the locations.
        logits: shape (N, L, C), of the classes.
        distances: shape (N, L, 4), at least 0, from the location to left, top, right and lower
            side of the box, in strides of its level.
        centreness: shape (N, L), logits.
        towers: of each level, the features that boxes are predicted from, shape (N, D, H, W).
    """

    grid: Grid
    logits: torch.Tensor
    distances: torch.Tensor
    centreness: torch.Tensor
    towers: list[torch.Tensor]


class FCOS(nn.Module):
    """
    One detector at each location of a feature pyramid, with weights that all levels share.

    Centreness and whatever reads the towers, such as CondInst's controller, stand on the tower of
    the boxes.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        in_features: Sequence[str],
        strides: Sequence[int],
        num_classes: int,
        sizes: Sequence[float],
        centre_radius: float = 1.5,
        num_conv: int = 4,
        norm: str = "GN",
        test_score_thresh: float = 0.05,
        test_nms_thresh: float = 0.6,
        test_topk_per_image: int = 100,
    ):
        """
        Args:
            in_channels: D, of all levels, and of all convolutions.
            in_features, strides: names of the levels, fine to coarse, and their strides in pixels.
            num_classes: C.
            sizes, centre_radius: see :func:`assign_objects`.
            The others: the keys that :meth:`from_config` reads, of config.py and of Detectron2.

        Raises:
            ValueError: the number of ``sizes`` is not one fewer than that of levels, two or more.
        """
        super().__init__()
        if not sizes or len(sizes) != len(in_features) - 1:
            raise ValueError(
                f"MODEL.FCOS.SIZES has {len(sizes)} limits; {len(in_features)} levels "
                f"(MODEL.FCOS.IN_FEATURES; two at least) need {len(in_features) - 1}."
            )
        self.in_features, self.strides = tuple(in_features), tuple(strides)
        self.num_classes = num_classes
        self.sizes, self.centre_radius = tuple(sizes), centre_radius
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image

        def make_tower() -> nn.Sequential:
            layers = []
            for _ in range(num_conv):
                own_norm = get_norm(norm, in_channels)
                layers.append(Conv2d(in_channels, in_channels, 3, padding=1, norm=own_norm))
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        self.cls_tower, self.bbox_tower = make_tower(), make_tower()
        self.cls_logits = Conv2d(in_channels, num_classes, 3, padding=1)
        self.bbox_pred = Conv2d(in_channels, 4, 3, padding=1)
        self.ctrness = Conv2d(in_channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(in_features)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        names = cfg.MODEL.FCOS.IN_FEATURES
        return {
            "in_channels": input_shape[names[0]].channels,
            "in_features": names,
            "strides": [input_shape[name].stride for name in names],
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "sizes": cfg.MODEL.FCOS.SIZES,
            "centre_radius": cfg.MODEL.FCOS.CENTRE_RADIUS,
            "num_conv": cfg.MODEL.FCOS.NUM_CONV,
            "norm": cfg.MODEL.FCOS.NORM,
            "test_score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "test_nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, features: dict[str, torch.Tensor]) -> FCOSOutput:
        """Run the head on the maps of ``in_features``, shape (N, D, H, W) each."""
        grid, towers = self.box_towers(features)
        outputs = []
        for level, (name, tower) in enumerate(zip(self.in_features, towers)):
            logits = self.cls_logits(self.cls_tower(features[name]))
            distances = F.relu(self.bbox_pred(tower) * self.scales[level])
            outputs.append([logits, distances, self.ctrness(tower)])
        logits, distances, centreness = (
            torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1) for maps in zip(*outputs)
        )
        return FCOSOutput(grid, logits, distances, centreness[:, :, 0], towers)

    def box_towers(self, features: dict[str, torch.Tensor]) -> tuple[Grid, list[torch.Tensor]]:
        """The grid, and ``towers`` of :class:`FCOSOutput`, which is all that given boxes need."""
        maps = [features[name] for name in self.in_features]
        grid = Grid.of([x.shape[-2:] for x in maps], self.strides, maps[0].device)
        return grid, [self.bbox_tower(x) for x in maps]

    def losses(
        self, output: FCOSOutput, objects: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        "loss_fcos_cls": focal loss over the number of positive locations; "loss_fcos_loc": 1 - GIoU
        weighted by centreness, over the sum of centreness; "loss_fcos_ctr": cross entropy of
        centreness over the number of positive locations. Both divisors are means over all ranks.

        Args:
            output: of N images with L locations.
            objects: int64, shape (N, L), -1 or the row of ``boxes`` that the location detects.
            boxes, classes: of the objects of the batch, shape (G, 4), XYXY in pixels, and (G,).
        """
        image, location = (objects >= 0).nonzero(as_tuple=True)
        rows = objects[image, location]
        stride = output.grid.stride_of_each[location, None]
        targets = box_distances(output.grid.points[location], boxes[rows]) / stride
        centreness = centreness_of(targets)
        num_positive = _mean_over_ranks(centreness.new_tensor(len(rows))).clamp(min=1)
        sum_centreness = _mean_over_ranks(centreness.sum()).clamp(min=1e-6)

        logits = at_least_float32(output.logits)
        class_targets = torch.zeros_like(logits)
        class_targets[image, location, classes[rows]] = 1
        loss_cls = sigmoid_focal_loss(logits, class_targets, _ALPHA, _GAMMA, "sum")
        # As boxes around the location.
        sign = targets.new_tensor([-1, -1, 1, 1])
        predicted = at_least_float32(output.distances[image, location])
        # Not fvcore's, which asserts on values that are not finite: FiniteLoss says more.
        loss_loc = generalized_box_iou_loss(predicted * sign, targets * sign) * centreness
        own = at_least_float32(output.centreness[image, location])
        loss_ctr = F.binary_cross_entropy_with_logits(own, centreness, reduction="sum")
        return {
            "loss_fcos_cls": loss_cls / num_positive,
            "loss_fcos_loc": loss_loc.sum() / sum_centreness,
            "loss_fcos_ctr": loss_ctr / num_positive,
        }

    @torch.no_grad()
    def scores(self, output: FCOSOutput) -> torch.Tensor:
        """Class probability times centreness, shape (N, L, C), in [0, 1]."""
        centreness = at_least_float32(output.centreness).sigmoid()
        return at_least_float32(output.logits).sigmoid() * centreness[:, :, None]

    def detect(self, output: FCOSOutput, image_sizes: Sequence[tuple[int, int]]) -> list[Instances]:
        """
        Find the objects of each image, the best first.

        Returns:
            ``pred_boxes``, XYXY in pixels, not clipped; ``scores``, the square root of
            :meth:`scores`; ``pred_classes``; and ``locations``, int64, indices into the grid.
        """
        grid, found = output.grid, []
        ends = (*grid.starts[1:], len(grid.points))
        sign = grid.points.new_tensor([-1, -1, 1, 1])
        for scores, distances, size in zip(self.scores(output), output.distances, image_sizes):
            candidates = []
            for start, end in zip(grid.starts, ends):
                of_level = scores[start:end].flatten()
                above = (of_level > self.test_score_thresh**2).nonzero()[:, 0]
                # Sorted, not topk(k): in a trace k would be a constant.
                order = of_level[above].argsort(descending=True)[:_PRE_NMS_TOPK]
                candidates.append(above[order] + start * self.num_classes)
            candidates = torch.cat(candidates)
            values = scores.flatten()[candidates]
            locations = torch.div(candidates, self.num_classes, rounding_mode="floor")
            classes = candidates % self.num_classes
            offsets = at_least_float32(distances[locations]) * grid.stride_of_each[locations, None]
            boxes = grid.points[locations].repeat(1, 2) + offsets * sign
            kept = batched_nms(boxes, values, classes, self.test_nms_thresh)
            kept = kept[: self.test_topk_per_image]
            own = Instances(size, pred_boxes=Boxes(boxes[kept]), scores=values[kept].sqrt())
            own.pred_classes, own.locations = classes[kept], locations[kept]
            found.append(own)
        return found

    def locate(self, grid: Grid, boxes: torch.Tensor) -> torch.Tensor:
        """The location for each given box, (R, 4): nearest its centre, on the level of its size."""
        limits = boxes.new_tensor(self.sizes)
        half = (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
        return grid.nearest((boxes[:, :2] + boxes[:, 2:]) / 2, (half[:, None] > limits).sum(1))


def _mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if comm.get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / comm.get_world_size()
