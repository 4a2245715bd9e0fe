"""
Every command of the documents is understood by its program, and runs.

Commands stand in ```bash and ```python blocks. A line ``<!-- not run: reason -->`` before a block
marks commands that are checked but not run. The tutorial runs first; the other pages find its data
and its model.
"""

import argparse
import contextlib
import glob
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs/TUTORIAL.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / "projects/TeacherStudentMask/README.md", ROOT / "configs/README.md"]
PAGES += [x for x in sorted(ROOT.glob("docs/*.md")) if x.name != "TUTORIAL.md"]
MARK = re.compile(r"^ *<!-- *not run:(.*?)-->\s*$")
# Package that a command needs -> pattern of such commands.
OPTIONAL = {
    "onnx": r"onnx",
    "onnxruntime": r"onnx",
    "gradio": r"tsmask app",
    "submitit": r"sweep",
    "timm": r"tsm\.train",
}


@dataclass
class Block:
    page: str
    language: str
    text: str
    not_run: str | None

    def commands(self):
        """The words of each command; loops and functions of the shell are for readers."""
        for line in self.text.replace("\\\n", " ").splitlines():
            for part in re.split(r" (?:&&|\|) ", line):
                words = shlex.split(part, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words and words[0] in ("tsmask", "python", "make", "pip", "mv", "cp", "mkdir"):
                    yield words


def blocks_of(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    reason = None
    i = 0
    while i < len(lines):
        fence = re.match(r"^ *```(\w*)", lines[i])
        if MARK.match(lines[i]):
            reason = MARK.match(lines[i])[1].strip()
            assert len(reason) > 7, f"{page}:{i + 1}: the mark gives no reason"
        elif fence:
            end = next(k for k in range(i + 1, len(lines)) if lines[k].strip() == "```")
            text = "\n".join(lines[i + 1 : end])
            yield Block(os.path.relpath(page, ROOT), fence[1], text, reason)
            reason, i = None, end
        else:
            assert not reason or not lines[i].strip(), f"{page}:{i + 1}: a mark without a block"
        i += 1


def name_of(page):
    return os.path.relpath(page, ROOT)


def check_config_keys(config_files, opts):
    for path in config_files:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        if path and (ROOT / path).is_file():
            cfg.merge_from_file(str(ROOT / path))
        cfg.merge_from_list(list(opts))


def check_command(words):
    """Raise where a program does not know a flag, a file of the repository or a config key."""
    for word in words:
        if re.match(r"(configs|benchmarks|tests|docs|tools)/", word) and "*" not in word:
            assert (ROOT / word).exists(), f"no such file: {word}"
    if words[0] == "tsmask" and words[1:2] not in ([], ["--help"], ["--version"]):
        module = importlib.import_module(f"teacher_student_mask.cli.{COMMANDS[words[1]][0]}")
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        args = parser.parse_args(words[2:])
    elif words[:2] == ["python", "train_net.py"]:
        args = default_argument_parser().parse_args(words[2:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = re.findall(r"^([a-z-]+):|^([A-Z_]+) \?=", makefile, re.MULTILINE)
        names = {x.split("=")[0] for x in words[1:]}
        assert names <= {name for pair in known for name in pair}, words
        return
    else:
        return
    files = getattr(args, "configs", None) or [getattr(args, "config_file", None)]
    check_config_keys(files, getattr(args, "opts", None) or [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_understood_by_its_program(page):
    for block in blocks_of(page):
        assert block.language not in ("sh", "shell", "console", "text"), block
        for words in block.commands() if block.language == "bash" else ():
            try:
                check_command(words)
            except (SystemExit, argparse.ArgumentError, AssertionError, KeyError) as error:
                pytest.fail(f"{block.page}: {shlex.join(words)}\n{error!r}")


def test_a_wrong_command_is_found():
    for text in (
        "tsmask check data.json --imagess x",
        "python train_net.py --config-file configs/none.yaml",
        "python train_net.py MODEL.PSEUDO_MASK.METHODE x",
        "make tests",
    ):
        with pytest.raises((SystemExit, argparse.ArgumentError, AssertionError, KeyError)):
            check_command(shlex.split(text))


def run_command(words):
    """Run a command in the current folder; returns its exit status."""
    words = [name for word in words for name in sorted(glob.glob(word)) or [word]]
    if "--num-gpus" in words and words[words.index("--num-gpus") + 1] != "1":
        # Several processes import the main module anew.
        words = [sys.executable, "-m", "teacher_student_mask", *words[1:]]
        return subprocess.run(words, timeout=600).returncode
    if words[0] == "tsmask":
        return main(words[1:])
    if words[0] != "python":
        return subprocess.run(words, timeout=60).returncode
    argv, sys.argv = sys.argv, words[1:]
    try:
        runpy.run_path(words[1], run_name="__main__")
    finally:
        sys.argv = argv
    return 0


def run_block(block, names):
    """Run a block; the blocks in Python of a page share the dict ``names``."""
    if block.language == "python":
        exec(compile(block.text, block.page, "exec"), names)
        return
    for words in block.commands():
        if words[0] in ("make", "pip"):
            continue  # for readers; .ci/run does
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                status = run_command(words)
        except SystemExit as error:
            status = error.code or 0
        assert status == 0, f"{block.page}: {shlex.join(words)}\n{output.getvalue()[-3000:]}"


def missing_package(block):
    for package, pattern in OPTIONAL.items():
        if re.search(pattern, block.text) and not importlib.util.find_spec(package):
            return package
    return None


@pytest.mark.slow
def test_the_commands_of_all_documents_run(tmp_path, monkeypatch):
    for name in ("benchmarks", "configs", "docs", "tests/fixtures", "train_net.py"):
        source, target = ROOT / name, tmp_path / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
    monkeypatch.chdir(tmp_path)
    num_run = 0
    for page in PAGES:
        # Of what other pages wrote only the tutorial's model stays.
        for path in Path("output").glob("*"):
            if path.name != "mine":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        names = {"__name__": "__main__"}
        for block in blocks_of(page):
            if block.language not in ("bash", "python") or block.not_run:
                continue
            if missing_package(block):
                break  # what follows on the page needs it
            run_block(block, names)
            num_run += 1
    assert num_run > 20


def anchors_of(page):
    """GitHub's names of the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def test_links_lead_to_files_and_headings_that_exist():
    broken = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)", text):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            if "://" not in target and (
                not path.exists() or (anchor and anchor not in anchors_of(path))
            ):
                broken.append(f"{name_of(page)}: {target}")
    assert broken == []


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
    functions = set()
    for path in (ROOT / "tests").rglob("*.py"):
        functions |= set(re.findall(r"^def (test_\w+)\(", path.read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", text)) <= functions
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?/?)`", text):
        assert (ROOT / path).exists(), path


def test_documents_are_short():
    words = {page: len(page.read_text(encoding="utf-8").split()) for page in PAGES}
    assert words[ROOT / "README.md"] <= 1000
    assert sum(words.values()) <= 13000
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        assert len(line) <= 300 or line.startswith("|"), line[:80]
