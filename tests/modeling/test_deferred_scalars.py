"""Scalars reach the event storage at once on the CPU, together and averaged where deferred."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from teacher_student_mask.modeling.deferred_scalars import DeferredScalars


def logged(storage):
    return {name: value for name, (value, _) in storage.latest().items()}


def test_on_the_cpu_every_value_is_logged_at_once():
    scalars = DeferredScalars(period=20)
    with EventStorage(3) as storage:
        scalars.put({"a/b": torch.tensor(0.5, requires_grad=True), "c": torch.tensor(7)})
        assert logged(storage) == {"a/b": 0.5, "c": 7}
        scalars.put({"none": torch.tensor(float("nan"))})
        assert "none" not in logged(storage)


def test_deferred_values_arrive_as_their_mean_when_the_writers_run():
    scalars = DeferredScalars(period=4, defer=True)
    with EventStorage(0) as storage:
        for value in (1.0, 2.0, float("nan"), 6.0):
            assert logged(storage) == {}
            scalars.put({"a": torch.tensor(value)})
            scalars.put({"b": torch.tensor(float("nan"))})
            storage.step()
        assert logged(storage) == {"a": 3.0}
        # Nothing of it is counted again.
        for value in (10.0, 10.0, 10.0, 20.0):
            scalars.put({"a": torch.tensor(value)})
            storage.step()
        assert logged(storage) == {"a": 12.5}


def test_the_last_iteration_before_the_writers_is_the_right_one():
    """Detectron2's PeriodicWriter writes where (iteration + 1) % period is 0."""
    scalars = DeferredScalars(period=20, defer=True)
    with EventStorage(18) as storage:
        scalars.put({"a": torch.tensor(1.0)})
        assert not storage.latest()
        storage.step()
        scalars.put({"a": torch.tensor(3.0)})
        assert storage.latest()["a"] == (2.0, 19)


def test_period_is_checked():
    with pytest.raises(ValueError, match="period must be at least 1, got 0"):
        DeferredScalars(period=0)
