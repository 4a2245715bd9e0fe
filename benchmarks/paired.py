"""
Programs timed in turns, also those of two checkouts: what disturbs the machine disturbs all alike.

A benchmark is a script with ``make_programs(args) -> {name: callable}`` that calls :func:`main`.
Each checkout gets a process of its own that imports its package, prepares the programs of this
script, and runs one of them whenever it is told to. With ``--baseline`` there are two such
processes, and in each round a program runs in both before the next one does.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["REPOSITORY", "describe_machine", "main", "on_next", "print_ratios", "time_in_turns"]

REPOSITORY = Path(__file__).resolve().parents[1]
HERE, BASELINE = "this checkout", "baseline"
Programs = dict[str, Callable[[], object]]


def main(
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], object],
    make_programs: Callable[[argparse.Namespace], Programs],
    *,
    rounds: int,
) -> int:
    """
    Run a benchmark from the command line.

    Args:
        description: of the script, for ``--help``.
        add_arguments: adds the script's own arguments to a parser.
        make_programs: called in the process of a checkout, whose folder is ``args.checkout``; the
            first program is what the others of the checkout are compared with. A program may return
            a number to be printed, such as an AP or bytes.
        rounds: default of ``--rounds``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=rounds, help="that count (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (%(default)s)")
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="compare with this one")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        _serve(make_programs, args)
        return 0
    script = sys.modules[make_programs.__module__].__file__
    checkouts = {HERE: args.checkout, **({BASELINE: args.baseline} if args.baseline else {})}
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(_worker(script, checkout.resolve()))
            for name, checkout in checkouts.items()
        }
        names = [x for x in workers[HERE].names if all(x in w.names for w in workers.values())]
        programs = {
            (name, checkout): lambda name=name, worker=worker: worker.run(name)
            for name in names
            for checkout, worker in workers.items()
        }
        seconds = time_in_turns(programs, max(1, args.rounds), args.warmup)
        values = {x: {name: w.values[name] for name in names} for x, w in workers.items()}
    for checkout in checkouts:
        print(f"\n{checkout}, ratio to {names[0]}")
        print_ratios({name: seconds[name, checkout] for name in names}, names[0])
    if args.baseline:
        print(f"\n{HERE} / {args.baseline}")
        for name in names:
            pair = {x: seconds[name, x] for x in (BASELINE, HERE)}
            print(f"{name:32} {_ratio_text(ratios_to(pair, BASELINE)[HERE])}")
    for checkout, found in values.items():
        for name, value in found.items():
            if value is not None:
                print(f"{checkout}, {name}: {value:.10g}")
    print(describe_machine())
    return 0


class _Worker:
    """The process of a checkout, seen from outside."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.names: list[str] = self._read()
        self.values: dict[str, float | None] = {}

    def run(self, name: str) -> float:
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        seconds, self.values[name] = self._read()
        return seconds

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The process of a checkout has ended; its error is above.")
        return json.loads(line)


@contextlib.contextmanager
def _worker(script: str, checkout: Path) -> Iterator[_Worker]:
    paths = [checkout / "projects/TeacherStudentMask", checkout / "tools", os.getenv("PYTHONPATH")]
    process = subprocess.Popen(  # nosec B603  # This interpreter, a script of this folder.
        [sys.executable, script, *sys.argv[1:], "--serve", "--checkout", str(checkout)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(x) for x in paths if x)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield _Worker(process)
    finally:
        process.stdin.close()
        process.wait()


def _serve(make_programs: Callable[[argparse.Namespace], Programs], args) -> None:
    # What programs print goes to stderr; stdout is for the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        programs = make_programs(args)
        print(json.dumps(list(programs)), file=answers, flush=True)
        for line in sys.stdin:
            _synchronize()
            start = time.perf_counter()
            value = programs[line.strip()]()
            _synchronize()
            seconds = time.perf_counter() - start
            value = value if isinstance(value, (int, float)) else None
            print(json.dumps([seconds, value]), file=answers, flush=True)


def time_in_turns(programs: dict, rounds: int, warmup: int = 1) -> dict:
    """
    Run every program once a round, in an order that turns round from one round to the next.

    Args:
        programs: {name: what to call; it returns its seconds}.
        rounds: that count.
        warmup: rounds before them that do not.

    Returns:
        {name: seconds of each round}.
    """
    seconds = {name: [] for name in programs}
    for k in range(warmup + rounds):
        for name in list(programs) if k % 2 == 0 else reversed(programs):
            passed = programs[name]()
            if k >= warmup:
                seconds[name].append(passed)
    return seconds


def ratios_to(values: dict, baseline) -> dict:
    """Divide {name: value of each round} by the baseline's value of the same round."""
    return {
        name: [value / base for value, base in zip(rows, values[baseline])]
        for name, rows in values.items()
    }


def print_ratios(seconds: dict[str, list[float]], baseline: str) -> None:
    """Print medians, and the median of the rounds' ratios to the baseline with their quartiles."""
    for name, ratios in ratios_to(seconds, baseline).items():
        milliseconds = 1000 * statistics.median(seconds[name])
        print(f"{name:32} {milliseconds:10.1f} ms  {_ratio_text(ratios)}")


def _ratio_text(ratios: list[float]) -> str:
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    text = f"ratio {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} - "
    return f"{text}{quartiles[2]:.3f}, {len(ratios)} rounds)"


def on_next(function: Callable, arguments: list[tuple]) -> Callable[[], object]:
    """Make a program that takes the next of some arguments in every round, over and over."""
    rest = itertools.cycle(arguments)
    return lambda: function(*next(rest))


def describe_machine() -> str:
    """One line on CPUs, GPUs, threads and versions."""
    import torch

    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"{os.cpu_count()} CPUs ({cpu}), {torch.get_num_threads()} threads, "
        f"GPUs: {', '.join(gpus) or 'none'}; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
