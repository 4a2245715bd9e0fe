"""Every command of the documents is one that the programs understand, and runs."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_checks import problem_of
from docs_commands import Block, all_commands, blocks_of, commands_of, pages, sentences_of
from docs_exclusions import EXCLUSIONS, reason_not_to_run

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = "docs/TUTORIAL.md"
# What a fresh clone has and commands use.
COPIED = ("benchmarks", "configs", "docs", "projects", "tests", "tools", ".ci")


@pytest.fixture(scope="module")
def commands():
    return all_commands(ROOT)


def read(text, tmp_path, cwd=ROOT):
    """The commands of a page, without their variables: (line, words)."""
    path = tmp_path / "page.md"
    path.write_text(text)
    found = [x for block in blocks_of(path, "page.md") for x in commands_of(block, cwd)]
    return [(x.line, " ".join(x.argv)) for x in found]


# Of the extraction.


def test_blocks_and_indented_lines_are_read(tmp_path):
    text = (
        "text `python no.py`\n```bash\npython a.py\n```\n\n    make test   # why\n    no command\n"
    )
    text += "```python\nmake(x)\n```\n1. a list\n   ```bash\n   make demo\n   ```\n"
    assert read(text, tmp_path) == [(3, "python a.py"), (6, "make test"), (13, "make demo")]


def test_lines_that_go_on_quotes_comments_variables_and_braces_are_bashs(tmp_path):
    text = "```bash\nCONFIG=a/b.yaml\npython x.py \\\n    a 'y z' $CONFIG  # comment\n\n"
    text += "python x.py {1,2}.yaml \"('q',)\" | python y.py && make z\n.ci/run --all\n```\n"
    assert read(text, tmp_path) == [
        (3, "python x.py a y z a/b.yaml"),
        (6, "python x.py 1.yaml 2.yaml ('q',)"),
        (6, "python y.py"),
        (6, "make z"),
        (7, ".ci/run --all"),
    ]


def test_loops_and_variables_of_single_commands_are_bashs():
    text = "export A=1\nfor seed in 1 2; do\n  B=$seed python x.py --seed $seed\ndone"
    found = commands_of(Block("page.md", 10, text, None), ROOT)
    assert [x.argv[-1] for x in found] == ["1", "2"] and {x.line for x in found} == {12}
    assert dict(found[1].environment).items() >= {"A": "1", "B": "2"}.items()
    assert "B=2 python x.py --seed 2" in str(found[1]) and str(found[1]).startswith("page.md:12: ")


def test_patterns_stand_for_the_files_that_are_there(tmp_path):
    for name in ("b.json", "a.json"):
        (tmp_path / name).touch()
    assert read("    python x.py *.json '*.json'\n", tmp_path, tmp_path) == [
        (1, "python x.py a.json b.json *.json")
    ]


def test_no_command_is_started_while_they_are_read(tmp_path):
    text = f"```bash\ntouch {tmp_path}/x\n/bin/touch {tmp_path}/y\n```\n"
    assert len(read(text, tmp_path)) == 2
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("```bash\ncd tools\n```\n", "restricted"),
        ("```bash\npython x.py > file\n```\n", "restricted"),
        ("```bash\npython 'x.py\n```\n", "bash: "),
        ("```bash\npython x.py\n", "a block without an end"),
        ("<!-- not run: -->\n```bash\npython x.py\n```\n", "page.md:1: the mark gives no reason"),
        ("<!-- not run: needs a GPU -->\n\n```bash\nx\n```\n", "a mark that no commands follow"),
    ],
)
def test_what_is_not_understood_is_an_error(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read(text, tmp_path)


def test_a_mark_covers_its_block_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "<!-- not run: needs eight GPUs -->\n```bash\nmake a\nmake b\n```\n```bash\nmake c\n```\n"
    )
    reasons = [block.not_run for block in blocks_of(path, "page.md")]
    assert reasons == ["needs eight GPUs", None]


def test_commands_of_sentences_are_found(tmp_path):
    path = tmp_path / "page.md"
    text = "Call `python tools/predict.py a.png --weights w`, `startup.py --rounds 1`, not `x.py`,"
    path.write_text(text + " `python tools/predict.py ...` or `tools/predict.py --compare`.\n")
    found = [x for block in sentences_of(path, "page.md", ROOT) for x in commands_of(block, ROOT)]
    assert [" ".join(x.argv) for x in found] == [
        "python tools/predict.py a.png --weights w",
        "python benchmarks/startup.py --rounds 1",
    ]


# Of the checks.


@pytest.mark.parametrize(
    "text, words",
    [
        ("python tools/hide_masks.py a.json b.json --keep 0.1 --seed 3", None),
        ("python tools/hide_masks.py a.json b.json --kept 0.1", "--kept|--keep"),
        ("python tools/hide_masks.py a.json b.json --keep 2", "from 0 to 1"),
        ("python tools/hide_mask.py a.json b.json", "no such file: tools/hide_mask.py"),
        ("python hide_masks.py --help", "no such file: hide_masks.py"),
        ("python train_net.py --config-file configs/none.yaml", "no such file: configs/none.yaml"),
        ("python train_net.py --config-file output/a.yaml SOLVER.MAX_ITER 5", None),
        ("python train_net.py MODEL.PSEUDO_MASK.METHODE x", "Non-existent key"),
        ("python train_net.py MODEL.PSEUDO_MASK.WARMUP_ITERS many", "Type mismatch"),
        ("python train_net.py --num-gpu", "--num-gpu"),
        ("python -m no_such_module", "no module no_such_module"),
        ("srun --ntasks=2 bash -c 'python train_net.py --rank 3'", "unrecognized|--rank"),
        ("srun --ntasks=2 python train_net.py --machine-rank 3", None),
        ("make tests", "no such target or variable of make: tests"),
        ("make env PYTHON=python3.12", None),
        ("pip install -e '.[reports]'", "no such extra in setup.cfg: reports"),
        ("pip install -c constraints.txt -e '.[report,crf]'", None),
        ("rm -rf output", "unknown program: rm"),
    ],
)
def test_the_check_knows_programs_flags_files_and_config_keys(text, words):
    (command,) = commands_of(Block("page.md", 1, text, None), ROOT)
    problem = problem_of(command, ROOT)
    if words is None:
        assert problem is None
    else:
        assert problem and re.search(words, problem), problem


# Of the documents.


def test_every_command_is_understood_by_its_program(commands):
    problems = [f"{x}\n    {problem}" for x in commands if (problem := problem_of(x, ROOT))]
    assert not problems, "\n".join(problems)
    assert len(commands) > 30


def test_blocks_that_a_shell_reads_are_called_bash():
    for path in pages(ROOT):
        languages = re.findall(r"^ *```(\w+)$", path.read_text(), re.MULTILINE)
        assert not {"sh", "shell", "console", "zsh", "text"} & set(languages), path


def anchors_of(page):
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def test_links_lead_to_files_and_headings_that_exist():
    broken, checked = [], 0
    for page in map(ROOT.joinpath, pages(ROOT)):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'src="([^"]+)"', text):
            if "://" in target or target.startswith("mailto:"):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            checked += 1
            if not path.exists() or (anchor and anchor not in anchors_of(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert checked > 50 and broken == []


def test_what_is_not_run_has_a_reason_that_is_needed(commands):
    assert all(reason for *_, reason in EXCLUSIONS)
    for page, pattern, _ in EXCLUSIONS:
        if not page:
            assert any(re.match(pattern, " ".join(x.argv)) for x in commands), pattern
    run = [x for x in commands if not x.not_run and not reason_not_to_run(x)]
    # Whatever needs many GPUs or COCO is marked.
    heavy = [
        x for x in run if re.search(r"configs/coco|train_net.py .*--num-gpus [2-9]", str(x))
    ]
    assert not heavy, "\n".join(map(str, heavy))


def test_the_tutorial_is_run_as_a_whole(commands):
    of_tutorial = [x for x in commands if x.page == TUTORIAL]
    assert len(of_tutorial) >= 9
    assert [x for x in of_tutorial if x.not_run or reason_not_to_run(x)] == []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of what a clone has, so that nothing is written into this one."""
    folder = tmp_path_factory.mktemp("workspace")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
        elif path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=ignored)
    return folder


