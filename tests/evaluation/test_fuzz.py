"""
The evaluator on annotations of all kinds: numbers, or a documented error.

As for the mapper, in a process of its own with a limit on its memory.
"""

from bad_data import run_with_little_memory


def test_any_annotations_are_evaluated_or_refused():
    run_with_little_memory("fuzz_evaluator")
