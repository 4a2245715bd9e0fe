"""The wheel: with what it holds, everything runs outside the repository."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAM = """
from pathlib import Path
import teacher_student_mask
from teacher_student_mask import training, trained_model
assert Path(teacher_student_mask.__file__).parts[-3] == "wheel"
for config, changes in training.PRESETS.values():
    opts = [x for pair in changes.items() for x in pair]
    trained_model.read_config(str(training.CONFIGS / config), opts)
from teacher_student_mask.cli.demo import CONFIGS, MODELS
assert all((CONFIGS / f"{x}.yaml").is_file() for x in MODELS)
assert (training.CONFIGS / "seen_sets/seen_20.json").is_file()
"""


@pytest.mark.slow
def test_the_wheel_holds_configs_and_templates(tmp_path):
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True)
    source = tmp_path / "source"
    for name in filter(None, files.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_symlink():
            target.symlink_to(os.readlink(REPOSITORY / name))
        elif (REPOSITORY / name).is_file():
            target.write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    url = "https://example.com/project"
    environment = {**os.environ, "PROJECT_URL": url}
    command = [*pip, str(source), "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
        assert any(x.endswith("templates/report.html.j2") for x in archive.namelist())
    (metadata,) = (tmp_path / "wheel").glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert f"Project-URL: Homepage, {url}\n" in text
    assert (
        f"![photograph, ground truth, baseline, teacher-student]({url}/raw/HEAD/docs/photos.jpg)"
        in text
    )
    assert f"[docs/PYTHON.md]({url}/blob/HEAD/docs/PYTHON.md)" in text
    assert not re.search(r"\]\((?!https?:|#)", text)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "wheel")}
    run = {"cwd": tmp_path, "env": environment, "check": True}
    subprocess.run([sys.executable, "-c", PROGRAM], **run)
    command = [sys.executable, "-m", "teacher_student_mask", "--version"]
    first, *others = subprocess.run(
        command, **run, capture_output=True, text=True
    ).stdout.splitlines()
    assert first.startswith("tsmask 0.1.0, Python 3.")
    assert others[0].startswith("torch ") and others[1].startswith("Detectron2 ")
