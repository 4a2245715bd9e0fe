"""README.md: its example runs, and what it names exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image
from tiny_model import TINY_MODEL

from teacher_student_mask import add_teacher_student_mask_config

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 150
IMAGE_SIZE = (80, 64)  # height, width
CHECK = """
assert instances.has("pred_masks"), instances
print("masks of", tuple(instances.pred_masks.shape[1:]))
"""


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def fenced_blocks(text, language=r"\w*"):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def code(text):
    """Lines of the fenced blocks, and what stands between single backticks elsewhere."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced_blocks(text), *re.findall(r"`([^`\n]+)`", prose)])


def write_demo_output(folder):
    """The files that the example reads, with a model that has learned nothing."""
    run = folder / "output/demo/teacher_student_box_fit"
    images = folder / "output/demo/datasets/shapes/val"
    run.mkdir(parents=True)
    images.mkdir(parents=True)
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/shapes/teacher_student_box_fit.yaml"))
    cfg.merge_from_list(
        TINY_MODEL
        + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        + ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
    )
    (run / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, run / "model_final.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(images / "000000.png")


def test_example_runs_in_a_fresh_process(readme, tmp_path):
    examples = [x for x in fenced_blocks(readme, "python") if "DefaultPredictor" in x]
    assert len(examples) == 1
    write_demo_output(tmp_path)
    package = str(ROOT / "projects/TeacherStudentMask")
    paths = [package, *filter(None, [os.getenv("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", examples[0] + CHECK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"masks of {IMAGE_SIZE}" in result.stdout


def test_named_files_exist(readme):
    pattern = r"(?<![\w./-])(?:(?:tools|benchmarks)/\w+\.py|train_net\.py|configs/[\w./-]+\.yaml)"
    named = {x for x in re.findall(pattern, readme) if "..." not in x}
    assert "train_net.py" in named
    assert [x for x in sorted(named) if not (ROOT / x).is_file()] == []


def test_named_make_targets_exist(readme):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|&&|;)\s*make ([a-z][a-z-]*)", code(readme), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert sorted(named - targets) == []


def test_length(readme):
    # Without the marks of tests/docs_commands.py, which readers do not see.
    lines = [x for x in readme.splitlines() if not x.lstrip().startswith("<!-- not run:")]
    assert len(lines) <= MAX_LINES


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    tests = list((ROOT / "tests").rglob("*.py"))
    functions = set()
    for path in tests:
        functions |= set(re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40 and named <= functions, named - functions
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
