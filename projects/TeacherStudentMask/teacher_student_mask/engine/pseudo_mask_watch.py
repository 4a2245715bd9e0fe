"""Warns while a training's pseudo masks die out, fill up, or shrink away from the teacher."""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from detectron2.engine import HookBase

__all__ = [
    "AGREEMENT_AFTER_FALL",
    "EMPTY_RATIO",
    "FALL",
    "FULL_RATIO",
    "MIN_VALUES",
    "PseudoMaskWatch",
    "RECOVERY",
    "START_ITERS",
    "WINDOW_ITERS",
]

logger = logging.getLogger(__name__)

# Over how many iterations a state has to last, and how many values have to be there: of a GPU's
# scalars there is one in 20 iterations, and not every batch has objects without a mask.
WINDOW_ITERS = 100
MIN_VALUES = 5

# Foreground ratio, of every value of the window, below or above which all masks are empty or full.
EMPTY_RATIO = 0.01
FULL_RATIO = 0.99

# The collapse of "interact" stops far above 0. It shows by the mean of the window falling below
# FALL times that of the first START_ITERS iterations, while teacher and student put fewer than
# AGREEMENT_AFTER_FALL of the cells on the same side: where the teacher itself shrinks its masks,
# its student follows and agrees.
# Calibrated on the shapes configs, 16 runs of 600 iterations, seeds 1 and 2, commit de6b955. The
# six whose student failed fell to 0.20-0.55 of the start, with an agreement down to 0.46-0.64; in
# the ten others the window never went below 0.92. 0.7 is the middle of the gap. There the
# agreement was not needed; it is for long trainings, on which nothing was measured. "none", whose
# student stayed far below its teacher, too, kept its foreground and is not recognised.
START_ITERS = 20
FALL = 0.7
AGREEMENT_AFTER_FALL = 0.75
# Only from this share of the start on is there a recovery, after which there can be a new warning.
RECOVERY = 0.85

_ADVICE = (
    "The student then learns background on classes without masks. What helps: a larger "
    "MODEL.PSEUDO_MASK.WARMUP_ITERS, so that the teacher is surer when the pseudo masks begin; "
    'MODEL.PSEUDO_MASK.METHOD "box_fit", which follows an unsure teacher; and a look at the '
    "teacher itself: teacher_mask/accuracy in metrics.json, pictures in TensorBoard with "
    "VIS_PERIOD above 0."
)


class _Value(NamedTuple):
    iteration: int
    foreground: float
    agreement: float


class PseudoMaskWatch(HookBase):
    """
    Reads "pseudo_mask/fg_ratio" and "pseudo_mask/agreement" of the event storage after each step.

    It warns once when, over :data:`WINDOW_ITERS` iterations, all pseudo masks are empty or full,
    or when their foreground has fallen and teacher and student disagree; again only after a
    recovery. It changes nothing. The start that a fall is measured from is part of checkpoints.
    Each rank watches its own objects.
    """

    def __init__(self) -> None:
        self._window: deque[_Value] = deque()
        self._since: int | None = None  # the first value of this process
        self._start: dict | None = None
        self._warned = ""

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        foreground = _at(latest, "pseudo_mask/fg_ratio", self.trainer.iter)
        if foreground is None:
            return
        # Detectron2 has no agreement of other people's heads: without it only the fall counts.
        agreement = _at(latest, "pseudo_mask/agreement", self.trainer.iter) or 0.0
        self._add(_Value(self.trainer.iter, foreground, agreement))
        if self._is_filled():
            self._judge()

    def state_dict(self) -> dict:
        return {"start": dict(self._start)} if self._start is not None else {}

    def load_state_dict(self, state: dict) -> None:
        self._start = dict(state["start"])

    def _add(self, value: _Value) -> None:
        if self._since is None:
            self._since = value.iteration
        if self._start is None:
            self._start = {"iteration": value.iteration, "total": 0.0, "count": 0}
        if value.iteration < self._start["iteration"] + START_ITERS:
            self._start["total"] += value.foreground
            self._start["count"] += 1
        self._window.append(value)
        oldest = value.iteration - WINDOW_ITERS + 1
        while len(self._window) > MIN_VALUES and self._window[0].iteration < oldest:
            self._window.popleft()

    def _is_filled(self) -> bool:
        has_passed = self._window[-1].iteration - self._since + 1 >= WINDOW_ITERS
        return has_passed and len(self._window) >= MIN_VALUES

    def _judge(self) -> None:
        foreground = [x.foreground for x in self._window]
        mean = sum(foreground) / len(foreground)
        agreement = sum(x.agreement for x in self._window) / len(self._window)
        start = self._start["total"] / self._start["count"]
        if max(foreground) < EMPTY_RATIO:
            self._warn("empty", f"all pseudo masks are empty: {self._describe(mean)}")
        elif min(foreground) > FULL_RATIO:
            self._warn("full", f"all pseudo masks are full: {self._describe(mean)}")
        elif mean < FALL * start and agreement < AGREEMENT_AFTER_FALL:
            self._warn(
                "fallen",
                f"the pseudo masks shrink: {self._describe(mean)}, after {start:.3f} when they "
                f"began at iteration {self._start['iteration']}, and teacher and student put only "
                f"{agreement:.0%} of the cells on the same side",
            )
        elif self._has_recovered(mean, start):
            logger.info(
                f"Iteration {self.trainer.iter}: the pseudo masks have recovered: "
                f"{self._describe(mean)}."
            )
            self._warned = ""

    def _has_recovered(self, mean: float, start: float) -> bool:
        if self._warned == "fallen":
            return mean >= RECOVERY * start
        foreground = [x.foreground for x in self._window]
        return (
            bool(self._warned) and EMPTY_RATIO <= min(foreground) <= max(foreground) <= FULL_RATIO
        )

    def _describe(self, mean: float) -> str:
        first, last = self._window[0].iteration, self._window[-1].iteration
        return (
            f"since iteration {first} their foreground ratio is {mean:.3f} on average, "
            f"{self._window[-1].foreground:.3f} at iteration {last}"
        )

    def _warn(self, kind: str, message: str) -> None:
        # Masks that go on shrinking until they are empty are the same collapse.
        if not self._warned:
            logger.warning(f"Iteration {self.trainer.iter}: {message}. {_ADVICE}")
            self._warned = kind


def _at(latest: dict, name: str, iteration: int) -> float | None:
    # The value of a scalar that was logged in this iteration.
    value, logged_at = latest.get(name, (None, None))
    return value if logged_at == iteration else None
