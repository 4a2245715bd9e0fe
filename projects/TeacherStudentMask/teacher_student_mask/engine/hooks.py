"""Hooks that watch a training: unseen masks, losses, pseudo masks, and random numbers."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..data.train_loader import seed_generators

__all__ = ["FiniteLoss", "PseudoMaskWatch", "SeedEveryIteration", "UnseenMaskGuard"]

logger = logging.getLogger(__name__)


class SeedEveryIteration(HookBase):
    """
    Seeds all generators before each iteration, as a function of the seed, rank and iteration.

    The numbers that an iteration draws, for the sampled proposals above all, then depend neither on
    where the run started nor on an evaluation in between. Belongs before all other hooks.
    """

    def __init__(self, seed: int):
        self.seed = seed  # 0 or more

    def before_step(self) -> None:
        # The data are seeded by their position, for purpose 0.
        seed_generators((self.seed, comm.get_rank(), self.trainer.iter), 1)


class UnseenMaskGuard(HookBase):
    """
    Stops a training when the mask of an object of an unseen class is about to reach the model.

    In every batch of each rank an object of an unseen class must have ``gt_has_mask`` False;
    ``gt_masks`` without that field come from another mapper, which has forgotten no masks. The
    scalar "leak/num_unseen_masks" is 0 in every training that goes on.
    """

    def __init__(self, seen_classes: Collection[int], class_names: Sequence[str]):
        """
        Args:
            seen_classes: contiguous ids of the classes whose masks training may use.
            class_names: of all classes, by contiguous id; for the message.
        """
        self.seen_classes, self.class_names = frozenset(seen_classes), class_names

    def before_train(self) -> None:
        # A function, not a method: a copy of the model must not want to copy the trainer.
        def check(model: nn.Module, args: tuple) -> None:
            if model.training:
                self._check(args[0])

        # Around the model of several ranks, too, which would move tensors first.
        self._handle = self.trainer.model.register_forward_pre_hook(check)

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("leak/num_unseen_masks", 0, smoothing_hint=False)

    def after_train(self) -> None:
        self._handle.remove()

    def _check(self, batch: Sequence[Mapping]) -> None:
        for example in batch:
            instances = example.get("instances")
            if instances is None or not instances.has("gt_masks"):
                continue
            classes = instances.gt_classes
            if instances.has("gt_has_mask"):
                classes = classes[instances.gt_has_mask]
            unseen = [self.class_names[k] for k in classes.tolist() if k not in self.seen_classes]
            if unseen:
                counts = ", ".join(f"{n} of {name!r}" for name, n in Counter(unseen).items())
                raise RuntimeError(
                    f"Training stops at iteration {self.trainer.iter}: masks of objects of unseen "
                    f"classes would reach the model, {counts}, of {_name_of(example)}. The mapper "
                    "must set gt_has_mask False for classes that DATASETS.SEEN_CLASSES does not "
                    "name, as TeacherStudentDatasetMapper does."
                )


class FiniteLoss(HookBase):
    """
    Ends training with a message that names the iteration, the images and the losses.

    Detectron2's trainer looks at the mean loss of all ranks, on the main one alone; this hook at
    each rank's own.
    """

    def __init__(self) -> None:
        self._images = "unknown"

    def before_train(self) -> None:
        def remember(model: nn.Module, args: tuple) -> None:
            if model.training:
                self._images = ", ".join(_name_of(x) for x in args[0])

        def check(model: nn.Module, args: tuple, losses: Any) -> None:
            if not model.training:
                return
            values = torch.stack([x.detach().float().reshape(()) for x in losses.values()])
            # NaN or infinite as soon as one of them is. The only wait for the device.
            if not values.sum().isfinite():
                numbers = ", ".join(f"{k} {x:.6g}" for k, x in zip(losses, values.tolist()))
                raise FloatingPointError(f"the losses are not finite: {numbers}")

        register = self.trainer.model.register_forward_pre_hook
        self._handles = [register(remember), self.trainer.model.register_forward_hook(check)]

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()

    def explain(self, reason: object) -> FloatingPointError:
        """Return the error that names iteration, rank and images of the last batch."""
        return FloatingPointError(
            f"Training stops at iteration {self.trainer.iter}: {reason}. Images of the batch on "
            f"rank {comm.get_rank()}: {self._images}. Nothing is saved: earlier checkpoints and "
            "last_checkpoint stay as they were. What helps: a lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS, clipped gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), or a "
            "look at these images, those of the batch before, and their annotations."
        )


def _name_of(example: Mapping) -> str:
    return f"{example.get('file_name', '?')} (image_id {example.get('image_id', '?')})"


# Over how many iterations a state has to last, and how many values have to be there: iterations
# without an unseen object have none.
_WINDOW_ITERS, _MIN_VALUES = 100, 5

# Foreground ratio, of every value of the window, below or above which all masks are empty or full.
_EMPTY_RATIO, _FULL_RATIO = 0.01, 0.99

# The collapse of "interact" stops far above 0. It shows by the mean of the window falling below
# _FALL times that of the first _START_ITERS iterations, while teacher and student put fewer than
# _AGREEMENT_AFTER_FALL of the cells on the same side: where the teacher itself shrinks its masks,
# its student follows and agrees. Calibrated on 16 runs on shapes of 600 iterations: the six whose
# student failed fell to 0.20-0.55 of the start; the ten others never went below 0.92.
_START_ITERS, _FALL, _AGREEMENT_AFTER_FALL = 20, 0.7, 0.75


class PseudoMaskWatch(HookBase):
    """
    Warns, once, when the pseudo masks of a training die out, fill up, or shrink.

    It warns when by "pseudo_mask/fg_ratio" of 100 iterations all are empty or full, or when their
    foreground has fallen and, by "pseudo_mask/agreement", teacher and student disagree. After
    ``--resume`` a fall is measured from there on. Each rank watches its own objects.
    """

    def __init__(self) -> None:
        self._has_warned = False

    def load_state_dict(self, state: dict) -> None:
        """Nothing is read; checkpoints of earlier versions have a state."""

    def after_step(self) -> None:
        now, storage = self.trainer.iter, self.trainer.storage
        _, logged_at = storage.latest().get("pseudo_mask/fg_ratio", (0.0, None))
        if logged_at != now or self._has_warned:
            return
        names = ("pseudo_mask/fg_ratio", "pseudo_mask/agreement")
        foreground, agreement = (storage.history(x).values() for x in names)
        began = foreground[0][1]
        num = sum(i > now - _WINDOW_ITERS for _, i in foreground[-_WINDOW_ITERS:])
        if now - began + 1 < _WINDOW_ITERS or num < _MIN_VALUES:
            return
        first = [x for x, i in foreground[:_START_ITERS] if i < began + _START_ITERS]
        start = sum(first) / len(first)
        foreground, agreement = ([x for x, _ in y[-num:]] for y in (foreground, agreement))
        mean, agreed = sum(foreground) / num, sum(agreement) / num
        if max(foreground) < _EMPTY_RATIO:
            state = "are empty"
        elif min(foreground) > _FULL_RATIO:
            state = "are full"
        elif mean < _FALL * start and agreed < _AGREEMENT_AFTER_FALL:
            state = "shrink"
        else:
            return
        self._has_warned = True
        logger.warning(
            f"Iteration {now}: the pseudo masks {state}: over {_WINDOW_ITERS} iterations their "
            f"foreground ratio is {mean:.3f}, after {start:.3f} when they began at iteration "
            f"{began}, and teacher and student put {agreed:.0%} of the cells on "
            "the same side. The student then learns from wrong masks. What helps: STUDENT_LOSS "
            '"dice" or INTERACT_BALANCE "share" of MODEL.PSEUDO_MASK, or its METHOD "box_fit"; and '
            "a look at teacher_mask/accuracy in metrics.json."
        )
