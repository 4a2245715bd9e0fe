#!/usr/bin/env python
"""Look for known vulnerabilities in the packages of this environment. See --help."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """
Asks, with pip-audit, whether an advisory is known for any package that is installed beside this
program: PyPI's database or, where the package index offers none, OSV's.

One package is asked for first. Without a network, or where no service has data, that is said and
the exit code is 0: a build must not depend on it. What was not audited is always named.

exit code: 0; 1 if a package has a known vulnerability that EXPLAINED in this file does not name;
2 without pip-audit.
"""

# Advisories that do not concern this project, with the reason: {"CVE-...": "why"}.
EXPLAINED: dict[str, str] = {}
SERVICES = ("pypi", "osv")
# No release of theirs is on PyPI.
OWN = ("detectron2", "teacher-student-mask")
PROBE = "numpy"


class NoData(Exception):
    """A service cannot be reached or has no data; the message says why."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.parse_args(argv)


def installed() -> dict[str, str]:
    """Versions of the installed packages by name, without local parts such as "+cu130"."""
    versions = {
        x.metadata["Name"]: x.version.partition("+")[0] for x in importlib.metadata.distributions()
    }
    return {name: versions[name] for name in sorted(versions) if name.lower() not in OWN}


def ask(service: str, packages: dict[str, str], run: Callable = subprocess.run) -> list[dict]:
    """
    Ask a service about packages.

    Args:
        service: of :data:`SERVICES`.
        packages: {name: version}.
        run: the interface of `subprocess.run`.

    Returns:
        An entry of pip-audit's json for each: "name", and "vulns" or "skip_reason".

    Raises:
        NoData: the service did not answer, or knows none of the packages.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text("".join(f"{n}=={v}\n" for n, v in packages.items()))
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps"]
        command += ["--format", "json", "--progress-spinner", "off"]
        command += ["--vulnerability-service", service, "--requirement", str(requirements)]
        # A list of arguments, without a shell.
        result = run(command, capture_output=True, text=True)
    try:
        entries = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError) as error:
        lines = result.stderr.strip().splitlines() or [f"pip-audit ended with {result.returncode}"]
        raise NoData(lines[-1]) from error
    if not any("vulns" in x for x in entries):
        raise NoData("; ".join(x.get("skip_reason", "") for x in entries[:1]) or "no answer")
    return entries


def audit(packages: dict[str, str], run: Callable = subprocess.run) -> list[dict]:
    """
    Ask the first service that answers.

    Raises:
        NoData: none does.
    """
    name = PROBE if PROBE in packages else next(iter(packages))
    problems = []
    for service in SERVICES:
        try:
            ask(service, {name: packages[name]}, run)
            return ask(service, packages, run)
        except NoData as problem:
            problems.append(f"{service}: {problem}")
    raise NoData("\n  ".join(problems))


def report(entries: list[dict]) -> int:
    """Print what was found; return how many findings nothing explains."""
    skipped = [x for x in entries if "vulns" not in x]
    print(f"Audited {len(entries) - len(skipped)} packages.")
    for entry in skipped:
        print(f"  not audited: {entry['name']}: {entry.get('skip_reason')}")
    num_findings = 0
    for entry in entries:
        for finding in entry.get("vulns", []):
            names = [finding["id"], *finding.get("aliases", [])]
            reason = next((EXPLAINED[x] for x in names if x in EXPLAINED), None)
            num_findings += reason is None
            fixed = ", ".join(finding.get("fix_versions", [])) or "no release"
            print(
                f"  {entry['name']} {entry['version']}: {' = '.join(names)}, fixed in {fixed}"
                + (f"; explained: {reason}" if reason else "")
            )
    return num_findings


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parse_args(argv)
    if importlib.util.find_spec("pip_audit") is None:
        print("pip-audit is not installed: pip install 'teacher-student-mask[dev]'")
        return 2
    try:
        entries = audit(installed())
    except NoData as problem:
        print(f"NOT AUDITED: no service has data on vulnerabilities.\n  {problem}")
        return 0
    num_findings = report(entries)
    print(f"{num_findings} known vulnerabilities that nothing explains.")
    return 1 if num_findings else 0


if __name__ == "__main__":
    sys.exit(main())
