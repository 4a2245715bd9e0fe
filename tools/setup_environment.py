#!/usr/bin/env python3
"""
Makes a virtual environment in which every command of this project runs.

It holds PyTorch and the other packages at the versions of constraints.txt, Detectron2, and the
project in editable mode. A second run sees that nothing has changed and ends at once.

Detectron2 has no release on PyPI. It comes from the first of these that works:
  1. the source that you name: --detectron2, or the environment variable DETECTRON2_SOURCE;
  2. a Detectron2 that the environment can import already;
  3. "official": the official repository at the tested commit, compiled here
     (needs git, a C++ compiler and Python's headers);
  4. "pure-python": a source distribution on PyPI, checked by its hash, without the compiled
     operators (rotated boxes, deformable convolutions), which this project does not use.

examples:
  tools/setup_environment.py                                    the usual environment, in .venv
  tools/setup_environment.py --detectron2 ../detectron2         Detectron2 from a checkout of yours
  tools/setup_environment.py --detectron2 pure-python --force   from scratch, without a compiler
  python3.12 tools/setup_environment.py --venv .venv312         another interpreter and folder
  tools/setup_environment.py --system-site-packages             keep the torch of this Python
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import detectron2_wheel
from detectron2_wheel import OFFICIAL_COMMIT, OFFICIAL_URL, SetupError

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
STAMP_NAME = "setup-stamp.json"

PYTHONS = ((3, 10), (3, 13))  # the oldest and the newest
# torch brings the CUDA libraries along, whether there is a GPU or not.
GIGABYTES_INSTALLED, GIGABYTES_DOWNLOADED = 7.0, 3.0
REACH_SECONDS = 15

# Imports torch before the compiled part, which needs torch's libraries to be loaded. A compiled
# part that was built for another torch fails here, not in the middle of a training.
IMPORT_CHECK = """
import detectron2, importlib.util
if importlib.util.find_spec("detectron2._C"):
    import detectron2._C
"""

# Only some tests and programs need them. Part -> packages.
PARTS = {
    "crf": ["pydensecrf2"],
    "export": ["onnx", "onnxruntime"],
    "app": ["gradio"],
}

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


class Environment:
    """A virtual environment, its interpreter, and pip in it."""

    def __init__(self, folder: Path, run=subprocess.run) -> None:
        """
        Args:
            folder: of the environment; need not exist.
            run: the interface of `subprocess.run`.
        """
        # Absolute without resolving links: Python finds its environment by the path it runs as.
        self.folder = folder.absolute()
        self.constraints = CONSTRAINTS
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = self.folder / scripts / ("python.exe" if os.name == "nt" else "python")
        self._run = run

    def create(self, system_site_packages: bool = False, clear: bool = False) -> None:
        """Create the environment with the running interpreter, unless it is there."""
        config = self.folder / "pyvenv.cfg"
        if self.folder.exists() and not config.exists() and any(self.folder.iterdir()):
            raise SetupError(f"{self.folder} exists and is not a virtual environment: name another")
        if self.python.exists() and not clear:
            made_with = re.search(r"^version\w* *= *(\d+\.\d+)", config.read_text(), re.MULTILINE)
            running = "{}.{}".format(*sys.version_info)
            if made_with and made_with.group(1) != running:
                raise SetupError(
                    f"{self.folder} was made with Python {made_with.group(1)}, this is {running}. "
                    "Use --force to make it anew, or --venv for another folder."
                )
            return
        options = ["--clear"] if clear else []
        options += ["--system-site-packages"] if system_site_packages else []
        result = self.execute([sys.executable, "-m", "venv", *options, str(self.folder)])
        if result.returncode != 0:
            raise SetupError(f"Python could not create {self.folder}: {result.stdout.strip()}")
        if system_site_packages:
            self._drop_pins_of_installed()

    def _drop_pins_of_installed(self) -> None:
        code = "import importlib.metadata as m; print(*{d.name for d in m.distributions()})"
        installed = self.execute([str(self.python), "-c", code]).stdout.split()
        self.constraints = self.folder / "constraints.txt"
        self.constraints.write_text(unpinned(CONSTRAINTS.read_text(), installed))

    def execute(self, command: list[str], **options) -> subprocess.CompletedProcess:
        """Run a command with the environment's programs (ninja, for one) first on the PATH."""
        env = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1")
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
        return self._run(command, **{**merged, **options})

    def pip(self, *arguments: str) -> None:
        """Run pip, silently unless it fails; then show its output and explain it."""
        options = ["--quiet", "--disable-pip-version-check"]
        command = [str(self.python), "-m", "pip", arguments[0], *options, *arguments[1:]]
        result = self.execute(command)
        if result.returncode != 0:
            print("\n".join(f"    | {line}" for line in result.stdout.splitlines()[-30:]))
            raise SetupError(f"pip {arguments[0]} failed: {explain_pip_failure(result.stdout)}")

    def install(self, *arguments: str) -> None:
        """Install packages at the versions of the constraints."""
        self.pip("install", "-c", str(self.constraints), *arguments)

    def imports_detectron2(self) -> bool:
        """Whether the interpreter imports Detectron2 and its compiled part, if it has one."""
        # Not from the current folder, where a checkout may lie beside us.
        command = [str(self.python), "-c", IMPORT_CHECK]
        return self.execute(command, cwd=str(self.folder)).returncode == 0


