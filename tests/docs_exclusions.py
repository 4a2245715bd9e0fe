"""Commands of the documents that no test runs although they could run; each with its reason."""

from __future__ import annotations

import importlib.util
import re

from docs_commands import Command

__all__ = ["EXCLUSIONS", "OPTIONAL", "missing_package", "reason_not_to_run"]

# (page or "", the beginning of a command as a regular expression, reason).
EXCLUSIONS = (
    ("", r"make (demo|test|lint|audit|env|test-quick)$", "minutes; .ci/run runs it"),
    ("", r"\.ci/run$", "minutes; it runs these tests"),
    ("README.md", r"python -c ", "tests/test_readme.py runs it"),
)


# Optional packages: what needs them, and all that follows on its page, is left out without them.
OPTIONAL = {
    "onnx": r"onnx",
    "onnxruntime": r"onnx",
    "gradio": r"tsmask app",
    "jinja2": r"tools/(view_dataset|analyze)\.py|--html\b",
}


def missing_package(command: Command) -> str | None:
    """The optional package that a command needs and that is not there; None if there is none."""
    text = " ".join(command.argv)
    for package, pattern in OPTIONAL.items():
        if re.search(pattern, text) and importlib.util.find_spec(package) is None:
            return package
    return None


def reason_not_to_run(command: Command) -> str | None:
    """The reason why a command is left out; None if it is to be run."""
    text = " ".join(command.argv)
    for page, pattern, reason in EXCLUSIONS:
        if page in ("", command.page) and re.match(pattern, text):
            return reason
    return None
