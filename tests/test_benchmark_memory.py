"""Counted memory of tensors whose sizes are known."""

import torch
from benchmark_parts import load_benchmark_part

KIB = 1024
memory = load_benchmark_part("memory")


def kib(count):
    return torch.ones(count * KIB, dtype=torch.uint8)


def test_what_lives_at_the_same_time_is_added_and_what_is_freed_is_not():
    with memory.CountStorages() as count:
        first = kib(4)
        del first
        second, third = kib(1), kib(2)
        assert count.live == 3 * KIB
        del second, third
    assert count.peak == 4 * KIB and count.live == 0


def test_views_and_writing_in_place_take_nothing():
    given = kib(8)
    with memory.CountStorages() as count:
        given.add_(1)
        view = given[3:].view(-1)
        made = kib(1)
        also_made = made.mul_(2)[5:]
        del made
        assert count.live == count.peak == KIB
    assert len(view) > len(also_made)


def test_a_tensor_lives_as_long_as_a_view_of_it():
    with memory.CountStorages() as count:
        view = kib(4)[:1]
        assert count.live == 4 * KIB
        del view
        assert count.live == 0


def test_what_is_saved_for_backward_counts_until_backward_is_over():
    x = torch.ones(KIB, dtype=torch.float64, requires_grad=True)
    with memory.CountStorages() as count:
        # exp saves its result: 8 KiB each.
        y = x.exp().exp().exp()
        assert count.live == 3 * 8 * KIB
        y.backward(torch.ones_like(x))
        del y
        assert count.live == 8 * KIB  # x.grad
    # The three results, the given gradient, and at the first step its product.
    assert count.peak >= 5 * 8 * KIB


def test_peak_is_above_what_was_there_before():
    kept = []

    def program():
        kept[:] = [kib(2)]
        kib(4)

    # While the second run makes its 2 KiB, those of the first are still there, but not counted.
    assert memory.peak_memory(program, "cpu") == 6 * KIB