def unpinned(constraints: str, installed: list[str]) -> str:
    """Drop the lines of a constraints file that pin packages which are installed already."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    present = {plain(name) for name in installed}
    lines = constraints.splitlines(keepends=True)
    return "".join(line for line in lines if plain(line.split("==")[0].strip()) not in present)


def explain_pip_failure(output: str) -> str:
    """Say in one sentence why pip failed, from what it printed."""
    python = "{}.{}".format(*sys.version_info)
    for pattern, meaning in PIP_FAILURES:
        match = re.search(pattern, output)
        if match:
            return meaning.format(python=python, **match.groupdict())
    return "see its output above."


def check_machine(folder: Path, needs_space: bool) -> None:
    """Raise SetupError unless this Python and the disk can hold an environment with PyTorch."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise SetupError(
            f"this is Python {platform.python_version()}, but the tested packages have wheels for "
            "3.10 to 3.13 only. Name another interpreter: make env PYTHON=python3.11"
        )
    for module in ("venv", "ensurepip"):  # Debian packs them separately
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"this Python has no module {module}, which virtual environments need. Install it "
                "(Debian, Ubuntu: apt install python3-venv)."
            )
    if not needs_space:
        return
    folder = folder.absolute()
    place = next(x for x in (folder, *folder.parents) if x.is_dir())
    needs = [(place, GIGABYTES_INSTALLED)]
    # A small memory disk on /tmp is common; pip unpacks its downloads there.
    temporary = Path(tempfile.gettempdir())
    if temporary.stat().st_dev != place.stat().st_dev:
        needs.append((temporary, GIGABYTES_DOWNLOADED))
    for place, needed in needs:
        free = shutil.disk_usage(place).free / 1e9
        if free < needed:
            raise SetupError(
                f"{place} has {free:.1f} GB free, and PyTorch with its CUDA libraries needs "
                f"{needed:.0f} GB there. Free some space, name another folder with --venv, or set "
                "TMPDIR."
            )


