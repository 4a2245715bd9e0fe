"""tools/complete_masks.py as programs of their own: several processes, and kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from saved_model import TEACHER_STUDENT, save_model

import complete_masks
from teacher_student_mask.data.shapes import generate_shapes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
NUM_IMAGES = 40


@pytest.fixture
def options(tiny_cfg, tmp_path):
    """The command line without the output: 40 images, no object of half of the classes masked."""
    generate_shapes(str(tmp_path / "shapes"), num_train=0, num_val=NUM_IMAGES, image_size=64)
    data = json.loads((tmp_path / "shapes/annotations/instances_val.json").read_text())
    for annotation in data["annotations"]:
        if annotation["category_id"] % 2:
            annotation["segmentation"] = None
    (tmp_path / "in.json").write_text(json.dumps(data))
    cfg = tiny_cfg(num_classes=len(data["categories"]), opts=TEACHER_STUDENT)
    config_file, weights = save_model(cfg, tmp_path / "model")
    options = ["--config-file", config_file, "--weights", weights, "--annotations"]
    return [*options, str(tmp_path / "in.json"), "--image-root", str(tmp_path / "shapes/val")]


def start(options, output, *arguments):
    command = [sys.executable, str(ROOT / "tools/complete_masks.py"), *options]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--output", str(output), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_write_the_bytes_of_one(options, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    ranking = [tmp_path / "one.csv", tmp_path / "two.csv"]
    process = start(options, two, "--num-gpus", "2", "--rank", str(ranking[1]))
    assert complete_masks.main([*options, "--output", str(one), "--rank", str(ranking[0])]) == 0
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "of process 1 of 2" in text
    assert two.read_bytes() == one.read_bytes()
    assert ranking[1].read_bytes() == ranking[0].read_bytes()


def test_an_error_of_one_process_ends_both_and_is_said(options, tmp_path):
    data = json.loads((tmp_path / "in.json").read_text())
    # The second process has every other image; both kinds are broken.
    for image in data["images"][2:6]:
        (tmp_path / "shapes/val" / image["file_name"]).write_bytes(b"no image")
    process = start(options, tmp_path / "out.json", "--num-gpus", "2")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "--skip-broken-images" in text
    assert not (tmp_path / "out.json").exists()


def test_a_killed_run_goes_on_with_the_same_bytes(options, tmp_path):
    out, whole = tmp_path / "out.json", tmp_path / "whole.json"
    process = start(options, out)
    part = tmp_path / "out.json.parts/rank-00000.jsonl"
    while process.poll() is None and not (part.is_file() and part.stat().st_size > 1000):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists()
    finished = part.read_bytes().count(b'"image"')
    assert 1 <= finished < NUM_IMAGES
    assert complete_masks.main([*options, "--output", str(out)]) == 0
    assert complete_masks.main([*options, "--output", str(whole)]) == 0
    assert out.read_bytes() == whole.read_bytes()
