"""What watches over a training: unseen masks, losses, pseudo masks, and random numbers."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from ..class_splits import resolve_seen_classes
from ..data.seen_classes import training_classes
from ..data.train_loader import seed_generators

__all__ = ["FiniteLoss", "PseudoMaskWatch", "SeedEveryIteration", "UnseenMaskGuard"]

logger = logging.getLogger(__name__)


class SeedEveryIteration(HookBase):
    """
    Seeds all generators before each iteration, as a function of the seed, rank and iteration.

    The numbers that training draws in an iteration, for the sampled proposals above all, then
    depend neither on where the run started nor on what an evaluation in between has drawn. Belongs
    before all other hooks.
    """

    def __init__(self, seed: int):
        """
        Args:
            seed: 0 or more.
        """
        if seed < 0:
            raise ValueError(f"The seed of every iteration must be 0 or more, got {seed}.")
        self.seed = seed

    def before_step(self) -> None:
        # The data are seeded by their position, for purpose 0.
        seed_generators((self.seed, comm.get_rank(), self.trainer.iter), 1)


# ---- masks of unseen objects ----


class UnseenMaskGuard(HookBase):
    """
    Stops a training when the mask of an object of an unseen class is about to reach the model.

    It looks at every training batch on its way into the model, on the CPU and on each rank. An
    object of an unseen class must have ``gt_has_mask`` False; ``gt_masks`` without ``gt_has_mask``
    come from another mapper, which has forgotten no masks. The scalar "leak/num_unseen_masks" is 0
    in every training that goes on. That masks which are marked as forgotten play no part is not
    looked at here, but tested bit for bit.
    """

    @configurable
    def __init__(self, seen_classes: Collection[int], class_names: Sequence[str]):
        """
        Args:
            seen_classes: contiguous ids of the classes whose masks training may use.
            class_names: of all classes, by contiguous id; for the message.
        """
        self.seen_classes = frozenset(seen_classes)
        self.class_names = tuple(class_names)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        names = training_classes(cfg)
        seen_classes = resolve_seen_classes(cfg.DATASETS.SEEN_CLASSES, names)
        return {"seen_classes": seen_classes, "class_names": names}

    def before_train(self) -> None:
        # A function, not a method: a copy of the model must not want to copy the trainer.
        def check(model: nn.Module, args: tuple, kwargs: dict) -> None:
            if model.training:
                for batch in (*args, *kwargs.values()):
                    self._check(batch)

        # Around the model of several ranks, too, which would move tensors first.
        self._handle = self.trainer.model.register_forward_pre_hook(check, with_kwargs=True)

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("leak/num_unseen_masks", 0, smoothing_hint=False)

    def after_train(self) -> None:
        self._handle.remove()

    def _check(self, batch: Sequence[Mapping]) -> None:
        for example in batch:
            if "instances" not in example:
                continue
            found, reason = self._unseen_masks(example["instances"])
            if found:
                counts = Counter(self.class_names[k] for k in found)
                classes = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
                raise RuntimeError(
                    f"Training stops at iteration {self.trainer.iter}: masks of objects of unseen "
                    f"classes would reach the model, {classes}, of {_name_of(example)}: {reason}. "
                    "DATASETS.SEEN_CLASSES says whose masks training may use; the mapper must "
                    "forget all others, as TeacherStudentDatasetMapper does."
                )

    def _unseen_masks(self, instances: Instances) -> tuple[list[int], str]:
        """The classes of the objects whose masks must not be there, and how it shows."""
        if not instances.has("gt_masks"):
            return [], ""
        classes = instances.gt_classes.tolist()
        if not instances.has("gt_has_mask"):
            is_marked, reason = [True] * len(classes), "they have gt_masks, but no gt_has_mask"
        else:
            is_marked, reason = instances.gt_has_mask.tolist(), "gt_has_mask is True"
        return [k for k, x in zip(classes, is_marked) if x and k not in self.seen_classes], reason


# ---- losses that are not finite ----


class FiniteLoss(HookBase):
    """
    Ends training with a message that names the iteration, the images and the losses.

    Detectron2's trainer looks at the mean loss of all ranks, on the main one alone, and says
    neither which image nor which rank it came from. This hook looks at each rank's own losses as
    they leave the model; the rank that has a loss that is not finite raises, and with it ends the
    whole group (:func:`detectron2.engine.launch` ends the other processes). It costs one number a
    step from the device.

    A gradient can overflow where all losses are finite. Then the weights are lost, which only the
    next step's loss would tell. So :meth:`state_dict`, which every checkpoint asks for before its
    file is opened, raises where a tensor of the model is not finite.

    Run the steps inside :meth:`explain`.
    """

    def __init__(self) -> None:
        self._images = self._previous_images = "unknown"
        self._error: FloatingPointError | None = None

    def before_train(self) -> None:
        # Functions, not methods: a copy of the model must not want to copy the trainer.
        def remember(model: nn.Module, args: tuple) -> None:
            if model.training:
                self._images = ", ".join(_name_of(x) for x in args[0])

        def check(model: nn.Module, args: tuple, output: Any) -> None:
            if model.training:
                self._check(output)

        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(remember),
            model.register_forward_hook(check),
        ]

    def before_step(self) -> None:
        self._previous_images, self._images = self._images, "unknown"

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict:
        """
        Return nothing: this hook has no state, but a checkpoint that is about to be written.

        Raises:
            FloatingPointError: a tensor of the model is not finite.
        """
        broken = _non_finite_tensors(self.trainer.model)
        if broken:
            raise self._stop(
                f"{broken} after this step: its losses were finite, a gradient was not"
            )
        return {}

    @contextmanager
    def explain(self) -> Iterator[None]:
        """
        Name the images also where Detectron2 itself finds what is not finite.

        Weights that are not finite give the RPN such boxes, for which it raises before there are
        losses.
        """
        try:
            yield
        except FloatingPointError as error:
            if error is self._error:
                raise
            raise self._stop(str(error)) from error

    def _check(self, losses: Mapping[str, torch.Tensor]) -> None:
        values = torch.stack([x.detach().float().reshape(()) for x in losses.values()])
        # NaN or infinite as soon as one of them is. The only wait for the device.
        if values.sum().isfinite():
            return
        numbers = dict(zip(losses, values.tolist()))
        raise self._stop(
            "the losses are not finite: " + ", ".join(f"{k} {x:.6g}" for k, x in numbers.items())
        )

    def _stop(self, reason: str) -> FloatingPointError:
        broken = _non_finite_tensors(self.trainer.model)
        before = f"; of the batch before: {self._previous_images}" if broken else ""
        self._error = FloatingPointError(
            f"Training stops at iteration {self.trainer.iter}: {reason}. Images of the batch on "
            f"rank {comm.get_rank()}: {self._images}{before}. Nothing is saved: earlier checkpoints"
            " and last_checkpoint stay as they were. What helps: a lower SOLVER.BASE_LR, a longer "
            "SOLVER.WARMUP_ITERS, clipped gradients (SOLVER.CLIP_GRADIENTS.ENABLED True), or a look"
            " at these images and their annotations."
        )
        return self._error


@torch.no_grad()
def _non_finite_tensors(model: nn.Module) -> str:
    """How many tensors of a checkpoint of ``model`` hold NaN or infinity, "" if none does."""
    tensors = {
        name.removeprefix("module."): x
        for name, x in model.state_dict().items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    # One transfer for all.
    device = next(iter(tensors.values())).device
    is_finite = torch.stack([x.isfinite().all().to(device) for x in tensors.values()]).tolist()
    names = [name for name, good in zip(tensors, is_finite) if not good]
    if not names:
        return ""
    return f"{len(names)} of the model's {len(tensors)} tensors are not finite (first {names[0]!r})"


def _name_of(example: Mapping) -> str:
    return f"{example.get('file_name', '?')} (image_id {example.get('image_id', '?')})"


# ---- pseudo masks that collapse ----

# Over how many iterations a state has to last, and how many values have to be there: of a GPU's
# scalars there is one in 20 iterations, and not every batch has objects without a mask.
_WINDOW_ITERS = 100
_MIN_VALUES = 5

# Foreground ratio, of every value of the window, below or above which all masks are empty or full.
_EMPTY_RATIO = 0.01
_FULL_RATIO = 0.99

# The collapse of "interact" stops far above 0. It shows by the mean of the window falling below
# _FALL times that of the first _START_ITERS iterations, while teacher and student put fewer than
# _AGREEMENT_AFTER_FALL of the cells on the same side: where the teacher itself shrinks its masks,
# its student follows and agrees. Calibrated on 16 runs on shapes of 600 iterations, seeds 1 and 2:
# the six whose student failed fell to 0.20-0.55 of the start, with an agreement down to 0.46-0.64;
# in the ten others the window never went below 0.92. 0.7 is the middle of the gap.
_START_ITERS = 20
_FALL = 0.7
_AGREEMENT_AFTER_FALL = 0.75

_COLLAPSE_ADVICE = (
    "The student then learns background on classes without masks. What helps: a larger "
    "MODEL.PSEUDO_MASK.WARMUP_ITERS, so that the teacher is surer when the pseudo masks begin; "
    'MODEL.PSEUDO_MASK.METHOD "box_fit", which follows an unsure teacher; and a look at the '
    "teacher itself: teacher_mask/accuracy in metrics.json, pictures in TensorBoard with "
    "VIS_PERIOD above 0."
)


class PseudoMaskWatch(HookBase):
    """
    Warns, once, when the pseudo masks of a training die out, fill up, or shrink.

    It reads "pseudo_mask/fg_ratio" and "pseudo_mask/agreement" of the event storage after each
    step, and warns when over 100 iterations all pseudo masks are empty or full, or when their
    foreground has fallen and teacher and student disagree. It changes nothing. The start that a
    fall is measured from is part of checkpoints. Each rank watches its own objects.
    """

    def __init__(self) -> None:
        self._window: deque[tuple[int, float, float]] = deque()
        self._first_iter: int | None = None  # of this process with pseudo masks
        self._start: dict | None = None
        self._has_warned = False

    def state_dict(self) -> dict:
        return {"start": dict(self._start)} if self._start is not None else {}

    def load_state_dict(self, state: dict) -> None:
        self._start = dict(state["start"])

    def after_step(self) -> None:
        now, latest = self.trainer.iter, self.trainer.storage.latest()
        foreground, logged_at = latest.get("pseudo_mask/fg_ratio", (0.0, None))
        if logged_at != now or self._has_warned:
            return
        agreement, _ = latest.get("pseudo_mask/agreement", (0.0, None))
        if self._first_iter is None:
            self._first_iter = now
        if self._start is None:
            self._start = {"iteration": now, "total": 0.0, "count": 0}
        if now < self._start["iteration"] + _START_ITERS:
            self._start["total"] += foreground
            self._start["count"] += 1
        self._window.append((now, foreground, agreement))
        while len(self._window) > _MIN_VALUES and self._window[0][0] <= now - _WINDOW_ITERS:
            self._window.popleft()
        if now - self._first_iter + 1 >= _WINDOW_ITERS and len(self._window) >= _MIN_VALUES:
            self._judge()

    def _judge(self) -> None:
        iterations, foreground, agreement = zip(*self._window)
        mean, agreed = (sum(x) / len(x) for x in (foreground, agreement))
        start = self._start["total"] / self._start["count"]
        since = (
            f"since iteration {iterations[0]} their foreground ratio is {mean:.3f} on average, "
            f"{foreground[-1]:.3f} at iteration {iterations[-1]}"
        )
        if max(foreground) < _EMPTY_RATIO:
            message = f"all pseudo masks are empty: {since}"
        elif min(foreground) > _FULL_RATIO:
            message = f"all pseudo masks are full: {since}"
        elif mean < _FALL * start and agreed < _AGREEMENT_AFTER_FALL:
            message = (
                f"the pseudo masks shrink: {since}, after {start:.3f} when they began at iteration "
                f"{self._start['iteration']}, and teacher and student put only {agreed:.0%} of the "
                "cells on the same side"
            )
        else:
            return
        logger.warning(f"Iteration {self.trainer.iter}: {message}. {_COLLAPSE_ADVICE}")
        self._has_warned = True
