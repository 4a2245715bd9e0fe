"""
The commands of the documents, as bash would start them.

Commands stand in ```bash blocks, and in lines with an indent of four blanks that begin with one of
PROGRAMS. bash itself, restricted and without any program to start, reads each block: so quotes,
variables, braces, loops and lines that go on are understood as they are meant.

A line ``<!-- not run: reason -->`` directly before a block, or before indented lines, marks
commands that are checked but not run.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "Command", "all_commands", "blocks_of", "commands_of", "pages", "sentences_of"]

# First words of indented lines that are commands.
PROGRAMS = ("python", "make", "pip", "git", ".ci/run")
MARK = re.compile(r"^ *<!-- *not run:(.*?)-->\s*$")
# bash calls this for whatever it does not find; a function's name is no path, hence _path.
PRELUDE = (
    # What stands before a pipe has written its record into it.
    "command_not_found_handle() { if [[ -p /dev/stdin ]]; then "
    "while IFS= read -r -d '' f; do printf '%s\\0' \"$f\"; done; fi; "
    'printf "%s\\0" "${__line:-$1}" "$#" "$@"; '
    'for n in $(compgen -e); do printf "%s=%s\\0" "$n" "${!n}"; done; printf "\\0"; }; '
    # What bash blocks use that starts nothing of ours; Slurm's list of machines is one machine.
    'source() { :; }; scontrol() { echo first-node; }; head() { read -r x; echo "$x"; }; '
)
# A command in a sentence, as `python tools/x.py ...`, or a benchmark's as `x.py ...`.
INLINE = re.compile(r"`((?:\w+=\S+ )*(?:python [\w/]+|\w+)\.py(?: [^`]*)?)`")


@dataclass(frozen=True)
class Block:
    """Lines of a document that belong together."""

    page: str
    line: int  # of the document, where the text begins
    text: str
    not_run: str | None  # the reason, where the block has a mark
    language: str = "bash"


@dataclass(frozen=True)
class Command:
    """What one line of a document starts."""

    page: str
    line: int
    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]  # variables that it or its block sets
    not_run: str | None

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment]
        return f"{self.page}:{self.line}: {' '.join([*variables, *self.argv])}"


def blocks_of(path: Path, page: str, languages: tuple[str, ...] = ("bash",)) -> list[Block]:
    """
    Find the blocks of a Markdown file.

    Args:
        path: of the file.
        page: its name in messages.
        languages: words behind ``` that are wanted; "bash" includes indented commands.

    Raises:
        ValueError: a mark without a reason, a mark that marks nothing, or a block without end.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    blocks, i = [], 0
    while i < len(lines):
        start, (end, block) = i, _block_at(lines, i, page)
        i = end
        if block is None:
            if MARK.match(lines[start]):
                raise ValueError(f"{page}:{start + 1}: a mark that no commands follow.")
            continue
        if block.language in languages:
            blocks.append(block)
    return blocks


def _block_at(lines: list[str], start: int, page: str) -> tuple[int, Block | None]:
    # The line behind what begins here, and the block, if it is one.
    mark, i = MARK.match(lines[start]), start
    if mark:
        i += 1
        if len(mark[1].strip()) < 8:
            raise ValueError(f"{page}:{start + 1}: the mark gives no reason.")
    reason = mark[1].strip() if mark else None
    fence = re.match(r"^ *```(\w*)", lines[i]) if i < len(lines) else None
    if fence:
        end = next((k for k in range(i + 1, len(lines)) if lines[k].strip() == "```"), None)
        if end is None:
            raise ValueError(f"{page}:{i + 1}: a block without an end.")
        return end + 1, Block(page, i + 2, "\n".join(lines[i + 1 : end]), reason, fence[1])
    end = i
    while end < len(lines) and lines[end].startswith("    ") and _is_command(lines, i, end):
        end += 1
    if end == i:
        return start + 1, None
    return end, Block(page, i + 1, "\n".join(lines[i:end]), reason)


