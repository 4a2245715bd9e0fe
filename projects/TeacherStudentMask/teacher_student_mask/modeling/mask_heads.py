"""The teacher's mask head, and mask heads with a finer output grid."""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ConvTranspose2d, ShapeSpec
from detectron2.modeling.roi_heads.mask_head import (
    ROI_MASK_HEAD_REGISTRY,
    BaseMaskRCNNHead,
    MaskRCNNConvUpsampleHead,
)
from torch import nn

__all__ = [
    "MaskRCNNConvMultiUpsampleHead",
    "build_teacher_mask_head",
    "has_batch_norm",
    "init_predictor",
    "mask_features_shape",
    "predict_for_teaching",
    "predict_label_channel",
    "select_label_channel",
]


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvMultiUpsampleHead(MaskRCNNConvUpsampleHead):
    """
    Detectron2's mask head with one or more 2x deconvolutions: 14 -> 28 -> 56 for two.

    With one deconvolution it has the parameters of :class:`MaskRCNNConvUpsampleHead`, by name too.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_deconv: int = 1, **kwargs):
        """``num_deconv`` 2x deconvolutions; the rest as in :class:`MaskRCNNConvUpsampleHead`."""
        super().__init__(input_shape, **kwargs)
        # The head is an nn.Sequential: what runs before the predictor must stand before it.
        predictor = self.predictor
        del self.predictor
        channels = predictor.in_channels
        for k in range(2, num_deconv + 1):
            deconv = ConvTranspose2d(channels, channels, kernel_size=2, stride=2, padding=0)
            weight_init.c2_msra_fill(deconv)
            self.add_module(f"deconv{k}", deconv)
            self.add_module(f"deconv{k}_relu", nn.ReLU())
        self.add_module("predictor", predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        ret = super().from_config(cfg, input_shape)
        return ret | {"num_deconv": cfg.MODEL.ROI_MASK_HEAD.NUM_DECONV}


def build_teacher_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> BaseMaskRCNNHead:
    """
    Build the class-agnostic teacher F_t of Eq. (2) from the mask-head registry.

    Registered heads read ``cfg.MODEL.ROI_MASK_HEAD``; the teacher's sees there the values of
    ``cfg.MODEL.TEACHER_MASK_HEAD``, so any registered head can teach. Its ``layers`` give logits of
    shape (R, 1, M, M).
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_MASK_HEAD.update(cfg.MODEL.TEACHER_MASK_HEAD)
    cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK = True
    head = ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.TEACHER_MASK_HEAD.NAME)(cfg, input_shape)
    head.loss_weight = cfg.MODEL.TEACHER_MASK_HEAD.LOSS_WEIGHT
    init_predictor(head, cfg)
    return head


def init_predictor(head: BaseMaskRCNNHead, cfg: CfgNode) -> None:
    """Give a head's last layer the initial weights of ``MODEL.ROI_MASK_HEAD.PREDICTOR_INIT``."""
    is_kaiming = cfg.MODEL.ROI_MASK_HEAD.PREDICTOR_INIT == "kaiming"
    if is_kaiming and hasattr(head, "predictor"):  # Mask^X R-CNN's predicts that layer
        weight_init.c2_msra_fill(head.predictor)


def mask_features_shape(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], prior: nn.Module | None = None
) -> ShapeSpec:
    """Of the pooled features that mask heads see, as the prior, if any, returns them."""
    side = cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    channels = getattr(prior, "out_channels", channels)
    return ShapeSpec(channels=channels, height=side, width=side)


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what a module computes for a ROI depends on the others of the batch."""
    # nn.SyncBatchNorm is not a BatchNorm2d.
    return any(isinstance(x, (nn.BatchNorm2d, nn.SyncBatchNorm)) for x in module.modules())


def predict_for_teaching(
    head: BaseMaskRCNNHead, features: torch.Tensor, learns: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Logits (R, M, M) of a class-agnostic head, of features (R, D, S, S).

    Those of ROIs that do not train it, ``learns`` False, have no gradient where they need none.
    """
    # With batch statistics all ROIs belong into one batch.
    if learns is None or has_batch_norm(head):
        return head.layers(features)[:, 0]
    rows, others = (x.nonzero().squeeze(1) for x in (learns, ~learns))
    # Attached to the head without any row, too: every rank needs gradients.
    logits = head.layers(features[rows])[:, 0]
    if len(others) > 0:
        with torch.no_grad():
            more = head.layers(features[others])[:, 0]
        logits = torch.cat([logits, more])[torch.cat([rows, others]).argsort()]
    return logits


def predict_label_channel(
    head: BaseMaskRCNNHead, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    :func:`select_label_channel` of a mask head's output, logits (R, M, M), up to rounding.

    Of the last 1x1 convolution of Detectron2's heads the other channels are not computed.

    Args:
        head: its ``layers`` return logits of shape (R, C, M, M), or (R, 1, M, M).
        features: shape (R, D, S, S).
        labels: shape (R,), int64, the class of each ROI in [0, C).
    """
    is_plain = type(head) in (MaskRCNNConvUpsampleHead, MaskRCNNConvMultiUpsampleHead)
    # A traced graph stays Detectron2's.
    if not is_plain or head.predictor.out_channels == 1 or torch.jit.is_tracing():
        return select_label_channel(head.layers(features), labels)
    *layers, predictor = head
    for layer in layers:
        features = layer(features)
    weight = predictor.weight[labels].flatten(1)[:, None]
    logits = torch.baddbmm(predictor.bias[labels][:, None, None], weight, features.flatten(2))
    return logits.view(-1, *features.shape[2:])


def select_label_channel(pred_mask_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Take from each ROI's prediction the channel of its class, shape (R, M, M).

    Args:
        pred_mask_logits: shape (R, C, M, M), or (R, 1, M, M) if class-agnostic; logits.
        labels: shape (R,), int64, the class of each ROI in [0, C).
    """
    if pred_mask_logits.shape[1] == 1:
        return pred_mask_logits[:, 0]
    # 0, 1, 2, ...: in a traced graph, unlike arange, of as many ROIs as there are then.
    rows = torch.ones_like(labels).cumsum(0) - 1
    return pred_mask_logits[rows, labels]
