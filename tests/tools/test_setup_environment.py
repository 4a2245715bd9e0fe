"""Tests of the set-up program: no network, nothing installed, every outside fact injected."""

import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import sys
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

import detectron2_wheel
import setup_environment
from detectron2_wheel import SetupError
from setup_environment import Environment

DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])

PACKAGE_FILES = {
    "LICENSE": "Apache License\n",
    "setup.py": "raise SystemExit\n",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/data/transforms/transform.py": "a = Image.LINEAR\nb = cv2.INTER_LINEAR\n",
    "detectron2/evaluation/coco_evaluation.py": (
        "COCOeval = object\nfrom detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    ),
    "detectron2/layers/nms.py": (
        "def nms_rotated(*args):\n    return torch.ops.detectron2.nms_rotated(*args)\n"
    ),
    "detectron2/projects/__init__.py": "import nothing_of_the_kind\n",
    "projects/PointRend/point_rend/__init__.py": "",
}


def build(folder, changes=None):
    """Build the wheel of a small source distribution; `changes` replaces files, None removes."""
    sdist = folder / "pb1-detectron2-0.6.tar.gz"
    # Without the time of day, which the gzip module writes otherwise.
    with (
        gzip.GzipFile(sdist, "wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name, text in {**PACKAGE_FILES, **(changes or {})}.items():
            if text is not None:
                entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    return detectron2_wheel.build_wheel(sdist, folder, digest)


def read_wheel(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_wheel_holds_the_patched_package_without_its_projects(tmp_path):
    path = build(tmp_path)
    files = read_wheel(path)
    assert {name for name in files if ".dist-info/" not in name} == {
        "detectron2/__init__.py",
        "detectron2/_C.py",
        "detectron2/data/transforms/transform.py",
        "detectron2/evaluation/coco_evaluation.py",
        "detectron2/layers/nms.py",
    }
    lines = files["detectron2/data/transforms/transform.py"].splitlines()
    assert lines[0].startswith("# Modified by TeacherStudentMask: ")
    assert lines[1:] == ["a = Image.BILINEAR", "b = cv2.INTER_LINEAR"]
    names = {}
    exec(files["detectron2/evaluation/coco_evaluation.py"], names)
    assert names["COCOeval_opt"] is names["COCOeval"]
    content = path.read_bytes()
    assert build(tmp_path).read_bytes() == content  # the same bytes every time


def test_pip_can_install_the_wheel(tmp_path):
    path = build(tmp_path)
    files = read_wheel(path)
    record_name = f"{detectron2_wheel.DIST_INFO}/RECORD"
    rows = {row[0]: row[1:] for row in csv.reader(files[record_name].splitlines())}
    assert set(rows) == set(files) and rows.pop(record_name) == ["", ""]
    assert all(int(size) == len(files[name]) for name, (_, size) in rows.items())
    (distribution,) = importlib.metadata.distributions(path=[str(path)])
    assert distribution.metadata["Name"] == "detectron2"
    assert path.name == f"detectron2-{distribution.version}-py3-none-any.whl"
    assert distribution.requires == list(detectron2_wheel.REQUIREMENTS)


def test_another_source_distribution_is_refused(tmp_path):
    with pytest.raises(SetupError, match="LICENSE"):
        build(tmp_path, {"LICENSE": None})
    for text, count in (("a = 1\n", 0), ("a = Image.LINEAR\nb = Image.LINEAR\n", 2), (None, 0)):
        with pytest.raises(SetupError, match=rf"transform.py cannot be adapted.* {count} times"):
            build(tmp_path, {"detectron2/data/transforms/transform.py": text})
    with pytest.raises(SetupError, match="SHA-256 is .* not 5d2e9e51"):
        detectron2_wheel.build_wheel(tmp_path / "pb1-detectron2-0.6.tar.gz", tmp_path)


@pytest.mark.parametrize("version", [(3, 9, 20), (3, 14, 0)])
def test_what_a_machine_may_lack(tmp_path, monkeypatch, version):
    usage = DiskUsage(100e9, 94e9, 6e9)
    monkeypatch.setattr(setup_environment.shutil, "disk_usage", lambda path: usage)
    setup_environment.check_machine(tmp_path, needs_space=False)
    with pytest.raises(SetupError, match=r"6\.0 GB free.*7 GB"):
        setup_environment.check_machine(tmp_path / "not/there", needs_space=True)
    with monkeypatch.context() as patch:
        patch.setattr(setup_environment.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SetupError, match="no module venv.*python3-venv"):
            setup_environment.check_machine(tmp_path, needs_space=False)
    monkeypatch.setattr(setup_environment.sys, "version_info", version)
    with pytest.raises(SetupError, match="wheels for 3.10 to 3.13 only.*PYTHON="):
        setup_environment.check_machine(tmp_path, needs_space=False)


def test_an_environment_of_another_python_or_a_folder_of_other_things_is_left_alone(
    tmp_path, capsys
):
    environment = Environment(tmp_path / ".venv", run=None)
    environment.python.parent.mkdir(parents=True)
    environment.python.touch()
    config = environment.folder / "pyvenv.cfg"
    config.write_text("home = /usr/bin\nversion = 3.1.4\n")
    with pytest.raises(SetupError, match="made with Python 3.1, this is 3.*--force"):
        environment.create()
    config.write_text("version_info = {}.{}.0\n".format(*sys.version_info))
    environment.create()
    config.unlink()
    assert setup_environment.main(["--venv", str(environment.folder)]) == 1
    assert "is not a virtual environment" in capsys.readouterr().err


class FakeEnvironment(Environment):
    """Notes what is asked of it; `failing` names words of pip commands that fail."""

    def __init__(self, importable=False, failing=()):
        super().__init__(Path("nowhere"))
        self.importable, self.failing, self.commands = importable, failing, []

    def pip(self, *arguments):
        self.commands.append(" ".join(arguments))
        if arguments[0] == "download":
            self.downloaded = Path(arguments[arguments.index("-r") + 1]).read_text()
        if any(word in self.commands[-1] for word in self.failing):
            raise SetupError("pip failed")
        self.importable = self.importable or arguments[0] == "install"

    def imports_detectron2(self):
        return self.importable

    @property
    def installed(self):
        return [c.split()[-1] for c in self.commands if c.startswith("install")]


OFFICIAL = f"git+{detectron2_wheel.OFFICIAL_URL}@{detectron2_wheel.OFFICIAL_COMMIT}"


@pytest.fixture
def reachable(monkeypatch):
    """A machine with a compiler that reaches everything."""
    monkeypatch.setattr(setup_environment, "missing_build_tool", lambda: None)
    monkeypatch.setattr(setup_environment, "check_reachable", lambda url: None)
    monkeypatch.setattr(detectron2_wheel, "build_wheel", lambda *args: Path("detectron2.whl"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("sdist.tar.gz")])


@pytest.mark.parametrize(
    "environment, requested, installed, printed",
    [
        (FakeEnvironment(importable=True), None, [], "kept"),
        (FakeEnvironment(importable=True), "../mine", ["../mine"], "from ../mine"),
        (FakeEnvironment(importable=True), "pure-python", ["detectron2.whl"], "from detectron2"),
        (FakeEnvironment(), None, [OFFICIAL], "from git"),
        (FakeEnvironment(failing=["git+"]), None, [OFFICIAL, "detectron2.whl"], "(pip )?failed"),
    ],
)
def test_sources_of_detectron2(environment, requested, installed, printed, reachable, capsys):
    setup_environment.install_detectron2(environment, requested)
    assert environment.installed == installed and printed.split("(")[0] in capsys.readouterr().out


def test_without_a_compiler_the_pure_python_wheel_is_taken(reachable, monkeypatch, capsys):
    monkeypatch.setattr(setup_environment, "missing_build_tool", lambda: "no C++ compiler")
    environment = FakeEnvironment()
    setup_environment.install_detectron2(environment)
    assert environment.installed == ["detectron2.whl"]
    assert "not from the official source: no C++ compiler" in capsys.readouterr().out
    # Who asks for the official one does not get the other.
    with pytest.raises(SetupError, match=r"no C\+\+ compiler.*--detectron2"):
        setup_environment.install_detectron2(FakeEnvironment(), "official")


def test_a_second_run_does_nothing_until_its_inputs_change(tmp_path, monkeypatch, capsys):
    made, tried = [], []
    monkeypatch.setattr(setup_environment, "set_up", lambda environment, args: made.append(1))
    monkeypatch.setattr(setup_environment, "install_part", lambda _, part: tried.append(part))
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(setup_environment, "ROOT", tmp_path)
    options = ["--venv", str(tmp_path)]
    assert setup_environment.main([*options, "--with", "crf"]) == 0
    assert setup_environment.main([*options, "--with", "crf", "export"]) == 0
    assert (len(made), tried) == (1, ["crf", "export"])
    assert "up to date" in capsys.readouterr().out
    (tmp_path / "setup.cfg").write_text("b")
    setup_environment.main(options)
    setup_environment.main([*options, "--detectron2", "official"])
    setup_environment.main([*options, "--detectron2", "official"])
    assert len(made) == 3
    assert json.loads((tmp_path / "setup-stamp.json").read_text())["detectron2"] == "official"


def test_parts_that_cannot_be_had_are_left_out(monkeypatch, capsys):
    environment = FakeEnvironment()
    setup_environment.install_part(environment, "export")
    assert environment.commands[-1].endswith("onnx onnxruntime")
    assert "constraints.txt" in environment.commands[-1]
    setup_environment.install_part(FakeEnvironment(failing=["gradio"]), "app")
    assert "left out: pip failed" in capsys.readouterr().out
    monkeypatch.setattr(setup_environment.shutil, "which", lambda name: None)
    environment = FakeEnvironment()
    setup_environment.install_part(environment, "crf")
    assert environment.commands == []
    assert "there is no C++ compiler" in capsys.readouterr().out


def test_the_download_names_the_hash(reachable):
    environment = FakeEnvironment()
    setup_environment.install_detectron2(environment, "pure-python")
    line = f"pb1-detectron2==0.6 --hash=sha256:{detectron2_wheel.SDIST_SHA256}\n"
    assert environment.downloaded == line
