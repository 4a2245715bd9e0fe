"""
A virtual environment with pip in it, and the checks of a machine before one is made.

Only the standard library is used: this runs under a bare Python.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, List

from environment import description
from environment.detectron2_wheel import SetupError

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)

# torch brings the CUDA libraries along, whether there is a GPU or not.
GIGABYTES_INSTALLED = 7.0
GIGABYTES_DOWNLOADED = 3.0

# What pip says (first match wins), and what that means.
PIP_FAILURES = (
    (
        r"No space left on device",
        "the disk is full. Free some space; pip unpacks downloads in the folder TMPDIR names.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "a download does not have the expected hash, so it was damaged or altered. Try again; if "
        "it persists, the package index in use serves another file.",
    ),
    (
        r"name resolution|NameResolutionError|NewConnectionError|ConnectTimeoutError|ProxyError"
        r"|Network is unreachable|Read timed out|ReadTimeoutError|SSLError|Max retries exceeded",
        "the package index cannot be reached. Check the network; behind a proxy or a mirror, set "
        "HTTPS_PROXY or PIP_INDEX_URL.",
    ),
    (
        r"No matching distribution found for (?P<name>\S+)",
        "there is no {name} for this Python ({python}) on this platform. PyTorch has wheels for "
        "64-bit Linux, Windows and macOS; try another Python (make env PYTHON=python3.11).",
    ),
)


class VirtualEnvironment:
    """A virtual environment, its interpreter, and pip in it."""

    def __init__(
        self,
        folder: Path,
        constraints: Path,
        run: Callable = subprocess.run,
    ):
        """
        Args:
            folder (Path): where the environment is or shall be.
            constraints (Path): pip constraints for everything that is installed.
            run (Callable): runs commands; the interface of `subprocess.run`.
        """
        self.folder = folder.absolute()
        self.constraints = constraints
        self.scripts = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.scripts / ("python.exe" if os.name == "nt" else "python")
        self._run = run

    def create(self, system_site_packages: bool = False, clear: bool = False) -> None:
        """
        Creates the environment with the running interpreter, unless it is there.
        """
        config = self.folder / "pyvenv.cfg"
        if self.folder.exists() and not config.exists() and any(self.folder.iterdir()):
            raise SetupError(f"{self.folder} exists and is not a virtual environment: name another")
        if self.python.exists() and not clear:
            check_same_python(config.read_text(), sys.version_info, self.folder)
            return
        options = ["--clear"] if clear else []
        options += ["--system-site-packages"] if system_site_packages else []
        result = self.execute([sys.executable, "-m", "venv", *options, str(self.folder)])
        if result.returncode != 0:
            raise SetupError(f"Python could not create {self.folder}: {result.stdout.strip()}")

    def execute(self, command: List[str], **options) -> subprocess.CompletedProcess:
        """
        Runs a command with the environment's programs (ninja, for one) first on the PATH.
        """
        env = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1")
        env["PATH"] = f"{self.scripts}{os.pathsep}{env.get('PATH', '')}"
        merged = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        return self._run(command, **dict(merged, **options))

    def pip(self, *arguments: str) -> None:
        """
        Runs pip, silently unless it fails; then shows its output and explains it.
        """
        options = ["--quiet", "--disable-pip-version-check"]
        result = self.execute(
            [str(self.python), "-m", "pip", arguments[0], *options, *arguments[1:]]
        )
        if result.returncode != 0:
            print("\n".join(f"    | {line}" for line in result.stdout.splitlines()[-30:]))
            raise SetupError(f"pip {arguments[0]} failed: {explain_pip_failure(result.stdout)}")

    def pins(self) -> List[str]:
        """
        Returns the pip options that pin versions.
        """
        return ["-c", str(self.constraints)]

    def python_runs(self, code: str) -> bool:
        """
        Says whether the environment's interpreter runs some code without an error.
        """
        command = [str(self.python), "-c", code]
        return self.execute(command, cwd=str(self.folder)).returncode == 0

    def installed(self) -> List[str]:
        """
        Returns the names of all packages that the environment's interpreter sees.
        """
        code = (
            "import importlib.metadata as m\n"
            "print(*{d.metadata['Name'] for d in m.distributions()}, sep='\\n')"
        )
        return self.execute([str(self.python), "-c", code]).stdout.split()

    def write_detectron2_record(self, record: Dict[str, str]) -> None:
        """
        Keeps where Detectron2 came from, for --describe and for the header of test reports.
        """
        path = self.folder / description.RECORD_NAME
        if path.exists():
            path.unlink()
        command = [str(self.python), description.__file__, "--json"]
        facts = json.loads(self.execute(command, stderr=subprocess.DEVNULL).stdout)
        path.write_text(json.dumps(dict(facts, **record), indent=2) + "\n")


def explain_pip_failure(output: str) -> str:
    """
    Says in one sentence why pip failed, from what it printed.
    """
    python = ".".join(str(number) for number in sys.version_info[:2])
    for pattern, meaning in PIP_FAILURES:
        match = re.search(pattern, output)
        if match:
            return meaning.format(python=python, **match.groupdict())
    return "see its output above."


def check_python(version=sys.version_info) -> None:
    """
    Raises SetupError unless this project supports a version of Python.
    """
    if not OLDEST_PYTHON <= tuple(version[:2]) <= NEWEST_PYTHON:
        raise SetupError(
            f"this is Python {version[0]}.{version[1]}, but the tested packages have wheels for "
            "3.10 to 3.13 only. Name another interpreter: make env PYTHON=python3.11"
        )


def check_same_python(pyvenv_cfg: str, version, folder: Path) -> None:
    """
    Raises SetupError if an environment was made with another version of Python.
    """
    match = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", pyvenv_cfg, re.MULTILINE)
    made_with = tuple(int(number) for number in match.groups()) if match else None
    if made_with and made_with != tuple(version[:2]):
        raise SetupError(
            f"{folder} was made with Python {made_with[0]}.{made_with[1]}, this is "
            f"{version[0]}.{version[1]}. Use --force to make it anew, or --venv for another folder."
        )


def check_venv_module(find: Callable = __import__) -> None:
    """
    Raises SetupError if Python cannot make virtual environments (Debian packs that separately).
    """
    for module in ("venv", "ensurepip"):
        try:
            find(module)
        except ImportError:
            raise SetupError(
                f"this Python has no module {module}, which virtual environments need. Install it "
                "(Debian, Ubuntu: apt install python3-venv)."
            ) from None


def check_disk(folder: Path, disk_usage: Callable = shutil.disk_usage) -> None:
    """
    Raises SetupError if an environment with PyTorch does not fit on the disk of a folder.
    """
    needs = [(nearest_folder(folder), GIGABYTES_INSTALLED)]
    temporary = Path(tempfile.gettempdir())
    # A small memory disk on /tmp is common; pip unpacks its downloads there.
    if temporary.stat().st_dev != needs[0][0].stat().st_dev:
        needs.append((temporary, GIGABYTES_DOWNLOADED))
    for place, needed in needs:
        free = disk_usage(place).free / 1e9
        if free < needed:
            raise SetupError(
                f"{place} has {free:.1f} GB free, and PyTorch with its CUDA libraries needs "
                f"{needed:.0f} GB there. Free some space, name another folder with --venv, or set "
                "TMPDIR."
            )


def nearest_folder(path: Path) -> Path:
    """
    Returns the folder itself or the nearest one above it that exists.
    """
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())
