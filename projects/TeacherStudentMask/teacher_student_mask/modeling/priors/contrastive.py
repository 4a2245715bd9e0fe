"""ContrastMask's prior: features in which the pixels of objects of all classes are alike."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from ..mask_loss import crop_gt_masks
from ..training_rois import boxes_of, has_mask_of, rows_in_sampled
from .build import ROI_MASK_PRIOR_REGISTRY, KeptBoxFeatures, ROIContext
from .class_activation import normalize_per_roi, raw_cam_of
from .contrast_sets import PixelSets, sets_of_cams, sets_of_masks
from .contrastive_loss import contrastive_loss
from .layers import at_least_float32, build_own_pooler, conv1x1, conv_stack

__all__ = ["ContrastivePrior", "attend_by_cosine", "ramp"]


def attend_by_cosine(features: torch.Tensor) -> torch.Tensor:
    """
    Attention of a ROI's cells to one another by the cosine of their features.

    Y_i = sum_j softmax_j(cos(E_i, E_j)) E_j, without temperature, weights or residual.

    Args:
        features: shape (R, D, M, M); R may be 0.

    Returns:
        shape (R, D, M, M), each cell a mean of the ROI's cells.
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
    through it. The contrastive loss is of all sampled foreground ROIs, whichever of them, or of the
    ground-truth boxes, the mask heads are trained on. Objects without a mask take part in it by
    their class activation map, which is detached there.
    """

    needs_box_features = True

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
            num_conv: 3x3 convolutions of the encoder, at least 1.
            conv_dim: their channels, and those of the projector.
            norm: of the projector, any of :func:`detectron2.layers.get_norm`.
            loss_weight: of the contrastive loss, before :func:`ramp`.
            epoch_iters: iterations of an epoch, for :func:`ramp`; the trainer rescales it with
                the schedule.
            key_share: of the pixels of a set that are keys of the loss, in (0, 1].
            official_denominator: see :func:`nce`.
            stop_gradient: mask losses do not train the box head's convolutions through the map.

        Raises:
            ValueError: a number out of its range.
        """
        super().__init__()
        for name, value, is_allowed in (
            ("NUM_CONV", num_conv, num_conv >= 1),
            ("EPOCH_ITERS", epoch_iters, epoch_iters >= 1),
            ("KEY_SHARE", key_share, 0 < key_share <= 1),
        ):
            if not is_allowed:
                raise ValueError(
                    f"MODEL.ROI_MASK_PRIOR.CONTRAST.{name} is {value}; allowed: "
                    f"{'above 0, up to 1' if name == 'KEY_SHARE' else '1 or more'}."
                )
        self.pooler = pooler
        self.encoder = conv_stack([in_channels] + [conv_dim] * num_conv, relu_at_end=True)
        self.projector = nn.Sequential(
            _conv_norm_relu(conv_dim, norm), _conv_norm_relu(conv_dim, norm)
        )
        self.projector.append(conv1x1(conv_dim, conv_dim))
        self.fuse = conv1x1(conv_dim, out_channels)
        self.loss_weight = loss_weight
        self.epoch_iters = epoch_iters
        self.key_share = key_share
        self.official_denominator = official_denominator
        self.stop_gradient = stop_gradient

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, feature_shapes: dict[str, ShapeSpec]
    ) -> dict:
        settings = cfg.MODEL.ROI_MASK_PRIOR.CONTRAST
        sampling_ratio = cfg.MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO
        return {
            "in_channels": next(iter(feature_shapes.values())).channels,
            "out_channels": input_shape.channels,
            "pooler": build_own_pooler(
                cfg, feature_shapes, settings.POOLER_RESOLUTION, sampling_ratio
            ),
            "num_conv": settings.NUM_CONV,
            "conv_dim": settings.CONV_DIM,
            "norm": settings.NORM,
            "loss_weight": settings.LOSS_WEIGHT,
            "epoch_iters": settings.EPOCH_ITERS,
            "key_share": settings.KEY_SHARE,
            "official_denominator": settings.OFFICIAL_DENOMINATOR,
            "stop_gradient": cfg.MODEL.ROI_MASK_PRIOR.STOP_GRADIENT,
        }

    def forward(
        self, mask_features: torch.Tensor, context: ROIContext
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            mask_features: shape (R, D, S, S); not changed.
            context: its ``instances``, ``feature_maps`` and ``kept``, and in training ``sampled``.

        Returns:
            shape (R, D, S, S); in training mode ``loss_mask_contrast``, of the foreground of
            ``sampled``, with and without a mask, whichever of it the R rows are.

        Raises:
            ValueError: ``context.kept`` is None, or not of R rows; in training, ``context.sampled``
                is None.
        """
        if context.kept is None:
            raise ValueError(
                "ContrastivePrior needs the box head's feature maps of the ROIs: set "
                'MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead" or "TwoBranchBoxHead".'
            )
        cam = _cam_of(context.instances, context.kept)
        if not self.training:
            encoded = self._encode(context.instances, context.feature_maps)
            return self._enrich(mask_features, cam, encoded), {}
        foreground, kept = self._foreground_of(context)
        encoded = self._encode(foreground, context.feature_maps)
        loss = self._contrast(foreground, _cam_of(foreground, kept), encoded)
        # ROIs with one box have one encoding, but each the map of its own class.
        rows = rows_in_sampled(context.instances, foreground)
        if rows is None:
            encoded = self._encode(context.instances, context.feature_maps)
        else:
            encoded = encoded[rows]
        return self._enrich(mask_features, cam, encoded), {"loss_mask_contrast": loss}

    @staticmethod
    def _foreground_of(context: ROIContext) -> tuple[list[Instances], KeptBoxFeatures]:
        if context.sampled is None:
            raise ValueError(
                "ContrastivePrior learns from all sampled foreground ROIs, not only from those of "
                "the mask heads: in training give ROIContext.sampled."
            )
        classifier = context.kept.classifier
        # Its last row is background's.
        foreground, _ = select_foreground_proposals(context.sampled, classifier.out_features - 1)
        maps = torch.cat([x.box_features for x in foreground])
        return foreground, KeptBoxFeatures(maps, classifier)

    def _encode(self, rois: list[Instances], feature_maps: list[torch.Tensor]) -> torch.Tensor:
        # Shape (R, C, M, M), without gradient to the backbone.
        maps = [x.detach() for x in feature_maps]
        return self.encoder(self.pooler(maps, [boxes_of(x) for x in rois]))

    def _enrich(
        self, mask_features: torch.Tensor, cam: torch.Tensor, encoded: torch.Tensor
    ) -> torch.Tensor:
        # All three of the same R ROIs.
        side = mask_features.shape[-1]
        cam = normalize_per_roi(_resize(cam, side))
        if self.stop_gradient:
            cam = cam.detach()
        attended = self.fuse(_resize(attend_by_cosine(encoded), side))
        return mask_features + (attended + cam).to(mask_features.dtype)

    def _contrast(
        self, rois: list[Instances], cam: torch.Tensor, encoded: torch.Tensor
    ) -> torch.Tensor:
        # The weighted loss of these ROIs; the class activation map decides, but does not learn.
        fine_cam = normalize_per_roi(_resize(cam.detach(), encoded.shape[-1]))[:, 0]
        loss = contrastive_loss(
            self.projector(encoded),
            self._sets_of(rois, fine_cam),
            self.key_share,
            self.official_denominator,
        )
        return loss * self.loss_weight * ramp(get_event_storage().iter, self.epoch_iters)

    @staticmethod
    @torch.no_grad()
    def _sets_of(rois: list[Instances], cam: torch.Tensor) -> PixelSets:
        # By the mask where there is one, by the map (R, M, M) where there is none.
        has_mask = torch.cat([has_mask_of(x) for x in rois])
        masks = crop_gt_masks(rois, cam.shape[-1], cam.device) > 0.5
        return sets_of_masks(masks).where(has_mask, sets_of_cams(cam))


def _cam_of(rois: list[Instances], kept: KeptBoxFeatures) -> torch.Tensor:
    # Shape (R, 1, h, w), logits with gradient to the box head.
    return at_least_float32(raw_cam_of(rois, kept))


def _resize(x: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def _conv_norm_relu(channels: int, norm: str) -> Conv2d:
    conv = Conv2d(
        channels,
        channels,
        kernel_size=1,
        bias=not norm,
        norm=get_norm(norm, channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv
