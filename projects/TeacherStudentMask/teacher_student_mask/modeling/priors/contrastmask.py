"""ContrastMask: features in which the pixels of objects of all classes are alike."""

from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, select_foreground_proposals
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from ..mask_targets import (
    at_least_float32,
    boxes_of,
    classes_of,
    crop_gt_masks,
    find_rois,
    has_mask_of,
)
from . import ROI_MASK_PRIOR_REGISTRY, ROIContext, arguments_of, build_own_pooler, conv_stack
from .opmask import FeatureMapBoxHead, class_activation_maps, normalize_per_roi

__all__ = [
    "ContrastivePrior",
    "TwoBranchBoxHead",
    "attend_by_cosine",
    "contrastive_loss",
    "ramp",
    "sample_pixels",
    "sets_of_cams",
    "sets_of_masks",
]

# Below this length a vector counts as shorter than 1, so that no gradient is larger than 1e4.
_EPS = 1e-4
# A ROI with fewer pixels in one of its four sets takes no part.
_MIN_PIXELS = 5
_EASY_TEMPERATURE, _HARD_TEMPERATURE = 0.3, 0.7


@ROI_BOX_HEAD_REGISTRY.register()
class TwoBranchBoxHead(nn.Module):
    """
    ContrastMask's box head: shared 3x3 convolutions, then one for the classes and two for the box.

    The last of the widths is that of both branches, too. Of the two maps in the output, each >= 0,
    class activation maps are made from that of the classes.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_widths: Sequence[int], conv_norm: str = ""):
        """As :class:`FeatureMapBoxHead`; ``conv_widths`` are of the shared convolutions."""
        super().__init__()
        self.shared = FeatureMapBoxHead(input_shape, conv_widths=conv_widths, conv_norm=conv_norm)
        width = conv_widths[-1]
        shape = ShapeSpec(channels=width, height=input_shape.height, width=input_shape.width)
        self.class_branch = FeatureMapBoxHead(shape, conv_widths=[width], conv_norm=conv_norm)
        self.box_branch = FeatureMapBoxHead(shape, conv_widths=[width] * 2, conv_norm=conv_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return FeatureMapBoxHead.from_config(cfg, input_shape)

    @property
    def output_shape(self) -> ShapeSpec:
        """As that of :class:`FeatureMapBoxHead`."""
        return self.class_branch.output_shape

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ROI features (R, D, h, w) the maps of classes and of box, (R, C, h, w) each."""
        shared = self.shared(x)
        return self.class_branch(shared), self.box_branch(shared)