@pytest.mark.slow
def test_the_commands_of_all_documents_run(workspace):
    result = workspace / "result.json"
    paths = [str(ROOT / x) for x in ("projects/TeacherStudentMask", "tests", "tools")]
    variables = {"PYTHONPATH": os.pathsep.join([*paths, os.getenv("PYTHONPATH", "")])}
    # Where a reader has no datasets of others.
    variables["DETECTRON2_DATASETS"] = str(workspace / "datasets")
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests/docs_runner.py"), str(workspace), str(result)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == 0, ended.stderr
    entries = json.loads(result.read_text())
    seconds = collections.Counter()
    for entry in entries:
        seconds[entry["page"]] += entry.get("seconds", 0)
        print(entry.get("seconds", "-"), f"{entry['page']}:{entry['line']}", entry["command"][:80])
    print(dict(seconds))
    failed = [x for x in entries if x.get("status")]
    report = "\n\n".join(
        f"{x['page']}:{x['line']}: {x['command']}\nended with {x['status']}:\n"
        + "\n".join(x["output"])
        for x in failed
    )
    assert not failed, report
    of_tutorial = [x for x in entries if x["page"] == TUTORIAL]
    assert len(of_tutorial) >= 10 and all(x["status"] == 0 for x in of_tutorial)
