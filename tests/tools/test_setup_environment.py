"""Tests of the set-up program: no network, nothing installed, every outside fact injected."""

import csv
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from base64 import urlsafe_b64decode
from collections import namedtuple
from pathlib import Path

import pytest

import setup_environment
from environment import (
    description,
    detectron2_source,
    detectron2_wheel,
    optional_parts,
    virtual_environment,
)
from environment.detectron2_wheel import SetupError
from environment.virtual_environment import VirtualEnvironment

Result = namedtuple("Result", ["returncode", "stdout", "stderr"])
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


def make_sdist(folder, changes=None):
    """Writes a small source distribution; `changes` replaces files, None removes one."""
    files = {**PACKAGE_FILES, **(changes or {})}
    path = folder / "pb1-detectron2-0.6.tar.gz"
    # Without the time of day, which the gzip module writes otherwise.
    with (
        gzip.GzipFile(path, "wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for name, text in files.items():
            if text is not None:
                entry = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
                entry.size = len(text.encode())
                archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def build(folder, changes=None):
    sdist = make_sdist(folder, changes)
    return detectron2_wheel.build_wheel(
        sdist, folder, hashlib.sha256(sdist.read_bytes()).hexdigest()
    )


def read_wheel(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def load_stub(folder):
    path = folder / "_C.py"
    path.write_text(detectron2_wheel.STUB)
    spec = importlib.util.spec_from_file_location("stub_of_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestWheel:
    def test_holds_the_package_without_its_projects(self, tmp_path):
        files = read_wheel(build(tmp_path))
        assert {name for name in files if ".dist-info/" not in name} == {
            "detectron2/__init__.py",
            "detectron2/_C.py",
            "detectron2/data/transforms/transform.py",
            "detectron2/evaluation/coco_evaluation.py",
            "detectron2/layers/nms.py",
        }

    def test_patches_and_says_so_in_the_file(self, tmp_path):
        files = read_wheel(build(tmp_path))
        lines = files["detectron2/data/transforms/transform.py"].splitlines()
        assert lines[0].startswith("# Modified by TeacherStudentMask: ")
        assert lines[1:] == ["a = Image.BILINEAR", "b = cv2.INTER_LINEAR"]

    def test_evaluation_falls_back_to_pycocotools(self, tmp_path):
        names = {}
        exec(read_wheel(build(tmp_path))["detectron2/evaluation/coco_evaluation.py"], names)
        assert names["COCOeval_opt"] is names["COCOeval"]

    def test_record_lists_every_file_with_its_hash(self, tmp_path):
        files = read_wheel(build(tmp_path))
        record_name = f"{detectron2_wheel.DIST_INFO}/RECORD"
        rows = {row[0]: row[1:] for row in csv.reader(files[record_name].splitlines())}
        assert set(rows) == set(files)
        assert rows.pop(record_name) == ["", ""]
        for name, (digest, size) in rows.items():
            content = files[name].encode()
            assert (
                urlsafe_b64decode(digest[len("sha256=") :] + "=")
                == hashlib.sha256(content).digest()
            )
            assert int(size) == len(content)

    def test_same_bytes_every_time(self, tmp_path):
        assert build(tmp_path).read_bytes() == build(tmp_path).read_bytes()

    def test_pip_knows_name_version_and_requirements(self, tmp_path):
        path = build(tmp_path)
        (distribution,) = importlib.metadata.distributions(path=[str(path)])
        assert distribution.metadata["Name"] == "detectron2"
        assert path.name == f"detectron2-{distribution.version}-py3-none-any.whl"
        assert distribution.requires == list(detectron2_wheel.REQUIREMENTS)

    def test_wrong_hash_is_refused(self, tmp_path):
        sdist = make_sdist(tmp_path)
        with pytest.raises(SetupError, match="SHA-256 is .* not 5d2e9e51"):
            detectron2_wheel.build_wheel(sdist, tmp_path)
        assert not list(tmp_path.glob("*.whl"))

    @pytest.mark.parametrize(
        "text, count",
        [("a = 1\n", 0), ("a = Image.LINEAR\nb = Image.LINEAR\n", 2), (None, 0)],
        ids=["absent", "twice", "no file"],
    )
    def test_unexpected_text_is_refused(self, tmp_path, text, count):
        with pytest.raises(SetupError, match=rf"transform.py cannot be adapted.* {count} times"):
            build(tmp_path, {"detectron2/data/transforms/transform.py": text})

    def test_licence_must_be_there(self, tmp_path):
        with pytest.raises(SetupError, match="LICENSE"):
            build(tmp_path, {"LICENSE": None})


class TestStub:
    def test_an_operator_says_what_to_install(self, tmp_path):
        stub = load_stub(tmp_path)
        with pytest.raises(AttributeError) as error:
            stub.deform_conv_forward(1, 2)
        message = str(error.value)
        assert "detectron2._C.deform_conv_forward" in message
        assert "pure-Python" in message
        assert f"{detectron2_wheel.OFFICIAL_URL}@{detectron2_wheel.OFFICIAL_COMMIT}" in message

    def test_hasattr_and_default_keep_their_meaning(self, tmp_path):
        stub = load_stub(tmp_path)
        assert not hasattr(stub, "nms_rotated")
        assert getattr(stub, "nms_rotated", "default") == "default"

    def test_what_collect_env_asks(self, tmp_path):
        stub = load_stub(tmp_path)
        assert "pure-Python" in stub.get_compiler_version()
        assert "pure-Python" in stub.get_cuda_version()
        assert stub.has_cuda() is False


class TestMachineChecks:
    @pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 13, 2)])
    def test_supported_python(self, version):
        virtual_environment.check_python(version)

    @pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 20), (3, 14, 0)])
    def test_unsupported_python(self, version):
        with pytest.raises(SetupError, match=rf"Python {version[0]}\.{version[1]},.*PYTHON="):
            virtual_environment.check_python(version)

    @pytest.mark.parametrize("missing", ["venv", "ensurepip"])
    def test_missing_venv_module(self, missing):
        def find(name):
            if name == missing:
                raise ImportError(name)

        with pytest.raises(SetupError, match=f"no module {missing}.*python3-venv"):
            virtual_environment.check_venv_module(find)

    def test_little_disk(self, tmp_path):
        def disk_usage(path):
            return DiskUsage(100e9, 94e9, 6e9)

        with pytest.raises(SetupError, match=r"6\.0 GB free.*7 GB"):
            virtual_environment.check_disk(tmp_path / "not" / "there", disk_usage)

    def test_enough_disk(self, tmp_path):
        virtual_environment.check_disk(tmp_path, lambda path: DiskUsage(100e9, 92e9, 8e9))

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler -O2")
        assert "no C++ compiler (no-such-compiler)" in detectron2_source.missing_build_tool()

    def test_no_python_headers(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", Path(sys.executable).name)
        monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
        monkeypatch.setattr(detectron2_source.sysconfig, "get_path", lambda name: str(tmp_path))
        assert "Python.h" in detectron2_source.missing_build_tool()
        (tmp_path / "Python.h").touch()
        assert detectron2_source.missing_build_tool() is None

    def test_environment_of_another_python(self, tmp_path):
        config = "home = /usr/bin\nversion = 3.10.4\n"
        virtual_environment.check_same_python(config, (3, 10, 9), tmp_path)
        with pytest.raises(SetupError, match="made with Python 3.10, this is 3.12.*--force"):
            virtual_environment.check_same_python(config, (3, 12, 0), tmp_path)

    @pytest.mark.parametrize("force", [False, True])
    def test_a_folder_of_other_things_is_left_alone(self, tmp_path, force):
        (tmp_path / "thesis.tex").touch()
        environment = VirtualEnvironment(tmp_path, tmp_path, run=None)
        with pytest.raises(SetupError, match="not a virtual environment"):
            environment.create(clear=force)


class TestPipFailures:
    @pytest.mark.parametrize(
        "output, meaning",
        [
            ("[Errno 28] No space left on device", "disk is full"),
            ("THESE PACKAGES DO NOT MATCH THE HASHES FROM", "expected hash"),
            (
                "NewConnectionError('Temporary failure in name resolution')\n"
                "ERROR: No matching distribution found for torch==2.11.0",
                "index cannot be reached",
            ),
            ("ERROR: No matching distribution found for torch==2.11.0", "no torch==2.11.0 for"),
            ("something new", "output above"),
        ],
    )
    def test_explanation(self, output, meaning):
        assert meaning in virtual_environment.explain_pip_failure(output)

    def test_output_is_shown_on_failure_only(self, tmp_path, capsys):
        results = [Result(0, "all is well", ""), Result(1, "first\nNo space left on device", "")]
        environment = VirtualEnvironment(tmp_path, tmp_path, run=lambda *a, **k: results.pop(0))
        environment.pip("install", "torch")
        assert capsys.readouterr().out == ""
        with pytest.raises(SetupError, match="pip install failed: the disk is full"):
            environment.pip("install", "torch")
        assert "| first" in capsys.readouterr().out


class FakeEnvironment:
    """Notes what is asked of it; `failing` names words of pip commands that fail."""

    python = "python"

    def __init__(self, importable, failing=()):
        self.importable = importable
        self.failing = failing
        self.commands = []
        self.record = None

    def pip(self, *arguments):
        self.commands.append(" ".join(arguments))
        if any(word in self.commands[-1] for word in self.failing):
            raise SetupError("pip failed")
        self.importable = self.importable or arguments[0] == "install"

    def pins(self):
        return ["-c", "constraints.txt"]

    def python_runs(self, code):
        return self.importable

    def write_detectron2_record(self, record):
        self.record = record

    def installed(self):
        return [c.split()[-1] for c in self.commands if c.startswith("install")]


@pytest.fixture
def reachable(monkeypatch):
    """A machine with a compiler that reaches everything."""
    monkeypatch.setattr(detectron2_source, "missing_build_tool", lambda: None)
    monkeypatch.setattr(detectron2_source, "check_reachable", lambda url: None)
    wheel = Path("detectron2.whl")
    monkeypatch.setattr(detectron2_wheel, "build_wheel", lambda sdist, folder: wheel)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("sdist.tar.gz")])


