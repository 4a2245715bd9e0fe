"""What a sweep writes down: run.json in the folder of each run, and results.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from environment.description import describe_detectron2, version_of
from sweeps.configs import OWN_KEYS, UsageError
from sweeps.runs import Run
from sweeps.training_jobs import REPOSITORY
from teacher_student_mask.engine import open_atomically

__all__ = [
    "append_row",
    "check_settings",
    "finished_row",
    "has_all_evaluations",
    "read_rows",
    "record_seconds",
    "record_start",
]

PACKAGES = ("teacher-student-mask", "torch", "torchvision", "numpy", "pycocotools")
# Runs of one line of the summary may differ in these keys alone.
FREE_KEYS = {*OWN_KEYS, "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "VIS_PERIOD"}


def check_settings(runs: Iterable[Run]) -> None:
    """
    Compare the runs with those that are there already of the same config and seen set, any seed.

    Raises:
        UsageError: other settings, or a folder that no sweep has made.
    """
    for run in runs:
        folder = run.training.folder
        if (folder / "results.json").is_file() and not _run_file(run).is_file():
            raise UsageError(f"{folder} has results but no run.json: no sweep has made them.")
        for path in sorted(folder.parent.glob("seed_*/run.json")):
            earlier = json.loads(path.read_text())["settings"]
            # A key that only one of the two has came with another version of the code.
            different = [
                f"{key} is {value!r}, there {earlier[key]!r}"
                for key, value in run.settings.items()
                if key in earlier and key not in FREE_KEYS and value != earlier[key]
            ]
            if different:
                raise UsageError(
                    f"{path.parent} was run with other settings: {'; '.join(different[:5])}. Give "
                    f"another --output-dir, or remove {folder.parent}."
                )


def record_start(run: Run, hardware: dict) -> None:
    """
    Write run.json, and the list that its evaluation needs.

    Args:
        run: about to be started.
        hardware: {name: value} of what the caller knows; the machine's own is added.
    """
    if not run.training.is_done():
        path = _run_file(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = json.loads(path.read_text()) if path.is_file() else {"seconds": 0.0, "facts": {}}
        facts = {
            **run.facts,
            "commit": _join(earlier["facts"].get("commit"), _commit()),
            "versions": _versions(),
            "hardware": {**_machine(), **hardware},
        }
        _write_json(path, {**earlier, "facts": facts, "settings": run.settings})
    if run.evaluation is not None:
        run.evaluation.folder.mkdir(parents=True, exist_ok=True)
        _write_json(run.evaluation.folder / "seen_classes.json", run.always_unseen.others)


def record_seconds(run: Run, seconds: float) -> None:
    """Add to the time that its training has taken."""
    record = json.loads(_run_file(run).read_text())
    _write_json(_run_file(run), {**record, "seconds": record["seconds"] + seconds})


def finished_row(run: Run) -> dict:
    """The line of results.jsonl of a run that is done; what is undefined is None."""
    record = json.loads(_run_file(run).read_text())
    always_unseen = None
    if run.always_unseen is not None:
        job = run.evaluation or run.training
        always_unseen = {"classes": run.always_unseen.classes, "results": _results_of(job.folder)}
    return {
        **record["facts"],
        "seconds": round(record["seconds"], 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "results": _results_of(run.training.folder),
        "always_unseen": always_unseen,
        "gt_boxes": {head: _results_of(job.folder) for head, job in run.gt_boxes.items()} or None,
    }


def has_all_evaluations(row: dict, run: Run) -> bool:
    """Whether a line of results.jsonl has the evaluations that the run asks for."""
    if not set(run.gt_boxes) <= set(row.get("gt_boxes") or {}):
        return False
    if run.always_unseen is None:
        return True
    found = row["always_unseen"]
    return found is not None and found["classes"] == run.always_unseen.classes


def read_rows(path: Path) -> dict[str, dict]:
    """
    Read results.jsonl.

    Returns:
        {run: its last line}, empty if there is no file.

    Raises:
        UsageError: a line that is not a result.
    """
    rows = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            # In the order of the file, a repeated one where it comes last.
            rows.pop(row["run"], None)
            rows[row["run"]] = row
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}, line {number} is not the result of a run: {line[:60]!r}. Remove the "
                "line; its run is then added again."
            ) from None
    return rows


def append_row(path: Path, row: dict) -> dict:
    """Append a line to results.jsonl and return the row."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    return row


def _run_file(run: Run) -> Path:
    return run.training.folder / "run.json"


def _results_of(folder: Path) -> dict:
    return _without_nan(json.loads((folder / "results.json").read_text()))


def _without_nan(value):
    # NaN is not json, although Python's module writes it.
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_json(path: Path, value) -> None:
    with open_atomically(path) as f:
        f.write(json.dumps(value, indent=2) + "\n")


def _join(commits: str | None, commit: str | None) -> str | None:
    # A run that was interrupted may go on with another commit: both are named.
    known = commits.split(", ") if commits else []
    return ", ".join([*known, *([commit] if commit and commit not in known else [])]) or None


def _commit() -> str | None:
    # Of this repository, with "-dirty" where files differ from it; None without git.
    command = [
        "git",
        "--no-optional-locks",
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    with contextlib.suppress(OSError):
        result = subprocess.run(  # nosec B603  # The list above, without a shell.
            command, cwd=REPOSITORY, capture_output=True, text=True
        )
        if result.returncode == 0:
            return result.stdout.strip()
    return None


def _versions() -> dict:
    versions = {name: version_of(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "detectron2": describe_detectron2(sys.prefix),
    }


def _machine() -> dict:
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
