"""The watch warns of the collapses that were recorded, once, and not of the healthy trainings."""

import types

import pytest
from detectron2.utils.events import EventStorage

from teacher_student_mask.engine import PseudoMaskWatch

PERIOD = 20
# metrics.json of the shapes configs at iterations 319, 339 .. 599 (medians over 20 iterations, the
# gate opens at 300), in percent: fg_ratio and agreement of (method, seed). Commit de6b955, CPU.
COLLAPSED = {
    ("interact", 1): (
        "40 31 21 17 22 23 26 24 25 28 28 28 29 28 28",
        "70 56 66 58 69 70 72 71 73 72 72 72 72 75 74",
    ),
    ("opmask + interact", 1): (
        "33 23 15 11 19 16 15 17 18 20 20 20 21 21 21",
        "51 52 56 56 53 56 55 50 53 55 56 56 57 61 60",
    ),
}
HEALTHY = {
    ("box_fit", 1): (
        "55 53 50 50 54 56 55 50 53 54 51 51 50 51 52",
        "82 83 84 85 87 85 88 87 88 88 87 89 88 88 88",
    ),
    ("crf", 1): (
        "49 50 47 47 51 48 54 50 50 54 52 49 50 50 52",
        "77 69 83 84 84 85 88 87 87 89 88 89 89 88 88",
    ),
    ("none", 1): (
        "35 37 33 36 38 38 39 36 37 41 38 38 39 38 39",
        "50 48 64 58 72 77 78 79 80 80 80 80 81 82 81",
    ),
}


def series_of(run):
    return [[int(x) / 100 for x in values.split()] for values in run]


def watch(foreground, agreement, start=0, period=1, hook=None):
    """Feed a hook with values ``period`` iterations apart; returns it."""
    hook = hook or PseudoMaskWatch()
    with EventStorage(start) as storage:
        hook.trainer = types.SimpleNamespace(storage=storage, iter=start)
        for ratio, share in zip(foreground, agreement):
            for k in range(period):
                hook.trainer.iter = storage.iter
                if k == period - 1:
                    storage.put_scalar("pseudo_mask/fg_ratio", ratio)
                    storage.put_scalar("pseudo_mask/agreement", share)
                hook.after_step()
                storage.step()
    return hook


def constant(value, num=150, agreement=0.9):
    return [value] * num, [agreement] * num


@pytest.mark.parametrize("run", [*COLLAPSED, *HEALTHY])
@pytest.mark.parametrize("period", [1, PERIOD], ids=["as on a CPU", "as on a GPU"])
def test_recorded_collapses_are_reported_once_and_healthy_trainings_not(log, run, period):
    foreground, agreement = series_of({**COLLAPSED, **HEALTHY}[run])
    if period == 1:
        foreground, agreement = (
            [v for v in x for _ in range(PERIOD)] for x in (foreground, agreement)
        )
    watch(foreground, agreement, start=300, period=period)
    if run in HEALTHY:
        assert not log.messages
        return
    (message,) = log.messages
    assert "the pseudo masks shrink" in message and f"after {foreground[0]:.3f}" in message
    # Within the first 140 iterations: with more than half of this short training to go.
    assert int(message.split()[1].rstrip(":")) < 440


@pytest.mark.parametrize("value, word", [(0.0, "empty"), (0.0099, "empty"), (0.995, "full")])
def test_empty_and_full_masks_are_reported_after_100_iterations(log, value, word):
    watch(*constant(value, num=99), start=40)
    assert not log.messages
    watch(*constant(value), start=40)
    (message,) = log.messages
    assert (
        f"Iteration 139: the pseudo masks are {word}: " in message and f" {value:.3f}," in message
    )
    for advice in ('STUDENT_LOSS "dice"', '"box_fit"', "teacher_mask/accuracy"):
        assert advice in message
    assert log.records[0].levelname == "WARNING"


def test_what_is_no_collapse(log):
    # Small objects in large boxes have few foreground cells from the start.
    for value in (0.01, 0.02, 0.5, 0.99):
        watch(*constant(value, num=300, agreement=0.5))
    foreground, agreement = constant(0.0, num=190)
    foreground[95] = 0.3  # one value between
    watch(foreground, agreement)
    # A teacher that learns to segment sparse objects: fewer cells, and both agree on them.
    watch([0.8 - 0.002 * k for k in range(300)], [0.9] * 300)
    # Fewer than five values in 100 iterations.
    watch(*constant(0.0, num=20), period=30)
    assert not log.messages


def test_after_a_resume_a_fall_is_measured_from_there_on(log):
    assert watch(*constant(0.4)).state_dict() == {}
    resumed = PseudoMaskWatch()
    resumed.load_state_dict(
        {"start": {"iteration": 0, "total": 8.0, "count": 20}}
    )  # of an earlier version
    watch(*constant(0.1, agreement=0.5), start=150, hook=resumed)
    assert not log.messages