OFFICIAL = f"git+{detectron2_wheel.OFFICIAL_URL}@{detectron2_wheel.OFFICIAL_COMMIT}"


def obtain(environment, requested=None):
    lines = []
    detectron2_source.obtain_detectron2(environment, requested, log=lines.append)
    return "\n".join(lines)


@pytest.mark.usefixtures("reachable")
class TestSources:
    def test_importable_is_kept(self):
        environment = FakeEnvironment(importable=True)
        assert "kept" in obtain(environment)
        assert environment.commands == []
        assert environment.record is None

    @pytest.mark.parametrize("importable", [False, True])
    def test_request_beats_everything(self, importable):
        environment = FakeEnvironment(importable)
        obtain(environment, "../my-detectron2")
        assert environment.installed() == ["../my-detectron2"]
        assert "../my-detectron2" in environment.record["source"]

    def test_failing_request_is_not_replaced(self):
        environment = FakeEnvironment(False, failing=["my-detectron2"])
        with pytest.raises(SetupError):
            obtain(environment, "../my-detectron2")
        assert len(environment.installed()) == 1

    def test_official_comes_first(self):
        environment = FakeEnvironment(False)
        obtain(environment)
        assert environment.installed() == [OFFICIAL]
        assert "--no-build-isolation" in environment.commands[-1]
        assert environment.record["commit"] == detectron2_wheel.OFFICIAL_COMMIT

    def test_pure_python_without_compiler(self, monkeypatch):
        monkeypatch.setattr(detectron2_source, "missing_build_tool", lambda: "no C++ compiler")
        environment = FakeEnvironment(False)
        assert "no C++ compiler" in obtain(environment)
        assert environment.installed() == ["detectron2.whl"]
        assert environment.record["sha256"] == detectron2_wheel.SDIST_SHA256

    def test_pure_python_when_unreachable(self, monkeypatch):
        def check_reachable(url):
            raise detectron2_source.SourceUnavailable("no route")

        monkeypatch.setattr(detectron2_source, "check_reachable", check_reachable)
        environment = FakeEnvironment(False)
        assert "no route" in obtain(environment)
        assert environment.installed() == ["detectron2.whl"]

    def test_pure_python_when_compiling_fails(self):
        environment = FakeEnvironment(
            False, failing=["install --no-build-isolation -c constraints.txt git+"]
        )
        assert "did not install (pip failed)" in obtain(environment)
        assert environment.installed() == [OFFICIAL, "detectron2.whl"]

    def test_words_choose_a_variant(self):
        environment = FakeEnvironment(True)
        obtain(environment, "pure-python")
        assert environment.installed() == ["detectron2.whl"]

    def test_asking_for_official_rules_out_the_other(self, monkeypatch):
        monkeypatch.setattr(detectron2_source, "missing_build_tool", lambda: "no C++ compiler")
        environment = FakeEnvironment(False)
        with pytest.raises(SetupError, match="no C\\+\\+ compiler.*--detectron2"):
            obtain(environment, "official")
        assert environment.installed() == []

    def test_altered_archive_stops_everything(self, monkeypatch):
        def build_wheel(sdist, folder):
            raise SetupError("not the file")

        monkeypatch.setattr(detectron2_wheel, "build_wheel", build_wheel)
        environment = FakeEnvironment(False)
        with pytest.raises(SetupError, match="not the file"):
            obtain(environment, "pure-python")
        assert environment.installed() == []

    def test_download_names_the_hash(self, monkeypatch):
        seen = []

        class Reader(FakeEnvironment):
            def pip(self, *arguments):
                if arguments[0] == "download":
                    seen.append(Path(arguments[arguments.index("-r") + 1]).read_text())
                super().pip(*arguments)

        obtain(Reader(False), "pure-python")
        assert seen == [f"pb1-detectron2==0.6 --hash=sha256:{detectron2_wheel.SDIST_SHA256}\n"]


