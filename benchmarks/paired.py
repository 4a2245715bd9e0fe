"""Programs timed in turns: what disturbs the machine then disturbs all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

__all__ = ["describe_machine", "print_ratios", "ratios_to", "time_in_turns"]


def time_in_turns(
    programs: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Run every program once a round, in an order that turns round from one round to the next.

    Args:
        programs: {name: what to call}.
        rounds: that count.
        warmup: rounds before them that do not.

    Returns:
        {name: seconds of each round}, wall clock, including the work that a call leaves on a GPU.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    seconds = {name: [] for name in programs}
    for k in tqdm(range(warmup + rounds), desc="Rounds", unit="round"):
        for name in list(programs) if k % 2 == 0 else reversed(programs):
            _synchronize()
            start = time.perf_counter()
            programs[name]()
            _synchronize()
            if k >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios_to(values: dict[str, list[float]], baseline: str) -> dict[str, list[float]]:
    """
    Divide by the baseline's value of the same round.

    Args:
        values: {name: value of each round}.
        baseline: one of the names.

    Returns:
        {name: ratio of each round}.
    """
    return {
        name: [value / base for value, base in zip(rows, values[baseline])]
        for name, rows in values.items()
    }


def print_ratios(seconds: dict[str, list[float]], baseline: str) -> None:
    """
    Print medians, ratios to the baseline with their quartiles and range, and the machine.

    Args:
        seconds: of :func:`time_in_turns`.
        baseline: name of what the others are compared with.
    """
    rows = []
    for name, ratios in ratios_to(seconds, baseline).items():
        low, _, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        rows.append(
            [
                name,
                f"{1000 * statistics.median(seconds[name]):.1f}",
                f"{statistics.median(ratios):.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
            ]
        )
    header = ["", "median ms", "ratio", "quartiles", "range"]
    print(tabulate(rows, header, disable_numparse=True))
    print(
        f"{len(seconds[baseline])} rounds in turns; the ratio is the median of the rounds' ratios"
    )
    print(describe_machine())


def describe_machine() -> str:
    """One line on CPUs, GPUs, threads and versions."""
    cpu = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
        cpu = models[0] if models else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{os.cpu_count()} CPUs ({cpu}), {torch.get_num_threads()} threads, "
        f"GPUs: {', '.join(gpus) or 'none'}; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
