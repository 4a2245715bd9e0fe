"""Stops a training whose loss or weights are no longer finite, before a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

__all__ = ["FiniteLoss", "non_finite_tensors"]

_ADVICE = (
    "What helps: a lower SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS, clipped gradients "
    "(SOLVER.CLIP_GRADIENTS.ENABLED True), or a look at these images and their annotations."
)
_NOTHING_SAVED = "Nothing is saved: earlier checkpoints and last_checkpoint stay as they were."


class FiniteLoss(HookBase):
    """
    Ends training with a message that names the iteration, the images and the losses.

    Detectron2's trainer looks at the mean loss of all ranks, on the main one alone, and says
    neither which image nor which rank it came from. This hook looks at each rank's own losses as
    they leave the model; the rank that has a loss that is not finite raises, and with it ends the
    whole group (:func:`detectron2.engine.launch` ends the other processes). The weights are those
    before the step. It costs one number a step from the device.

    A gradient can overflow where all losses are finite. Then the weights are lost, which only the
    next step's loss would tell. So :meth:`state_dict`, which every checkpoint asks for before its
    file is opened, raises where a tensor of the model is not finite: no such checkpoint is saved.
    With SOLVER.AMP.ENABLED the gradient scaler leaves such a step out by itself.

    Register it before the hook that evaluates, and run the steps inside :meth:`explain`.
    """

    def __init__(self) -> None:
        self._images: list[str] | None = None
        self._previous_images: list[str] | None = None
        self._error: FloatingPointError | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def before_train(self) -> None:
        # Functions, not methods: a copy of the model must not want to copy the trainer.
        def remember(model: nn.Module, args: tuple) -> None:
            if model.training:
                self._images = _names_of(args[0]) if args else None

        def check(model: nn.Module, args: tuple, output: Any) -> None:
            if model.training:
                self._check(output)

        model = self.trainer.model
        self._handles = [
            model.register_forward_pre_hook(remember),
            model.register_forward_hook(check),
        ]

    def before_step(self) -> None:
        self._previous_images, self._images = self._images, None

    def after_train(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._error is not None and self.trainer.iter + 1 >= self.trainer.max_iter:
            # Detectron2 takes a failure in the last iteration for the end of training: it would
            # evaluate, and on several ranks wait for those that never come.
            raise self._error

    def state_dict(self) -> dict:
        """
        Return nothing: this hook has no state, but a checkpoint that is about to be written.

        Raises:
            FloatingPointError: a tensor of the model is not finite.
        """
        names, num_tensors = non_finite_tensors(self.trainer.model)
        if names:
            raise self._stop(
                f"{_broken(names, num_tensors)} after this step: its losses were finite, a "
                f"gradient was not. {_describe_images(self._images)}"
            )
        return {}

    @contextmanager
    def explain(self) -> Iterator[None]:
        """
        Name the images also where Detectron2 itself finds what is not finite.

        Weights that are not finite give the RPN such boxes, for which it raises before there are
        losses.

        Raises:
            FloatingPointError: what was raised inside, with the iteration and the images.
        """
        try:
            yield
        except FloatingPointError as error:
            if error is self._error or self._images is None:
                raise
            raise self._stop(f"{error}{self._describe_origin()}") from error

    def _check(self, output: Any) -> None:
        losses = {"total_loss": output} if isinstance(output, torch.Tensor) else output
        if not isinstance(losses, Mapping) or not losses:
            return
        values = torch.stack([x.detach().float().reshape(()) for x in losses.values()])
        # NaN or infinite as soon as one of them is. The only wait for the device.
        if values.sum().isfinite():
            return
        numbers = dict(zip(losses, values.tolist()))
        is_finite = dict(zip(losses, values.isfinite().tolist()))
        bad = ", ".join(f"{name} {x:.6g}" for name, x in numbers.items() if not is_finite[name])
        finite = [(x, name) for name, x in numbers.items() if is_finite[name]]
        largest = "none is finite"
        if finite:
            largest = "the largest finite one is {1} {0:.6g}".format(*max(finite))
        what = f"not finite: {bad}" if bad else "each loss is finite, but their sum is not"
        raise self._stop(f"losses {what}; {largest}.{self._describe_origin()}")

    def _describe_origin(self) -> str:
        # The images of this step; of the last one, too, where the weights were lost in it.
        text = f" {_describe_images(self._images)}"
        names, num_tensors = non_finite_tensors(self.trainer.model)
        if names:
            text += (
                f" But {_broken(names, num_tensors)} already before this step, so look at the step "
                f"before. {_describe_images(self._previous_images)}"
            )
        return text

    def _stop(self, message: str) -> FloatingPointError:
        self._error = FloatingPointError(
            f"Training stops at iteration {self.trainer.iter}: {message} {_NOTHING_SAVED} {_ADVICE}"
        )
        return self._error


@torch.no_grad()
def non_finite_tensors(model: nn.Module) -> tuple[list[str], int]:
    """
    Look for NaN and infinity in the parameters and buffers that a checkpoint of ``model`` holds.

    Args:
        model: may be wrapped for several ranks; not changed.

    Returns:
        The names of the tensors that hold any, and the number of floating-point tensors.
    """
    tensors = {
        name.removeprefix("module."): x
        for name, x in model.state_dict().items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if not tensors:
        return [], 0
    device = next(iter(tensors.values())).device
    # One transfer for all.
    is_finite = torch.stack([x.isfinite().all().to(device) for x in tensors.values()]).tolist()
    return [name for name, good in zip(tensors, is_finite) if not good], len(tensors)


def _broken(names: list[str], num_tensors: int) -> str:
    return f"{len(names)} of the model's {num_tensors} tensors are not finite (first {names[0]!r})"


def _names_of(batch: Any) -> list[str]:
    # Of a batch in the form that Detectron2's models take: a list of dicts.
    if not isinstance(batch, (list, tuple)):
        return []
    return [
        f"{x.get('file_name', 'without file_name')} (image_id {x.get('image_id', 'unknown')})"
        for x in batch
        if isinstance(x, Mapping)
    ]


def _describe_images(names: list[str] | None) -> str:
    listed = ", ".join(names) if names else "unknown"
    return f"Images of the batch on rank {comm.get_rank()}: {listed}."