def sentences_of(path: Path, page: str, root: Path) -> list[Block]:
    """
    The commands that stand in sentences and tables, for checking alone.

    Those with "..." or a <placeholder> are left out, and programs that are named without arguments.
    """
    found, is_code = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        is_code ^= line.lstrip().startswith("```")
        for text in [] if is_code else INLINE.findall(line):
            *_, program = text.partition(".py")[0].split()
            folder = "" if (root / f"{program}.py").is_file() else "benchmarks/"
            if " " in text.partition(".py")[2] and not re.search(r"\.\.\.|<", text):
                text = text.replace("python ", "").replace(program, f"python {folder}{program}", 1)
                found.append(Block(page, number, text, "it stands in a sentence"))
    return found


def _is_command(lines: list[str], start: int, k: int) -> bool:
    goes_on = k > start and lines[k - 1].endswith("\\")
    return goes_on or lines[k].split()[:1] in [[x] for x in PROGRAMS]


def commands_of(block: Block, cwd: Path) -> list[Command]:
    """
    Let bash read a block.

    Args:
        block: with bash's language.
        cwd: from where the commands would be started.

    Returns:
        What it starts, in order, each with its own line.

    Raises:
        ValueError: bash does not understand it, or refuses it: a change of the folder, output
            that is redirected to a file.
    """
    script, line = [], block.line
    for number, text in enumerate(block.text.splitlines()):
        # bash says in which line a command ends, not where it begins.
        if not script or not script[-1].endswith("\\"):
            line = block.line + number
            text = re.sub(r"^(\s*)((?!\w+=)[\w.-]*/\S+)", r"\1_path \2", text)
            name = re.match(r"\s*(?:\w+=\S* )*([\w.-]+)(?=\s|$)(?!=)", text)
            if name and name[1] not in ("do", "done", "then", "else", "fi"):
                text = f"__line={line}; {text.lstrip()}"
        script.append(text)
    base = {"PATH": "/nonexistent", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}
    # What Slurm sets.
    base |= {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "nodes"}
    result = subprocess.run(
        ["/bin/bash", "--norc", "--noprofile", "-r", "-c", PRELUDE + "\n".join(script)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=base,
        timeout=60,
    )
    if result.stderr or result.returncode not in (0, 127):
        raise ValueError(f"{block.page}:{block.line}: bash: {result.stderr or result.returncode}")
    known = {*base, "PWD", "SHLVL", "_", "OLDPWD"}
    return list(_read_records(result.stdout, block, known))


def _read_records(output: str, block: Block, known: set[str]):
    # Each: line, number of words, the words, NAME=VALUE ..., an empty one.
    fields = output.split("\0")
    i = 0
    while i + 1 < len(fields):
        line, count = int(fields[i]), int(fields[i + 1])
        argv = fields[i + 2 : i + 2 + count]
        i += 2 + count
        variables = []
        while fields[i]:
            name, _, value = fields[i].partition("=")
            if name not in known:
                variables.append((name, value))
            i += 1
        i += 1
        if argv[0] == "_path":
            argv = argv[1:]
        yield Command(block.page, line, tuple(argv), tuple(sorted(variables)), block.not_run)


def pages(root: Path) -> list[Path]:
    """The documents whose commands must run, the tutorial first: its files are the others'."""
    found = [root / "README.md", root / "CONTRIBUTING.md"]
    found += [root / "projects/TeacherStudentMask/README.md", *sorted(root.glob("docs/*.md"))]
    return sorted(found, key=lambda path: path.name != "TUTORIAL.md")


def all_commands(root: Path) -> list[Command]:
    """The commands of all pages; those of sentences come after those of their page's blocks."""
    found = []
    for path in pages(root):
        page = os.path.relpath(path, root)
        for block in [*blocks_of(path, page), *sentences_of(path, page, root)]:
            found += commands_of(block, root)
    return found


if __name__ == "__main__":
    for command in all_commands(Path(__file__).resolve().parents[1]):
        print(command, f"  [not run: {command.not_run}]" if command.not_run else "")
