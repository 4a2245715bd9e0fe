"""What teacher and student have in common, on ROIs and on CondInst's planes."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

from .mask_targets import MASK_LOSSES, check_choice
from .pseudo_masks import EXTERNAL_MASK_USES, PseudoMaskGenerator

__all__ = ["TeacherStudentPair"]


class TeacherStudentPair:
    """
    A class-agnostic ``teacher_mask_head`` beside the student ``mask_head``: its settings.

    A class of heads with a pair names this base before that of the heads.
    """

    # Of the student, by their names in the config.
    student_losses = MASK_LOSSES
    heads_at_test = ("student", "teacher")

    @configurable
    def __init__(
        self,
        *,
        teacher_mask_head: nn.Module,
        pseudo_masks: PseudoMaskGenerator,
        warmup_iters: int = 1000,
        student_loss: str = "",
        external_masks: str = "alone",
        test_mask_head: str = "student",
        vis_period: int = 0,
        **kwargs,
    ):
        """
        Args:
            teacher_mask_head: class-agnostic, called as the student's.
            pseudo_masks: makes the student's targets where there is no mask.
            warmup_iters: first iteration at which the teacher's pseudo masks train the student.
            student_loss: one of ``student_losses``; "" = ``mask_loss``, which is the teacher's.
            external_masks: ``MODEL.PSEUDO_MASK.EXTERNAL`` of config.py.
            test_mask_head: "student", or "teacher" for analysis.
            vis_period: iterations between pictures in the event storage; 0 = none.
            **kwargs: of the heads, without ``train_on_external_masks``.

        Raises:
            ValueError: an unknown test head, use of external masks, or loss.
        """
        kwargs["train_on_external_masks"] = external_masks == "alone"
        super().__init__(**kwargs)
        check_choice("MODEL.PSEUDO_MASK.EXTERNAL", external_masks, EXTERNAL_MASK_USES)
        check_choice("TEST.MASK_HEAD", test_mask_head, self.heads_at_test)
        losses = ("", *self.student_losses)
        check_choice("MODEL.PSEUDO_MASK.STUDENT_LOSS", student_loss, losses)
        self.teacher_mask_head = teacher_mask_head
        self.pseudo_masks = pseudo_masks
        self.warmup_iters = warmup_iters
        self.student_loss = self.student_losses.get(student_loss, self.mask_loss)
        self.external_masks = external_masks
        self.test_mask_head = test_mask_head
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        if cfg.MODEL.ROI_MASK_HEAD.TRAIN_ON_EXTERNAL_MASKS:
            raise ValueError("TRAIN_ON_EXTERNAL_MASKS is not for a pair: see PSEUDO_MASK.EXTERNAL.")
        return super().from_config(cfg, input_shape) | {
            "pseudo_masks": PseudoMaskGenerator.from_config(cfg),
            "warmup_iters": cfg.MODEL.PSEUDO_MASK.WARMUP_ITERS,
            "student_loss": cfg.MODEL.PSEUDO_MASK.STUDENT_LOSS,
            "external_masks": cfg.MODEL.PSEUDO_MASK.EXTERNAL,
            "test_mask_head": cfg.TEST.MASK_HEAD,
            "vis_period": cfg.VIS_PERIOD,
        }

    def _has_pseudo_masks(self) -> bool:
        return get_event_storage().iter >= self.warmup_iters

    def _is_vis_iteration(self) -> bool:
        return self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0

    def _head_at_test(self) -> nn.Module:
        return self.teacher_mask_head if self.test_mask_head == "teacher" else self.mask_head

    def _put_pictures(
        self, whose: str, images: torch.Tensor, masks: Sequence[torch.Tensor]
    ) -> None:
        # Of each of K objects or ROIs: its image, (K, 3, H, W) in [0, 1], beside the masks of
        # teacher, student and target, (K, h, w) of any size each.
        if not comm.is_main_process():  # whose pictures alone are written, and forgotten
            return
        strips = [images]
        for x in masks:
            resized = F.interpolate(x[:, None].float(), size=images.shape[-2:])
            strips.append(resized.expand(-1, 3, -1, -1))
        for k, picture in enumerate(torch.cat(strips, dim=3).detach()):
            name = f"{whose} without a mask: image | teacher | student | target ({k})"
            get_event_storage().put_image(name, picture.cpu())
