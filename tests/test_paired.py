"""Timing in turns: the order, what counts, and the ratios, without looking at a time."""

import pytest
from benchmark_parts import load_benchmark_part

paired = load_benchmark_part("paired")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a program turns it."""
    now = [0.0]
    monkeypatch.setattr(paired.time, "perf_counter", lambda: now[0])
    return now


def test_the_order_turns_round_each_round():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    paired.time_in_turns(programs, rounds=2, warmup=1)
    assert "".join(calls) == "abc" + "cba" + "abc"


def test_every_program_has_its_own_time_and_warmup_does_not_count(clock):
    durations = {"a": iter([100.0, 1.0, 2.0]), "b": iter([100.0, 3.0, 8.0])}

    def program(name):
        clock[0] += next(durations[name])

    seconds = paired.time_in_turns({name: lambda n=name: program(n) for name in "ab"}, rounds=2)
    assert seconds == {"a": [1.0, 2.0], "b": [3.0, 8.0]}


def test_without_warmup_the_first_round_counts():
    calls = []
    seconds = paired.time_in_turns({"a": lambda: calls.append("a")}, rounds=3, warmup=0)
    assert len(calls) == len(seconds["a"]) == 3


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_round_is_refused(rounds):
    with pytest.raises(ValueError, match=f"rounds must be at least 1, got {rounds}"):
        paired.time_in_turns({"a": lambda: None}, rounds)


def test_ratios_are_taken_within_each_round():
    values = {"base": [1.0, 2.0, 4.0], "other": [3.0, 2.0, 1.0]}
    assert paired.ratios_to(values, "base") == {
        "base": [1.0, 1.0, 1.0],
        "other": [3.0, 1.0, 0.25],
    }


def test_the_ratio_is_the_median_of_ratios_not_the_ratio_of_medians(capsys):
    # Medians 2 and 3, but in two of three rounds the other took as long or less.
    paired.print_ratios({"base": [1.0, 2.0, 8.0], "other": [4.0, 2.0, 3.0]}, "base")
    lines = capsys.readouterr().out.splitlines()
    (row,) = [x.split() for x in lines if x.startswith("other")]
    assert row[1:3] == ["3000.0", "1.000"]
    assert "0.375 - 4.000" in " ".join(row)
    assert "ratio" in lines[0]


def test_one_round_is_printed_and_the_machine_is_named(capsys):
    paired.print_ratios({"base": [2.0], "other": [3.0]}, "base")
    output = capsys.readouterr().out
    assert "1.500 - 1.500" in output
    assert "CPUs" in output and "torch" in output
