"""Mask^X R-CNN: mask weights of a class predicted from its box weights."""

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY
from torch import nn
from torch.nn import functional as F

from .mask_heads import MaskRCNNConvMultiUpsampleHead

__all__ = ["WeightTransferMaskHead"]


@ROI_MASK_HEAD_REGISTRY.register()
class WeightTransferMaskHead(MaskRCNNConvMultiUpsampleHead):
    """
    Detectron2's mask head, the weights of whose last layer are a function of the box predictor's.

    With e_c the weights of class c in the box predictor, its row for the score and its four for the
    box, the mask logits are

        z[n, c] = w_c . f_n + z_mlp[n],    w_c = A2 LeakyReLU(A1 e_c + b1) + b2,

    where f_n are the features of ROI n after the last deconvolution. No bias per class, and z_mlp,
    from a fully connected layer on all of f_n, only with ``mlp_branch``. Each class has a mask as
    soon as it has boxes, also one without a single training mask. No gradient of the masks reaches
    e_c: they do not change the box predictor.

    Whoever builds the head calls :meth:`use_box_predictor` once, before the optimizer is made.
    """

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, num_classes: int, mlp_branch: bool = False, **kwargs
    ):
        """
        As :class:`MaskRCNNConvMultiUpsampleHead`, for the C classes of the box predictor;
        ``mlp_branch``: ``MODEL.ROI_MASK_HEAD.MLP_BRANCH`` of config.py.
        """
        super().__init__(input_shape, num_classes=1, **kwargs)
        # The predictor of the parent has one set of weights per class; here they are predicted.
        self.num_channels = self.predictor.in_channels
        del self.predictor
        self.num_classes = num_classes
        self._trunk = tuple(name for name, _ in self.named_children())
        self._box_predictor: tuple[nn.Module, ...] = ()
        self.mlp = None
        if mlp_branch:
            num_cells = (input_shape.height * 2 ** kwargs.get("num_deconv", 1)) ** 2
            self.mlp = nn.Linear(self.num_channels * num_cells, num_cells)
            nn.init.normal_(self.mlp.weight, std=0.001)
            nn.init.zeros_(self.mlp.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        if cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
            raise ValueError(
                "WeightTransferMaskHead predicts the mask weights of each class: set "
                "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK to False. It cannot be a teacher."
            )
        return super().from_config(cfg, input_shape) | {
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "mlp_branch": cfg.MODEL.ROI_MASK_HEAD.MLP_BRANCH,
        }

    def use_box_predictor(self, box_predictor: nn.Module) -> None:
        """
        Take the box weights of ``box_predictor`` from now on, and make the layers A1 and A2.

        It has linear layers ``cls_score``, C + 1 rows, and ``bbox_pred``, 4 C rows by class; else
        ValueError. The head does not register it: its parameters are in a state_dict once.
        """
        num_inputs = box_predictor.cls_score.in_features
        if len(box_predictor.bbox_pred.weight) != 4 * self.num_classes:
            raise ValueError(
                "WeightTransferMaskHead needs box weights of each class: set "
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG to False."
            )
        # In a tuple a module is not a submodule. A copy of both has this refer to the copy.
        self._box_predictor = (box_predictor,)
        hidden = self.num_channels
        self.transfer = nn.Sequential(
            nn.Linear(5 * num_inputs, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden)
        )
        for layer in (self.transfer[0], self.transfer[2]):
            weight_init.c2_msra_fill(layer)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (R, C, M, M), of ROI features, (R, D_in, S, S)."""
        for name in self._trunk:
            x = getattr(self, name)(x)
        (box_predictor,) = self._box_predictor
        scores = box_predictor.cls_score.weight.detach()[: self.num_classes]  # without background
        deltas = box_predictor.bbox_pred.weight.detach().reshape(self.num_classes, -1)
        weights = self.transfer(torch.cat([scores, deltas], dim=1)).to(x.dtype)
        logits = F.conv2d(x, weights[:, :, None, None])
        if self.mlp is None:
            return logits
        return logits + self.mlp(x.flatten(1)).view(-1, 1, *x.shape[2:])
