"""Tests of the set-up program: no network, nothing installed, every outside fact injected."""

import csv
import gzip
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
    """Build the wheel of a small source distribution; `changes` replaces files."""
    sdist = folder / "pb1-detectron2-0.6.tar.gz"
    # Without the time of day, which the gzip module writes otherwise.
    with (
        gzip.GzipFile(sdist, "wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name, text in {**PACKAGE_FILES, **(changes or {})}.items():
            entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return detectron2_wheel.build_wheel(sdist, folder)


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


def test_a_change_that_finds_no_place_is_an_error(tmp_path):
    with pytest.raises(SetupError, match="transform.py does not hold 'Image.LINEAR'"):
        build(tmp_path, {"detectron2/data/transforms/transform.py": "a = 1\n"})


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0)])
def test_what_a_machine_may_lack(tmp_path, monkeypatch, version):
    usage = DiskUsage(100e9, 94e9, 6e9)
    monkeypatch.setattr(setup_environment.shutil, "disk_usage", lambda path: usage)
    setup_environment.check_machine(tmp_path, needs_space=False)
    with pytest.raises(SetupError, match=r"6\.0 GB free.*7 GB"):
        setup_environment.check_machine(tmp_path / "not/there", needs_space=True)
    monkeypatch.setattr(setup_environment.sys, "version_info", version)
    with pytest.raises(SetupError, match="wheels for 3.11 to 3.13 only.*PYTHON="):
        setup_environment.check_machine(tmp_path, needs_space=False)


def test_an_environment_of_another_python_or_a_folder_of_other_things_is_left_alone(
    tmp_path, capsys
):
    environment = Environment(tmp_path / ".venv")
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


def test_what_python_says_is_shown_and_no_half_made_environment_stays(tmp_path, monkeypatch):
    python = tmp_path / "python"
    made = 'mkdir -p "$3/bin"; touch "$3/pyvenv.cfg" "$3/bin/python"'
    python.write_text(f"#!/bin/sh\n{made}\necho there is no ensurepip; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    environment = Environment(tmp_path / ".venv")
    with pytest.raises(SetupError, match="there is no ensurepip"):
        environment.create()
    assert not environment.folder.exists()


def test_git_may_be_missing_or_reach_nothing(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match="cannot be reached: .*nothing.* exit status"):
        setup_environment.check_reachable(str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="'git'"):
        setup_environment.check_reachable(str(tmp_path))


class FakeEnvironment(Environment):
    """Notes what is asked of it; pip fails on `failing`, and `broken` cannot be imported."""

    def __init__(self, folder="nowhere", importable=False, failing=(), broken=()):
        super().__init__(Path(folder))
        self.importable, self.failing, self.broken = importable, failing, broken
        self.commands = []

    def pip(self, *arguments):
        self.commands.append(" ".join(arguments))
        if arguments[0] == "download":
            self.downloaded = Path(arguments[arguments.index("-r") + 1]).read_text()
        if any(word in self.commands[-1] for word in self.failing):
            raise SetupError("pip failed")
        is_installed = arguments[0] == "install" and arguments[-1] not in self.broken
        self.importable = self.importable or is_installed

    def imports_detectron2(self):
        return self.importable

    @property
    def installed(self):
        return [c.split()[-1] for c in self.commands if c.startswith("install")]


OFFICIAL = f"git+{detectron2_wheel.OFFICIAL_URL}@{detectron2_wheel.OFFICIAL_COMMIT}"


@pytest.fixture
def reachable(monkeypatch):
    """A machine with a compiler that reaches everything."""
    monkeypatch.setattr(setup_environment, "check_build_tools", lambda: None)
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
        (FakeEnvironment(failing=["git+"]), None, [OFFICIAL, "detectron2.whl"], "pip failed"),
        (FakeEnvironment(broken=[OFFICIAL]), None, [OFFICIAL, "detectron2.whl"], "be imported"),
    ],
)
def test_sources_of_detectron2(environment, requested, installed, printed, reachable, capsys):
    setup_environment.install_detectron2(environment, requested)
    assert environment.installed == installed and printed in capsys.readouterr().out


def test_without_a_compiler_the_pure_python_wheel_is_taken(reachable, monkeypatch, capsys):
    def fail():
        raise SetupError("no C++ compiler")

    monkeypatch.setattr(setup_environment, "check_build_tools", fail)
    environment = FakeEnvironment()
    setup_environment.install_detectron2(environment)
    assert environment.installed == ["detectron2.whl"]
    assert "not from official: no C++ compiler" in capsys.readouterr().out
    # Who asks for the official one does not get the other.
    environment = FakeEnvironment()
    with pytest.raises(SetupError, match="--detectron2"):
        setup_environment.install_detectron2(environment, "official")
    assert environment.installed == []


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


def test_parts_that_cannot_be_had_are_left_out(tmp_path, capsys):
    environment = FakeEnvironment(tmp_path)
    setup_environment.install_part(environment, "export")
    install = ["install", "-c", str(setup_environment.CONSTRAINTS), "-e"]
    assert environment.commands == [" ".join([*install, f"{setup_environment.ROOT}[export]"])]
    setup_environment.install_part(FakeEnvironment(failing=["app"]), "app")
    assert "left out: pip failed" in capsys.readouterr().out
    # The pins of an environment that keeps the packages of the interpreter.
    own = tmp_path / "constraints.txt"
    own.touch()
    setup_environment.install_part(environment, "crf")
    assert str(own) in environment.commands[-1]


def test_the_download_names_the_hash(reachable):
    environment = FakeEnvironment()
    setup_environment.install_detectron2(environment, "pure-python")
    line = f"pb1-detectron2==0.6 --hash=sha256:{detectron2_wheel.SDIST_SHA256}\n"
    assert environment.downloaded == line