def sets_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """
    The sets of pixels of objects with a mask, bool, shape (R, M, M).

    Returns bool, shape (6, R, M, M): easy and hard positives, keys inside the object; easy and hard
    negatives, keys outside; inside and outside, whose means are the ROI's queries. A pixel belongs
    to the edge if a central difference of the mask is not zero there, which makes the edge two
    pixels wide. Hard keys are the pixels next to the edge, diagonally, too, but not on it; easy
    positives all others of the mask, those of its edge among them; easy negatives all others
    outside but those of the edge.
    """
    # At the border the pixel itself stands for the neighbour that it lacks.
    padded = F.pad(masks.float()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    edge = padded[:, :-2, 1:-1] != padded[:, 2:, 1:-1]
    edge = edge | (padded[:, 1:-1, :-2] != padded[:, 1:-1, 2:])
    # All pixels within a distance below 2 of the edge.
    near = F.max_pool2d(edge.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    hard = near & ~edge
    positives, negatives = (masks & ~hard, masks & hard), (~masks & ~near, ~masks & hard)
    return torch.stack([*positives, *negatives, masks, ~masks])


def sets_of_cams(cams: torch.Tensor, high: float = 0.9, low: float = 0.1) -> torch.Tensor:
    """
    The sets of objects without a mask, as :func:`sets_of_masks` has them: where the class
    activation map, shape (R, M, M) in [0, 1], lies above ``high``, and where below ``low``.
    """
    positive, negative = cams > high, cams < low
    return torch.stack([positive, positive, negative, negative, positive, negative])


def sample_pixels(pixels: torch.Tensor, share: float) -> torch.Tensor:
    """A random choice of ceil(share * n) of the n pixels of each ROI; bool, shape (R, M, M)."""
    members = pixels.flatten(1)
    draws = torch.rand(members.shape, device=pixels.device).masked_fill(~members, 2.0)
    ranks = draws.argsort(dim=1).argsort(dim=1)
    counts = (members.sum(dim=1).double() * share).ceil()
    return (ranks < counts[:, None]).view_as(pixels)


def contrastive_loss(
    projections: torch.Tensor,
    sets: torch.Tensor,
    share: float = 0.3,
    official_denominator: bool = False,
) -> torch.Tensor:
    """
    ContrastMask's loss, without its weight and schedule.

    All ROIs of this process with enough pixels, of all classes, with and without a mask, share one
    query q for the inside and one for the outside of objects, the mean over them. The keys v are a
    random share of the pixels of each ROI's sets, and their similarity is cos(q, v - q). For easy
    and for hard keys and each query, with the similarities a of the keys that it should be like, b
    of those that it should not, and a temperature t, the loss is the

        mean over a of -log(exp(a / t) / (exp(a / t) + sum_b exp(b / t))).

    Args:
        projections: shape (R, D, M, M); R may be 0.
        sets: bool, shape (6, R, M, M), of :func:`sets_of_masks`.
        share: of the pixels of each set that are keys.
        official_denominator: a slip of ContrastMask's code: exp(a) for exp(a / t) in the
            denominator, which makes losses below 0 possible.

    Returns:
        A scalar; where no ROI has enough pixels 0, but attached to ``projections``.
    """
    kept = (sets[:4].flatten(2).sum(2) >= _MIN_PIXELS).all(dim=0)
    rows = kept.nonzero()[:, 0]
    if len(rows) == 0:
        return at_least_float32(projections[:0]).sum()
    # Temperatures and differences of like vectors are not for half precision.
    with torch.autocast(projections.device.type, enabled=False):
        inside, outside = (_mean(projections[rows], x[rows]) for x in sets[4:])
        keys = [sample_pixels(x, share).flatten(1) & kept[:, None] for x in sets[:4]]
        used_rois, used_pixels = torch.stack(keys).any(dim=0).nonzero().unbind(1)
        vectors = at_least_float32(projections.flatten(2)[used_rois, :, used_pixels])
        easy_in, hard_in, easy_out, hard_out = (x[used_rois, used_pixels] for x in keys)
        easy, hard = (easy_in, easy_out), (hard_in, hard_out)
        losses = []
        for query, order in ((inside, 1), (outside, -1)):
            direction = F.normalize(query, dim=0, eps=_EPS)
            similarity = F.normalize(vectors - query, dim=1, eps=_EPS) @ direction
            for pair, temperature in ((easy, _EASY_TEMPERATURE), (hard, _HARD_TEMPERATURE)):
                like, unlike = (similarity[x] for x in pair[::order])
                logits = like / temperature
                others = torch.logsumexp(unlike / temperature, dim=0)
                own = like if official_denominator else logits
                losses.append((torch.logaddexp(own, others) - logits).mean())
        return torch.stack(losses).sum()


def _mean(projections: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    # Mean over the ROIs of the mean over each one's pixels: (R, D, M, M), (R, M, M) -> (D,).
    projections = at_least_float32(projections)
    weights = pixels.to(projections.dtype).flatten(1)
    weights = weights / weights.sum(dim=1, keepdim=True) / len(weights)
    return torch.einsum("rdp,rp->d", projections.flatten(2), weights)


def attend_by_cosine(features: torch.Tensor) -> torch.Tensor:
    """
    Attention of a ROI's cells to one another by the cosine of their features, (R, D, M, M).

    Y_i = sum_j softmax_j(cos(E_i, E_j)) E_j, without temperature, weights or residual.
    """
    cells = features.flatten(2).transpose(1, 2)[:, None]
    directions = F.normalize(cells, dim=-1, eps=1e-4).to(cells.dtype)
    attended = F.scaled_dot_product_attention(directions, directions, cells, scale=1.0)
    return attended[:, 0].transpose(1, 2).reshape(features.shape)


def ramp(iteration: int, epoch_iters: int) -> float:
    """ContrastMask's factor of its loss: 0.25 in epochs 0 and 1, 0.5, 0.75, and 1 from epoch 4."""
    return min(1.0, max(0.25, iteration // epoch_iters / 4))


@ROI_MASK_PRIOR_REGISTRY.register()
class ContrastivePrior(nn.Module):
    """
    Adds to the mask features the class activation map of the ROI, and features of a head of its
    own, in which a contrastive loss makes pixels of objects alike, as ContrastMask.

    That head sees features pooled on a finer grid and detached: neither loss trains the backbone
    through it. The contrastive loss is of all sampled foreground ROIs, whichever ROIs the mask
    heads are trained on. Objects without a mask take part by their class activation map, detached.
    """

    needs_class_maps = True

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        pooler: ROIPooler,
        num_conv: int = 8,
        conv_dim: int = 256,
        norm: str = "BN",
        loss_weight: float = 0.1,
        epoch_iters: int = 7330,
        key_share: float = 0.3,
        official_denominator: bool = False,
        stop_gradient: bool = False,
    ):
        """
        Args:
            in_channels: of the backbone's feature maps.
            out_channels: of the mask features.
            pooler: of the backbone's feature maps, on a grid of M x M cells.
            stop_gradient: ``MODEL.ROI_MASK_PRIOR.STOP_GRADIENT`` of config.py.
            The others: ``MODEL.ROI_MASK_PRIOR.CONTRAST``, in lower case.
        """
        super().__init__()
        self.pooler = pooler
        self.encoder = conv_stack([in_channels] + [conv_dim] * num_conv, relu_at_end=True)
        layers = []
        for _ in range(2):
            normalize = get_norm(norm, conv_dim)
            conv = Conv2d(conv_dim, conv_dim, 1, bias=not norm, norm=normalize, activation=F.relu)
            weight_init.c2_msra_fill(conv)
            layers.append(conv)
        # Initial values as in the official code: torch's own of a linear layer, and Kaiming's.
        self.projector = nn.Sequential(*layers, Conv2d(conv_dim, conv_dim, 1))
        self.fuse = Conv2d(conv_dim, out_channels, 1)
        weight_init.c2_msra_fill(self.fuse)
        self.loss_weight = loss_weight
        self.epoch_iters = epoch_iters
        self.key_share = key_share
        self.official_denominator = official_denominator
        self.stop_gradient = stop_gradient

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
    ) -> dict:
        settings = arguments_of(cfg.MODEL.ROI_MASK_PRIOR.CONTRAST)
        side = settings.pop("pooler_resolution")
        ratio = cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO
        return {
            "in_channels": next(iter(feature_shapes.values())).channels,
            "out_channels": input_shape.channels,
            "pooler": build_own_pooler(cfg, feature_shapes, side, ratio),
            "stop_gradient": cfg.MODEL.ROI_MASK_PRIOR.STOP_GRADIENT,
            **settings,
        }

    def forward(
        self, mask_features: torch.Tensor, context: ROIContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        As ``ROI_MASK_PRIOR_REGISTRY`` says, with all fields of ``context``; the loss
        ``loss_mask_contrast`` is of the foreground of ``sampled``, with and without a mask.
        """
        rois, losses, rows = context.instances, {}, None
        side, classifier = mask_features.shape[-1], context.classifier
        if self.training and context.sampled is not None:
            # The classifier's last row is background's.
            num_classes = classifier.out_features - 1
            foreground, _ = select_foreground_proposals(context.sampled, num_classes)
            encoded = self._encode(foreground, context.feature_maps)
            losses["loss_mask_contrast"] = self._contrast(foreground, encoded, classifier, side)
            rows = find_rois(rois, foreground)
        if rows is None:
            encoded = self._encode(rois, context.feature_maps)
        else:
            encoded = encoded[rows]
        # ROIs with one box have one encoding, but each the map of its own class.
        cam = normalize_per_roi(_activation_maps(rois, context.class_maps, classifier, side))
        if self.stop_gradient:
            cam = cam.detach()
        attended = self.fuse(_resize(attend_by_cosine(encoded), side))
        return mask_features + (attended + cam).to(mask_features.dtype), losses

    def _encode(self, rois: list[Instances], feature_maps: list[torch.Tensor]) -> torch.Tensor:
        # Shape (R, C, M, M), without gradient to the backbone.
        maps = [x.detach() for x in feature_maps]
        return self.encoder(self.pooler(maps, [boxes_of(x) for x in rois]))

    def _contrast(
        self, rois: list[Instances], encoded: torch.Tensor, classifier: nn.Linear, cam_side: int
    ) -> torch.Tensor:
        # The sets are by the mask where there is one, else by the map, which does not learn.
        side, has_mask = encoded.shape[-1], torch.cat([has_mask_of(x) for x in rois])
        masks = crop_gt_masks(rois, side, encoded.device) > 0.5
        maps = torch.cat([x.box_features for x in rois]).detach()
        cam = _activation_maps(rois, maps, classifier, cam_side)
        cam = normalize_per_roi(_resize(cam, side))
        without_mask = sets_of_cams(cam[:, 0])
        sets = torch.where(has_mask[:, None, None], sets_of_masks(masks), without_mask)
        projections = self.projector(encoded)
        loss = contrastive_loss(projections, sets, self.key_share, self.official_denominator)
        return loss * self.loss_weight * ramp(get_event_storage().iter, self.epoch_iters)


def _activation_maps(
    rois: list[Instances], maps: torch.Tensor, classifier: nn.Linear, side: int
) -> torch.Tensor:
    # Logits with gradient to the box head, but not to its classifier, (R, 1, side, side): the grid
    # of the mask features, from which the official code goes on to the finer one.
    cam = class_activation_maps(maps, classifier.weight.detach(), classes_of(rois))
    return _resize(at_least_float32(cam), side)


def _resize(x: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear")
