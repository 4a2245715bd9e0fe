"""The audit of the dependencies: pip-audit's answers are injected, no network is asked."""

import json
import subprocess

import pytest

import audit_dependencies
from audit_dependencies import NoData

PACKAGES = {"numpy": "2.4.6", "jinja2": "3.1.4"}
FINDING = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3.1.5"]}


class FakePipAudit:
    """
    Stands for subprocess.run; ``answers`` is {service: {package: findings, or why none}}.

    A service that is not in it cannot be reached.
    """

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def __call__(self, command, **options):
        service = command[command.index("--vulnerability-service") + 1]
        with open(command[command.index("--requirement") + 1]) as file:
            packages = dict(line.strip().split("==") for line in file)
        self.asked.append((service, list(packages)))
        if service not in self.answers:
            error = "Traceback\nConnectionError: api.example.org\n"
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=error)
        entries = []
        for name, version in packages.items():
            answer = self.answers[service].get(name, [])
            key = {"skip_reason": answer} if isinstance(answer, str) else {"vulns": answer}
            entries.append({"name": name, "version": version, **key})
        text = json.dumps({"dependencies": entries, "fixes": []})
        return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")


@pytest.fixture
def run(monkeypatch, capsys):
    """Return ``run(pip_audit)``: the exit code of the program and what it printed."""
    monkeypatch.setattr(audit_dependencies, "installed", lambda: PACKAGES)

    def _run(pip_audit):
        audit = audit_dependencies.audit
        with monkeypatch.context() as m:
            m.setattr(audit_dependencies, "audit", lambda packages: audit(packages, pip_audit))
            m.setattr(audit_dependencies.importlib.util, "find_spec", lambda name: name)
            return audit_dependencies.main([]), capsys.readouterr().out

    return _run


def test_finding_fails(run):
    code, output = run(FakePipAudit(pypi={"jinja2": [FINDING]}))
    assert code == 1
    assert "Audited 2 packages." in output
    assert "jinja2 3.1.4: PYSEC-1 = CVE-1, fixed in 3.1.5" in output


def test_no_finding_passes(run):
    code, output = run(FakePipAudit(pypi={}))
    assert code == 0 and "0 known vulnerabilities" in output


@pytest.mark.parametrize("name", ["PYSEC-1", "CVE-1"])
def test_explained_finding_passes_with_its_reason(run, monkeypatch, name):
    monkeypatch.setattr(audit_dependencies, "EXPLAINED", {name: "templates are ours"})
    code, output = run(FakePipAudit(pypi={"jinja2": [FINDING]}))
    assert code == 0 and "explained: templates are ours" in output


def test_what_was_not_audited_is_named(run):
    code, output = run(FakePipAudit(pypi={"jinja2": "not found"}))
    assert code == 0
    assert "Audited 1 packages." in output and "not audited: jinja2: not found" in output


def test_without_data_it_says_so_and_passes(run):
    # A package index without advisories, and no network for the rest: one package is asked for.
    pip_audit = FakePipAudit(pypi={"numpy": "not found on PyPI"})
    code, output = run(pip_audit)
    assert code == 0
    assert output.startswith("NOT AUDITED")
    assert "pypi: not found on PyPI" in output and "osv: ConnectionError" in output
    assert pip_audit.asked == [("pypi", ["numpy"]), ("osv", ["numpy"])]


def test_the_second_service_is_asked_where_the_first_has_no_data(run):
    pip_audit = FakePipAudit(pypi={"numpy": "not found"}, osv={"jinja2": [FINDING]})
    assert run(pip_audit)[0] == 1
    assert pip_audit.asked[1:] == [("osv", ["numpy"]), ("osv", ["numpy", "jinja2"])]


def test_a_program_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(audit_dependencies.importlib.util, "find_spec", lambda name: None)
    assert audit_dependencies.main([]) == 2
    assert "pip-audit is not installed" in capsys.readouterr().out


def test_unknown_answer_is_no_data():
    def run(command, **options):
        return subprocess.CompletedProcess(command, 3, stdout="[]", stderr="")

    with pytest.raises(NoData, match="pip-audit ended with 3"):
        audit_dependencies.ask("pypi", PACKAGES, run)


def test_installed_packages_are_those_of_pypi():
    packages = audit_dependencies.installed()
    assert "torch" in packages and "detectron2" not in packages
    assert not any("+" in version for version in packages.values())
