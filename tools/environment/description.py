"""
Says which Detectron2, and which other main packages, an environment holds.

Run by itself it describes the environment of the interpreter that runs it, so it imports nothing
but the standard library.
"""

import importlib.util
import json
import platform
import sys
from pathlib import Path
from typing import Dict, List, Optional

try:
    from importlib import metadata
except ImportError:  # Python 3.7 and older, which the set-up program refuses in its own words
    metadata = None

RECORD_NAME = "detectron2-source.json"


def find_detectron2(prefix: str = sys.prefix) -> Dict[str, str]:
    """
    Finds out which Detectron2 the running interpreter would import, without importing it.

    Returns:
        Dict[str, str]: `variant`, `version` and, as far as they are known, `commit`, `sha256`,
            `source` and `date`; empty if there is none.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        return {}
    facts = {"variant": variant_of(Path(list(spec.submodule_search_locations)[0]))}
    try:
        distribution = metadata.distribution("detectron2")
    except metadata.PackageNotFoundError:
        return dict(facts, version="of unknown version", source="not installed by pip")
    facts["version"] = distribution.version
    facts.update(origin_of(distribution.read_text("direct_url.json")))
    facts.update(recorded(Path(prefix, RECORD_NAME), facts))
    return facts


def variant_of(package: Path) -> str:
    """
    Tells compiled builds of Detectron2 from the pure-Python one by the files of the package.
    """
    if (package / "_C.py").is_file():
        return "pure Python"
    if any(package.glob("_C*.so")) or any(package.glob("_C*.pyd")):
        return "compiled"
    return "without its compiled part"


def origin_of(direct_url: Optional[str]) -> Dict[str, str]:
    """
    Reads what pip noted about a package that came from a URL or a path (direct_url.json).
    """
    if not direct_url:
        return {}
    noted = json.loads(direct_url)
    facts = {"source": noted["url"]}
    commit = noted.get("vcs_info", {}).get("commit_id")
    if commit:
        facts["commit"] = commit
    return facts


def recorded(path: Path, facts: Dict[str, str]) -> Dict[str, str]:
    """
    Reads the record of the set-up program, unless another Detectron2 has come since.
    """
    if not path.is_file():
        return {}
    record = json.loads(path.read_text())
    # The record of a git source names a commit; so does pip's own note on what is installed now.
    current = all(record.get(key) == facts[key] for key in ("variant", "version"))
    current = current and record.get("commit") == facts.get("commit")
    return record if current else {}


def describe(prefix: str = sys.prefix) -> List[str]:
    """
    Describes Python, the main packages and Detectron2 in the running interpreter.

    Returns:
        List[str]: two lines for a log or the header of a test report.
    """
    names = ("torch", "torchvision", "numpy", "Pillow")
    packages = ", ".join(f"{name} {version_of(name)}" for name in names)
    return [f"Python {platform.python_version()}, {packages}", describe_detectron2(prefix)]


def describe_detectron2(prefix: str) -> str:
    """
    Describes Detectron2 in one line: version, variant, commit or hash, origin, date.
    """
    facts = find_detectron2(prefix)
    if not facts:
        return "Detectron2 is not installed: run `make env`"
    parts = [f"Detectron2 {facts['version']}, {facts['variant']}"]
    parts += [f"{key} {facts[key]}" for key in ("commit", "sha256") if key in facts]
    parts += [f"from {facts['source']}"] if "source" in facts else []
    parts += [f"installed {facts['date']}"] if "date" in facts else []
    return ", ".join(parts)


def version_of(name: str) -> str:
    """
    Returns the version of an installed package, or "missing".
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    if sys.argv[1:] == ["--json"]:
        print(json.dumps(find_detectron2()))
    else:
        print("\n".join(describe()))
