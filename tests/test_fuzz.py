"""
Annotations of all kinds: a training example, or an evaluation, or a sentence.

What is broken could take all memory (a polygon with NaN once took 21 GB), so another process, which
may have no more than its share, does it.
"""

import pytest
from bad_data import run_with_little_memory


@pytest.mark.parametrize("program", ["fuzz_mapper", "fuzz_evaluator"])
def test_any_annotations_are_used_or_refused(program):
    run_with_little_memory(program)
