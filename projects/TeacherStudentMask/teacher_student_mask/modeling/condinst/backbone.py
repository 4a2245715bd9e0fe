"""Feature pyramids for FCOS: two levels more, made from the coarsest one of the pyramid."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from ..timm_backbone import build_fpn, build_timm_backbone

__all__ = ["build_fcos_resnet_fpn_backbone", "build_fcos_timm_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the FPN of Detectron2 on its ResNet, with p6 and p7 from p5."""
    return _with_p6_and_p7(build_resnet_backbone(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_fcos_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same on a :class:`TimmBackbone`; errors as of :func:`build_timm_backbone`."""
    return _with_p6_and_p7(build_timm_backbone(cfg, input_shape), cfg)


def _with_p6_and_p7(bottom_up: Backbone, cfg: CfgNode) -> FPN:
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return build_fpn(bottom_up, LastLevelP6P7(channels, channels, in_feature="p5"), cfg)
