#!/usr/bin/env python
"""
What threads and the memory allocator do to a training step on a CPU.

The step is that of training_step.py: forward and backward of the whole R50-FPN model with teacher
and student ("interact"). A setting is a few environment variables, which count from the start of a
process, so every measurement is a process of its own, and a round has one of each setting. Beside
the ratio of the time per step stand the share of it that the kernel took (system time) and the page
faults: each big activation that the allocator gives back to the system comes back as empty pages,
which the kernel has to clear.

  one_thread, two_threads   OMP_NUM_THREADS, the allocator of the C library as it is
  keep_memory               MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_: the C library keeps what
                            is freed; --threads threads, as all that follow
  huge_pages                GLIBC_TUNABLES=glibc.malloc.hugetlb=1: pages of 2 MiB where it can
  keep_memory_huge_pages    both
  torch_huge_pages          THP_MEM_ALLOC_ENABLE=1: PyTorch asks for pages of 2 MiB for big tensors
  jemalloc, tcmalloc        LD_PRELOAD of the library, if the system has it
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from models import make_cfg
from paired import describe_machine, ratios_to
from tabulate import tabulate
from tqdm import tqdm
from training_batches import read_batches, step
from training_step import build_models, parse_args

BASELINE = "default"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SETTINGS = {
    BASELINE: {},
    "one_thread": {"OMP_NUM_THREADS": "1"},
    "two_threads": {"OMP_NUM_THREADS": "2"},
    "keep_memory": KEEP_MEMORY,
    "huge_pages": HUGE_PAGES,
    "keep_memory_huge_pages": {**KEEP_MEMORY, **HUGE_PAGES},
    "torch_huge_pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "jemalloc": "jemalloc",
    "tcmalloc": "tcmalloc_minimal",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", nargs="+", choices=SETTINGS, metavar="NAME", help="default: all there are")
    add("--threads", default="1", help="of the settings that name none (default: %(default)s)")
    add("--rounds", type=int, default=3, help="processes per setting (default: %(default)s)")
    add("--steps", type=int, default=5, help="timed in each, after 2 (default: %(default)s)")
    add("--size", default="320", help="short side of the image (default: %(default)s)")
    add("--opts", nargs="*", default=[], help="KEY VALUE overrides of the config")
    add("--measure-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure_here:
        print(json.dumps(measure(args)))
        return 0
    chosen = args.settings or list(SETTINGS)
    settings = {x: environment_of(x) for x in dict.fromkeys([BASELINE, *chosen])}
    for name in [x for x, values in settings.items() if values is None]:
        print(f"{name}: the library is not there")
        del settings[name]
    command = [sys.executable, *sys.argv, "--measure-here"]
    if argv is not None:
        command = [sys.executable, __file__, *argv, "--measure-here"]
    measured = {name: [] for name in settings}
    jobs = [name for k in range(args.rounds) for name in list(settings)[:: 1 if k % 2 else -1]]
    for name in tqdm(jobs, desc="Processes", unit="process"):
        environment = {**os.environ, "OMP_NUM_THREADS": args.threads, **settings[name]}
        output = subprocess.run(  # nosec B603  # This file, in this interpreter.
            command, env=environment, check=True, capture_output=True, text=True
        )
        measured[name].append(json.loads(output.stdout.splitlines()[-1]))
    print_table(measured)
    return 0


def environment_of(name: str) -> dict[str, str] | None:
    """The variables of a setting; None if its library is not on this system."""
    values = SETTINGS[name]
    if isinstance(values, dict):
        return values
    library = ctypes.util.find_library(values)
    return {"LD_PRELOAD": library} if library else None


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds, seconds in the kernel and page faults of a step, in this process."""
    options = ["--size", args.size, "--batches", "1", "--batch-size", "1", "--device", "cpu"]
    options = parse_args([*options, "--variants", "interact"])
    options.variants = ["interact"]
    cfg = make_cfg("cpu", ["MODEL.PSEUDO_MASK.WARMUP_ITERS", 0, *args.opts])
    (batch,), _ = read_batches(cfg, options.dataset, 1, 1, options.size)
    model = build_models(cfg, options, batch)["interact"]
    for _ in range(2):
        step(model, batch)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(args.steps):
        step(model, batch)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds / args.steps,
        "system": (after.ru_stime - before.ru_stime) / args.steps,
        "faults": (after.ru_minflt - before.ru_minflt) / args.steps,
        "memory": after.ru_maxrss / 2**10,
    }


def print_table(measured: dict[str, list[dict[str, float]]]) -> None:
    """Medians over the rounds, and the ratio of the time to that of the default."""
    seconds = {name: [x["seconds"] for x in rounds] for name, rounds in measured.items()}
    rows = []
    for name, ratios in ratios_to(seconds, BASELINE).items():
        medians = {
            key: statistics.median(x[key] for x in measured[name]) for key in measured[name][0]
        }
        rows.append(
            [
                name,
                f"{1000 * medians['seconds']:.0f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} - {max(ratios):.3f}",
                f"{1000 * medians['system']:.0f}",
                f"{medians['faults']:.0f}",
                f"{medians['memory']:.0f}",
            ]
        )
    header = ["", "ms per step", "ratio", "range", "ms in the kernel", "page faults", "peak MiB"]
    print(tabulate(rows, header, disable_numparse=True))
    print(f"{len(seconds[BASELINE])} processes of each setting; the ratio is of the wall clock")
    print(describe_machine())


if __name__ == "__main__":
    raise SystemExit(main())
