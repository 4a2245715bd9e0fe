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
    ("interact", 2): (
        "36 22 21 19 15 17 18 18 19 20 21 22 22 23 21",
        "53 52 48 53 51 54 63 61 65 66 62 63 61 63 66",
    ),
    ("interact, deep teacher", 1): (
        "37 18 13 8 11 6 5 7 10 11 12 12 11 11 11",
        "48 51 60 54 50 54 55 51 49 43 46 45 47 49 48",
    ),
    ("interact, deep teacher", 2): (
        "34 20 20 15 13 15 15 15 15 18 18 18 19 20 18",
        "52 60 50 55 55 59 64 67 66 66 63 65 64 63 64",
    ),
    ("opmask + interact", 1): (
        "33 23 15 11 19 16 15 17 18 20 20 20 21 21 21",
        "51 52 56 56 53 56 55 50 53 55 56 56 57 61 60",
    ),
    ("opmask + interact", 2): (
        "40 22 20 21 18 19 18 22 24 25 25 25 25 26 26",
        "60 66 58 69 68 68 71 71 71 73 71 71 71 69 71",
    ),
}
HEALTHY = {
    ("boxinst + interact", 1): (
        "65 61 63 64 67 68 66 64 62 65 64 62 63 60 61",
        "80 79 78 80 79 77 76 79 79 81 85 84 83 84 85",
    ),
    ("boxinst + interact", 2): (
        "68 66 68 64 63 64 70 67 67 64 61 66 65 68 63",
        "86 85 83 80 82 81 81 80 79 80 79 80 80 79 78",
    ),
    ("box_fit", 1): (
        "55 53 50 50 54 56 55 50 53 54 51 51 50 51 52",
        "82 83 84 85 87 85 88 87 88 88 87 89 88 88 88",
    ),
    ("box_fit", 2): (
        "52 51 54 52 51 52 54 56 51 50 52 54 53 56 52",
        "63 81 86 87 86 87 84 87 86 87 89 88 90 90 89",
    ),
    ("crf", 1): (
        "49 50 47 47 51 48 54 50 50 54 52 49 50 50 52",
        "77 69 83 84 84 85 88 87 87 89 88 89 89 88 88",
    ),
    ("crf", 2): (
        "51 52 55 50 52 50 51 52 46 48 49 49 49 53 49",
        "57 69 85 85 85 88 86 87 85 88 88 89 90 89 88",
    ),
    ("none", 1): (
        "35 37 33 36 38 38 39 36 37 41 38 38 39 38 39",
        "50 48 64 58 72 77 78 79 80 80 80 80 81 82 81",
    ),
    ("none", 2): (
        "36 37 39 39 35 36 38 38 37 37 38 38 40 40 38",
        "51 48 48 68 71 71 77 78 78 80 80 79 79 79 81",
    ),
    ("threshold", 1): (
        "42 45 39 38 41 42 46 44 41 46 44 45 46 43 45",
        "71 72 81 82 86 88 88 86 88 88 88 88 88 88 89",
    ),
    ("threshold", 2): (
        "41 43 48 43 45 44 39 46 42 43 44 46 46 48 43",
        "53 57 78 85 85 85 86 87 87 87 88 88 89 88 89",
    ),
}


def series_of(run):
    return [[int(x) / 100 for x in values.split()] for values in run]


def watch(foreground, agreement, start=0, period=1, hook=None):
    """Feed a hook with values ``period`` iterations apart; returns it and the last iteration."""
    hook = hook or PseudoMaskWatch()
    iteration = start
    with EventStorage(start) as storage:
        hook.trainer = types.SimpleNamespace(storage=storage, iter=start)
        for ratio, share in zip(foreground, agreement):
            for k in range(period):
                iteration = hook.trainer.iter = storage.iter
                if k == period - 1:
                    storage.put_scalar("pseudo_mask/fg_ratio", ratio)
                    storage.put_scalar("pseudo_mask/agreement", share)
                hook.after_step()
                storage.step()
    return hook, iteration


def constant(value, num=150, agreement=0.9):
    return [value] * num, [agreement] * num


@pytest.mark.parametrize("run", COLLAPSED)
@pytest.mark.parametrize("period", [1, PERIOD], ids=["as on a CPU", "as on a GPU"])
def test_every_recorded_collapse_is_reported_once(log, run, period):
    foreground, agreement = series_of(COLLAPSED[run])
    if period == 1:
        foreground, agreement = (
            [v for v in x for _ in range(PERIOD)] for x in (foreground, agreement)
        )
    watch(foreground, agreement, start=300, period=period)
    (message,) = log.messages
    assert "the pseudo masks shrink" in message and f"after {foreground[0]:.3f}" in message
    # Within the first 140 iterations: with more than half of this short training to go.
    assert int(message.split()[1].rstrip(":")) < 440


@pytest.mark.parametrize("run", HEALTHY)
@pytest.mark.parametrize("period", [1, PERIOD], ids=["as on a CPU", "as on a GPU"])
def test_no_recorded_healthy_training_is_reported(log, run, period):
    foreground, agreement = series_of(HEALTHY[run])
    if period == 1:
        foreground, agreement = (
            [v for v in x for _ in range(PERIOD)] for x in (foreground, agreement)
        )
    watch(foreground, agreement, start=300, period=period)
    assert not log.messages


@pytest.mark.parametrize("value, word", [(0.0, "empty"), (0.0099, "empty"), (0.995, "full")])
def test_empty_and_full_masks_are_reported_after_100_iterations(log, value, word):
    hook, last = watch(*constant(value, num=99), start=40)
    assert not log.messages and last == 138
    watch(*constant(value), start=139, hook=hook)
    (message,) = log.messages
    assert message.startswith(
        f"Iteration 139: all pseudo masks are {word}: since iteration 40 their foreground ratio is "
        f"{value:.3f} on average, {value:.3f} at iteration 139."
    )
    for advice in ("MODEL.PSEUDO_MASK.WARMUP_ITERS", '"box_fit"', "teacher_mask/accuracy"):
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
    assert not log.messages


def test_batches_without_pseudo_masks_do_not_count(log):
    # Every 30th batch has some: five values are needed, here of 121 iterations.
    watch(*constant(0.0, num=4), period=30)
    assert not log.messages
    watch(*constant(0.0, num=5), period=30)
    assert "since iteration 29 " in log.messages[0]


def test_the_start_survives_a_checkpoint(log):
    hook, last = watch([], [])
    assert hook.state_dict() == {}
    hook, last = watch(*constant(0.4, num=50))
    resumed = PseudoMaskWatch()
    resumed.load_state_dict(hook.state_dict())
    watch(*constant(0.1, num=99, agreement=0.5), start=last + 1, hook=resumed)
    assert not log.messages  # a full window of its own first
    watch(*constant(0.1, num=1, agreement=0.5), start=last + 100, hook=resumed)
    assert "after 0.400 when they began at iteration 0" in log.messages[0]
