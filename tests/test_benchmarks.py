"""Each benchmark runs from end to end on a small input; no time is looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = {
    "analysis.py": "--images 20 --objects 120 --detections 600 --resamples 5 --rounds 1",
}


def test_every_benchmark_is_tested():
    # synthetic_coco.py makes data for the others.
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - {"synthetic_coco.py"}
    assert scripts == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs(name):
    command = [sys.executable, str(BENCHMARKS / name), *SMALL[name].split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "ratio" in result.stdout and "CPUs" in result.stdout


@pytest.mark.slow
def test_the_analysis_reads_the_files_that_pycocotools_reads():
    command = [sys.executable, str(BENCHMARKS / "analysis.py"), *SMALL["analysis.py"].split()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    (line,) = [x for x in output.splitlines() if x.startswith("AP of pycocotools")]
    first, second = (float(x.split()[-1]) for x in line.split(", of the "))
    assert first == pytest.approx(second, abs=1e-9) and first > 0