class TestReachability:
    def test_refusal_gives_the_reason(self):
        def run(command, **options):
            assert options["env"]["GIT_TERMINAL_PROMPT"] == "0"
            return Result(128, "", "fatal: unable\nfatal: Could not resolve host")

        with pytest.raises(detectron2_source.SourceUnavailable, match="Could not resolve host"):
            detectron2_source.check_reachable("https://example.invalid/x.git", run)

    def test_silence_costs_seconds(self):
        def run(command, timeout, **options):
            assert 0 < timeout <= 30
            raise subprocess.TimeoutExpired(command, timeout)

        with pytest.raises(detectron2_source.SourceUnavailable, match="within 15 s"):
            detectron2_source.check_reachable("https://example.invalid/x.git", run)


class TestDescription:
    @pytest.mark.parametrize(
        "file, variant",
        [
            ("_C.py", "pure Python"),
            ("_C.cpython-311-x86_64-linux-gnu.so", "compiled"),
            ("other.py", "without its compiled part"),
        ],
    )
    def test_variant(self, tmp_path, file, variant):
        (tmp_path / file).touch()
        assert description.variant_of(tmp_path) == variant

    def test_commit_from_the_note_of_pip(self):
        note = json.dumps(
            {"url": "https://x/d2.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
        )
        assert description.origin_of(note) == {"source": "https://x/d2.git", "commit": "abc"}
        assert description.origin_of(None) == {}

    def test_record_of_an_earlier_detectron2_is_ignored(self, tmp_path):
        record = {"variant": "compiled", "version": "0.6", "commit": "abc", "date": "2026-01-01"}
        path = tmp_path / "record.json"
        path.write_text(json.dumps(record))
        same = {"variant": "compiled", "version": "0.6", "commit": "abc"}
        assert description.recorded(path, same) == record
        assert description.recorded(path, {**same, "commit": "def"}) == {}
        assert description.recorded(path, {**same, "variant": "pure Python"}) == {}
        assert description.recorded(tmp_path / "none", same) == {}

    def test_two_lines(self):
        python_line, detectron2_line = description.describe()
        assert "torch " in python_line and "Pillow " in python_line
        assert detectron2_line.startswith("Detectron2 ")


class TestProgram:
    def test_stamp(self, tmp_path):
        stamp = tmp_path / "stamp.json"
        assert not setup_environment.is_current(stamp, "abc", None)
        stamp.write_text(json.dumps({"inputs": "abc", "detectron2": "official"}))
        assert setup_environment.is_current(stamp, "abc", None)
        assert setup_environment.is_current(stamp, "abc", "official")
        assert not setup_environment.is_current(stamp, "abc", "pure-python")
        assert not setup_environment.is_current(stamp, "def", None)

    def test_inputs_hash_depends_on_the_constraints(self, tmp_path, monkeypatch):
        for name in ("constraints.txt", "setup.cfg", "pyproject.toml"):
            (tmp_path / name).write_text("a")
        monkeypatch.setattr(setup_environment, "ROOT", tmp_path)
        hashes = {setup_environment.inputs_hash([])}
        for name in ("constraints.txt", "setup.cfg", "pyproject.toml"):
            (tmp_path / name).write_text("b")
            hashes.add(setup_environment.inputs_hash([]))
        hashes.add(setup_environment.inputs_hash(["other"]))
        assert len(hashes) == 5

    def test_pins_of_installed_packages_are_dropped(self):
        pins = '# why\ntorch==2.11.0\nPyYAML==6.0.3\nhydra-core==1.3.8; python_version >= "3.11"\n'
        assert (
            setup_environment.unpinned(pins, ["pyyaml", "hydra_core"]) == "# why\ntorch==2.11.0\n"
        )

    def test_variable_names_the_source(self, monkeypatch):
        monkeypatch.setenv("DETECTRON2_SOURCE", "../from-variable")
        assert setup_environment.get_parser().parse_args([]).detectron2 == "../from-variable"
        arguments = ["--detectron2", "../from-option"]
        assert setup_environment.get_parser().parse_args(arguments).detectron2 == "../from-option"

    def test_error_is_one_sentence_and_a_code(self, tmp_path, capsys):
        assert setup_environment.main(["--venv", str(tmp_path / "none"), "--describe"]) == 1
        assert capsys.readouterr().err.startswith("error: there is no environment in ")

    def test_every_pin_of_the_constraints_is_one_version(self):
        for line in setup_environment.CONSTRAINTS.read_text().splitlines():
            requirement = line.split("#")[0].split(";")[0].strip()
            assert not requirement or requirement.count("==") == 1


class FakeApt:
    """Stands for subprocess.run; the command that contains `failing` fails."""

    def __init__(self, failing="nothing"):
        self.failing = failing
        self.commands = []

    def __call__(self, command, **options):
        self.commands.append(" ".join(command))
        code = int(self.failing in self.commands[-1])
        return subprocess.CompletedProcess(command, code, stdout="E: no route\nE: really\n")


class TestBrowser:
    @pytest.fixture(autouse=True)
    def debian(self, monkeypatch):
        monkeypatch.setattr(optional_parts.os, "geteuid", lambda: 0)
        monkeypatch.setattr(optional_parts.shutil, "which", lambda name: f"/usr/bin/{name}")

    def test_root_installs_chromium(self):
        apt = FakeApt()
        assert optional_parts.install_chromium(apt) is None
        assert len(apt.commands) == 2 and apt.commands[-1].endswith("chromium")

    @pytest.mark.parametrize("failing", ["update", "install"])
    def test_failure_is_reported_with_the_last_line(self, failing):
        reason = optional_parts.install_chromium(FakeApt(failing))
        assert failing in reason and "E: really" in reason

    def test_nothing_is_installed_for_other_users(self, monkeypatch):
        monkeypatch.setattr(optional_parts.os, "geteuid", lambda: 1000)
        apt = FakeApt()
        assert "sudo apt install chromium" in optional_parts.install_chromium(apt)
        assert apt.commands == []

    def test_a_browser_that_is_there_is_used(self, monkeypatch, capsys):
        monkeypatch.setattr(optional_parts, "install_chromium", lambda: pytest.fail("installs"))
        environment = FakeEnvironment(True)
        optional_parts.install_browser(environment)
        assert environment.installed() == ["playwright"]
        assert "left out" not in capsys.readouterr().out

    def test_without_a_browser_playwright_is_left_out(self, monkeypatch, capsys):
        monkeypatch.setattr(optional_parts, "find_browser", lambda: None)
        monkeypatch.setattr(optional_parts, "install_chromium", lambda: "no route")
        environment = FakeEnvironment(True)
        optional_parts.install_browser(environment)
        assert environment.commands == []
        assert "left out: no route" in capsys.readouterr().out


@pytest.mark.parametrize("part, packages", [("export", "onnx onnxruntime"), ("app", "gradio")])
def test_the_other_parts_are_pinned_packages(part, packages, capsys):
    environment = FakeEnvironment(True)
    optional_parts.PARTS[part](environment)
    assert environment.commands == [f"install -c constraints.txt {packages}"]
    failing = FakeEnvironment(True, failing=["install"])
    optional_parts.PARTS[part](failing)
    assert "left out: pip failed" in capsys.readouterr().out


def test_optional_parts_are_tried_once(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setitem(optional_parts.PARTS, "crf", lambda environment: tried.append("crf"))
    monkeypatch.setitem(optional_parts.PARTS, "browser", lambda environment: tried.append("web"))
    monkeypatch.setattr(setup_environment, "set_up", lambda environment, args: None)
    options = ["--venv", str(tmp_path), "--with", "crf"]
    assert setup_environment.main(options) == 0
    assert setup_environment.main([*options, "browser"]) == 0
    assert setup_environment.main([*options, "browser"]) == 0
    assert tried == ["crf", "web"]
