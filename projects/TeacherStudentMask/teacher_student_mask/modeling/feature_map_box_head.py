"""Box heads that keep their feature maps, and the predictor that pools them and hands one on."""

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
from torch import nn

__all__ = ["FeatureMapBoxHead", "PooledFastRCNNOutputLayers", "TwoBranchBoxHead"]


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

    def class_maps(self, x: torch.Tensor) -> torch.Tensor:
        """What the class scores are pooled from, (R, C, h, w): here the output."""
        return self(x)


@ROI_BOX_HEAD_REGISTRY.register()
class TwoBranchBoxHead(nn.Module):
    """
    ContrastMask's box head: shared 3x3 convolutions, then one for the classes and two for the box.

    The last of the widths is that of both branches, too. The output is two maps, each of shape
    (R, C, h, w) and >= 0: that of the classes, from which class activation maps are made, and that
    of the box.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_widths: Sequence[int], conv_norm: str = ""):
        """
        Args:
            input_shape: of the ROI features.
            conv_widths: output channels of the shared convolutions, one each; 256 four times is
                ContrastMask's.
            conv_norm: as for :class:`FeatureMapBoxHead`, of all convolutions; ContrastMask has "".

        Raises:
            ValueError: no width, or one below 1.
        """
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
        """What each of the predictor's linear layers sees, after pooling over h and w."""
        return self.class_branch.output_shape

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: ROI features, shape (R, D, h, w).

        Returns:
            The map of the classes and that of the box, each of shape (R, C, h, w).
        """
        shared = self.shared(x)
        return self.class_branch(shared), self.box_branch(shared)

    def class_maps(self, x: torch.Tensor) -> torch.Tensor:
        """The first of the two maps, for which the box branch need not run."""
        return self.class_branch(self.shared(x))


class PooledFastRCNNOutputLayers(FastRCNNOutputLayers):
    """
    Detectron2's box predictor on a feature map, Eq. (8) of the paper: GAP(F) W + b.

    Its predictions are (scores, deltas, maps), with the maps that the scores are pooled from; after
    :class:`TwoBranchBoxHead` deltas come from others. Maps reach the mask branch as the field
    ``box_features``, shape (R_i, C, h, w), of each image's instances: :meth:`losses` sets it on the
    proposals, :meth:`inference` on the detections. Parameters are named as the parent's.
    """

    def forward(
        self, maps: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            maps: shape (R, C, h, w), the output of :class:`FeatureMapBoxHead`, or two such maps,
                that of :class:`TwoBranchBoxHead`.

        Returns:
            scores, shape (R, K + 1), logits of K classes and background; deltas, shape (R, 4 K) or
            (R, 4); ``maps`` itself, or the first of the two. Gradient flows through all three.

        Raises:
            ValueError: ``maps`` has not four dimensions.
        """
        all_maps = maps if isinstance(maps, tuple) else (maps,)
        for x in all_maps:
            if x.dim() != 4:
                raise ValueError(
                    f"The box head's output has shape {tuple(x.shape)}, expected (R, C, h, w): "
                    'set MODEL.ROI_BOX_HEAD.NAME to "FeatureMapBoxHead" or "TwoBranchBoxHead".'
                )
        pooled = [x.mean(dim=(2, 3)) for x in all_maps]
        return self.cls_score(pooled[0]), self.bbox_pred(pooled[-1]), all_maps[0]

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
