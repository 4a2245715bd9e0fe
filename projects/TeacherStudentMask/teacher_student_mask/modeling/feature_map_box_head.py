"""A box head that keeps its feature map, and the predictor that pools the map and hands it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
)
from detectron2.structures import Instances

__all__ = ["FeatureMapBoxHead", "PooledFastRCNNOutputLayers"]


@ROI_BOX_HEAD_REGISTRY.register()
class FeatureMapBoxHead(FastRCNNConvFCHead):
    """
    OPMask's box head: 3x3 convolutions only; the output is the map F of Eq. (8), not flattened.

    ROI features (R, D, h, w) become (R, C, h, w), with C the last of the widths and values >= 0.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_widths: Sequence[int], conv_norm: str = ""):
        """
        Args:
            input_shape: of the ROI features.
            conv_widths: output channels of the convolutions, one each. OPMask's own code has
                512, 1024, 1024, 1024; 256 five times is the 256-channel F of the paper.
            conv_norm: "" or any norm of :func:`detectron2.layers.get_norm`, between each
                convolution, which then has no bias, and its ReLU.

        Raises:
            ValueError: no width, or one below 1.
        """
        if not conv_widths or min(conv_widths) < 1:
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.CONV_WIDTHS is {list(conv_widths)}; FeatureMapBoxHead needs "
                "the output channels of one convolution or more, each at least 1."
            )
        super().__init__(input_shape, conv_dims=list(conv_widths), fc_dims=[], conv_norm=conv_norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {
            "input_shape": input_shape,
            "conv_widths": cfg.MODEL.ROI_BOX_HEAD.CONV_WIDTHS,
            "conv_norm": cfg.MODEL.ROI_BOX_HEAD.NORM,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """What the predictor's linear layers see: the channels, after pooling over h and w."""
        return ShapeSpec(channels=super().output_shape.channels)


class PooledFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Detectron2's box predictor on a feature map, Eq. (8) of the paper: GAP(F) W + b.

    Its predictions are (scores, deltas, maps). Maps reach the mask branch as the field
    ``box_features``, shape (R_i, C, h, w), of each image's instances: :meth:`losses` sets it on the
    proposals, :meth:`inference` on the detections. Parameters are named as the parent's.
    """

    def forward(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            maps: shape (R, C, h, w), the output of :class:`FeatureMapBoxHead`.

        Returns:
            scores, shape (R, K + 1), logits of K classes and background; deltas, shape (R, 4 K) or
            (R, 4); ``maps`` itself. Gradient flows through all three.

        Raises:
            ValueError: ``maps`` has not four dimensions.
        """
        if maps.dim() != 4:
            raise ValueError(
                f"The box head's output has shape {tuple(maps.shape)}, expected (R, C, h, w): "
                'set MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead".'
            )
        scores, deltas = super().forward(maps.mean(dim=(2, 3)))
        return scores, deltas, maps

    def losses(
        self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """
        As the parent's; also sets ``box_features`` on ``proposals``, a row each, with gradient.
        """
        *predictions, maps = predictions
        for x, rows in zip(proposals, maps.split([len(x) for x in proposals])):
            x.box_features = rows
        return super().losses(predictions, proposals)

    def inference(
        self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]
    ) -> tuple[list[Instances], list[torch.Tensor]]:
        """
        As the parent's; each detection also has ``box_features``, those of the proposal it is from.

        Returns:
            The detections of each image, and for each the row of its proposal in
            [0, R_i). The parent counts these without the rows whose box or score is not finite;
            here they index ``proposals`` in any case.
        """
        *predictions, maps = predictions
        detections, kept = super().inference(predictions, proposals)
        boxes = self.predict_boxes(predictions, proposals)
        probs = self.predict_probs(predictions, proposals)
        maps = maps.split([len(x) for x in proposals])
        for i, x in enumerate(detections):
            is_finite = boxes[i].isfinite().all(dim=1) & probs[i].isfinite().all(dim=1)
            kept[i] = is_finite.nonzero()[:, 0][kept[i]]
            x.box_features = maps[i][kept[i]]
        return detections, kept

    # The parent unpacks two predictions, and its inference() hands over two.

    def predict_boxes(self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]):
        """As the parent's, for predictions with or without the maps."""
        return super().predict_boxes(predictions[:2], proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]
    ):
        """As the parent's, for predictions with or without the maps."""
        return super().predict_boxes_for_gt_classes(predictions[:2], proposals)

    def predict_probs(self, predictions: tuple[torch.Tensor, ...], proposals: list[Instances]):
        """As the parent's, for predictions with or without the maps."""
        return super().predict_probs(predictions[:2], proposals)
