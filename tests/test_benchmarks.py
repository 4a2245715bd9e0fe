"""Each benchmark runs from end to end on a small input; no time is looked at."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from forked_programs import run_program

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY_MODEL = (
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.FPN.OUT_CHANNELS 16 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16 "
    "MODEL.TEACHER_MASK_HEAD.CONV_DIM 16 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 "
    "MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20"
)
SMALL = {
    "analysis.py": "--images 20 --objects 120 --detections 600 --resamples 5 --rounds 1",
    "annotation_checks.py": "--images 20 --objects 120 --rounds 1",
    "cpu_settings.py": "--settings keep_memory --rounds 1 --steps 1 --size 64 "
    f"--opts {TINY_MODEL}",
    "dense_crf.py": "--objects 3 --batch-sizes 2 --rounds 1 --side 14",
    "evaluation.py": "--images 20 --objects 120 --detections 600 --rounds 1",
    "inference.py": f"--device cpu --sizes 64 --num-images 2 --rounds 1 --opts {TINY_MODEL}",
    "loading.py": "--dataset coco_2017_val --images 3 --rounds 1",
    "mask_head_variants.py": "--device cpu --rois 3 --rounds 1 "
    f"--variants channels_last autocast both recompute --opts {TINY_MODEL}",
    "methods.py": "--methods teacher_student shapeprop mask_x --device cpu --size 64 --batches 1 "
    f"--foreground 4 --num-images 1 --rounds 1 --opts {TINY_MODEL}",
    "pseudo_masks.py": "--device cpu --rois 2 --rounds 1",
    "startup.py": "--rounds 1 --warmup 0 --slowest 3",
    "training_step.py": "--device cpu --size 64 --batches 2 --batch-size 1 --foreground 4 "
    "--rounds 1 --variants interact none box_fit capped --mask-branch --profile "
    f"--opts {TINY_MODEL}",
}
# What the scripts import.
PARTS = {
    "coco_data.py",
    "memory.py",
    "models.py",
    "paired.py",
    "synthetic_coco.py",
    "training_batches.py",
}


def test_every_benchmark_is_tested():
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - PARTS
    assert scripts == set(SMALL)


@functools.lru_cache(None)
def output_of(name):
    with tempfile.NamedTemporaryFile() as file:
        code = run_program(BENCHMARKS / name, SMALL[name].split(), file.name)
        output = Path(file.name).read_text()
    assert code == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_benchmark_runs(name):
    if name == "dense_crf.py":
        pytest.importorskip("pydensecrf", reason="compares with the optional package pydensecrf2")
    output = output_of(name)
    assert "ratio" in output and "CPUs" in output


@pytest.mark.slow
def test_the_analysis_reads_the_files_that_pycocotools_reads():
    lines = output_of("analysis.py").splitlines()
    (line,) = [x for x in lines if x.startswith("AP of pycocotools")]
    first, second = (float(x.split()[-1]) for x in line.split(", of the "))
    assert first == pytest.approx(second, abs=1e-9) and first > 0


@pytest.mark.slow
def test_the_benchmarks_compare_models_that_find_the_same():
    output = output_of("inference.py")
    (line,) = [x for x in output.splitlines() if "detections per image" in x]
    assert float(line.split(": ")[1].split()[0]) > 1
    assert "classes and scores the same" in line and "probabilities equal to 1e-6" in line


@pytest.mark.slow
def test_without_coco_the_benchmarks_say_that_their_images_are_synthetic(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "loading.py"), *SMALL["loading.py"].split()]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert "3 SYNTHETIC images" in result.stdout, result.stderr
    assert "images and boxes differ in 0 of 3 examples" in result.stdout