def missing_build_tool() -> str | None:
    """Say what is missing to compile a C++ extension for Python; None if nothing is."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return (
            f"there is no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt install g++) "
            "or set CXX."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return (
            f"the headers of Python {platform.python_version()} are missing (Python.h); install "
            "them (Debian, Ubuntu: apt install python3-dev)."
        )
    return None


def check_reachable(url: str, run=subprocess.run) -> None:
    """Raise SetupError unless git can read a repository, within seconds."""
    if not shutil.which("git"):
        raise SetupError("there is no git (Debian, Ubuntu: apt install git).")
    command = ["git", "ls-remote", "--exit-code", url, "HEAD"]
    env = dict(os.environ, GIT_TERMINAL_PROMPT="0")
    try:
        result = run(command, env=env, capture_output=True, text=True, timeout=REACH_SECONDS)
    except subprocess.TimeoutExpired:
        raise SetupError(f"{url} does not answer within {REACH_SECONDS} s.") from None
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["git gave no reason"]
        raise SetupError(f"{url} cannot be reached ({lines[-1]}).")


def install_detectron2(environment: Environment, requested: str | None = None) -> None:
    """
    Make `import detectron2` work in an environment.

    Args:
        environment: has torch, setuptools, wheel and ninja.
        requested: "official", "pure-python" or any pip requirement; None: keep what can be
            imported already, else the first of the two that works.
    """
    if not requested and environment.imports_detectron2():
        print("    a Detectron2 is importable already: kept")
        return
    sources = {"official": _install_official, "pure-python": _install_pure_python}
    if requested and requested not in sources:
        _install_from(environment, requested)
        sources = {}
    reasons = []
    for name in [requested] if requested in sources else sources:
        try:
            sources[name](environment)
            break
        except SetupError as error:
            print(f"    not from the {name} source: {error}")
            reasons.append(f"{name}: {error}")
    else:
        if sources:
            raise SetupError(
                f"Detectron2 could not be installed. {' '.join(reasons)} Remedy that, or name a "
                "source with --detectron2 (a path, a wheel or a git URL)."
            )
    if not environment.imports_detectron2():
        raise SetupError(
            "Detectron2 was installed but cannot be imported; see the message of "
            f"`{environment.python} -c 'import detectron2, detectron2._C'`, or name another "
            "source with --detectron2."
        )


def _install_official(environment: Environment) -> None:
    missing = missing_build_tool()
    if missing:
        raise SetupError(missing)
    check_reachable(OFFICIAL_URL)
    _install_from(environment, f"git+{OFFICIAL_URL}@{OFFICIAL_COMMIT}")


def _install_pure_python(environment: Environment) -> None:
    sdist, sha256 = detectron2_wheel.SDIST_REQUIREMENT, detectron2_wheel.SDIST_SHA256
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{sdist} --hash=sha256:{sha256}\n")
        # Downloading runs the setup.py of the archive, which imports torch: hence no isolation.
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        environment.pip("download", *options, "-r", str(requirements), "-d", folder)
        (archive,) = Path(folder).glob("*.tar.gz")
        _install_from(environment, str(detectron2_wheel.build_wheel(archive, Path(folder))))


def _install_from(environment: Environment, requirement: str) -> None:
    print(f"    from {requirement}", flush=True)
    # What is there is removed first: pip would keep another build of the same version.
    environment.pip("uninstall", "--yes", "detectron2")
    # Without isolation: setup.py of Detectron2 imports torch.
    environment.install("--no-build-isolation", requirement)


def install_part(environment: Environment, part: str) -> None:
    """Try to install the packages of an optional part; what cannot be had is left out."""
    packages = PARTS[part]
    print(f"install {', '.join(packages)} (optional)", flush=True)
    reason = missing_build_tool() if part == "crf" else None
    try:
        if reason:
            raise SetupError(reason)
        environment.install(*packages)
    except SetupError as error:
        print(f"left out: {error}")


def describe() -> list[str]:
    """
    Describe the running interpreter, for a log or the header of a test report.

    Returns:
        Two lines: the main packages, and which Detectron2 there is and where it came from.
    """
    installed = {}
    for name in ("torch", "torchvision", "numpy", "Pillow", "detectron2"):
        try:
            installed[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
    detectron2 = installed.pop("detectron2", None)
    packages = ", ".join(f"{name} {x.version}" for name, x in installed.items())
    lines = [f"Python {platform.python_version()}, {packages or 'without PyTorch'}"]
    if detectron2 is None:
        return [*lines, "Detectron2 is not installed: run `make env`"]
    # What pip noted about a package that came from a path or a URL.
    origin = json.loads(detectron2.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    at_commit = f", commit {commit}" if commit else ""
    # The version of the pure-Python wheel says what it is.
    source = f", from {origin['url']}" if "url" in origin and "+" not in detectron2.version else ""
    return [*lines, f"Detectron2 {detectron2.version}{at_commit}{source}"]


def inputs_hash(options: list[str]) -> str:
    """Hash everything that decides what the environment holds, but for the Detectron2 asked for."""
    digest = hashlib.sha256()
    for path in ("constraints.txt", "setup.cfg", "pyproject.toml"):
        digest.update((ROOT / path).read_bytes())
    digest.update(json.dumps([str(ROOT), list(sys.version_info[:2]), *options]).encode())
    return digest.hexdigest()


def set_up(environment: Environment, args: argparse.Namespace) -> None:
    """Make the environment, step by step."""
    has_torch = any(environment.folder.glob("lib/python*/site-packages/torch"))
    needs_space = args.force or not (has_torch or args.system_site_packages)
    check_machine(environment.folder, needs_space)
    print(f"[1/4] make {environment.folder} with {sys.executable}", flush=True)
    environment.create(args.system_site_packages, clear=args.force)
    print("[2/4] install PyTorch and the build tools (downloads 2.5 GB once)", flush=True)
    environment.install("setuptools", "wheel", "ninja", "numpy", "torch", "torchvision")
    print("[3/4] install Detectron2", flush=True)
    install_detectron2(environment, args.detectron2)
    print("[4/4] install this project with its light models, reports, sweeps and tests", flush=True)
    environment.install("-e", f"{ROOT}[timm,report,sweep,dev]")
    print(f"ready: {environment.folder}")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    text = "the folder of the environment; default: .venv in the repository"
    add("--venv", type=Path, default=ROOT / ".venv", metavar="FOLDER", help=text)
    add(
        "--detectron2",
        default=os.environ.get("DETECTRON2_SOURCE") or None,
        metavar="REQUIREMENT",
        help="where Detectron2 comes from: anything `pip install` takes (a path, a wheel, a git "
        'URL), or one of the words "official" and "pure-python"',
    )
    add(
        "--system-site-packages",
        action="store_true",
        help="see and keep the packages of the interpreter (a container or cluster with its own "
        "torch); pins then hold only for what is missing",
    )
    add(
        "--with",
        dest="parts",
        nargs="+",
        choices=tuple(PARTS),
        default=[],
        help='also try to get: "crf", pydensecrf, the implementation of the paper (compiles); '
        '"export", onnx and onnxruntime for `tsmask export`; "app", gradio for `tsmask app`. What '
        "cannot be had is left out with a reason",
    )
    add("--force", action="store_true", help="empty the folder first and do every step again")
    text = "only print the versions of the main packages of the running interpreter"
    add("--describe", action="store_true", help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = get_parser().parse_args(argv)
    if args.describe:
        print("\n".join(describe()))
        return 0
    environment = Environment(args.venv)
    stamp = environment.folder / STAMP_NAME
    inputs = inputs_hash([str(args.system_site_packages)])
    written = json.loads(stamp.read_text()) if stamp.is_file() else {}
    # Without a request for a certain Detectron2, any will do.
    is_wanted = args.detectron2 in (None, written.get("detectron2"))
    is_current = written.get("inputs") == inputs and is_wanted
    try:
        if is_current and not args.force:
            print(f"{args.venv} is up to date (--force makes it anew)")
        else:
            if stamp.exists():
                stamp.unlink()  # so that an interrupted run does not pass for a complete one
            set_up(environment, args)
            written = {"inputs": inputs, "detectron2": args.detectron2, "tried": []}
            stamp.write_text(json.dumps(written) + "\n")
        for part in args.parts:
            if part not in written["tried"]:
                install_part(environment, part)
                # Also where it could not be had: each `make test` would try again for minutes.
                written["tried"].append(part)
                stamp.write_text(json.dumps(written) + "\n")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
