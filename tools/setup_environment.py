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

Behind a proxy or a mirror set HTTPS_PROXY or PIP_INDEX_URL; downloads are unpacked in TMPDIR.

examples:
  tools/setup_environment.py                                    the usual environment, in .venv
  tools/setup_environment.py --detectron2 ../detectron2         Detectron2 from a checkout of yours
  tools/setup_environment.py --detectron2 pure-python --force   from scratch, without a compiler
  python3.12 tools/setup_environment.py --venv .venv312         another interpreter and folder
  tools/setup_environment.py --system-site-packages             keep the torch of this Python
"""

from __future__ import annotations

import argparse
import functools
import hashlib
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
from pathlib import Path

import detectron2_wheel
from detectron2_wheel import OFFICIAL_COMMIT, OFFICIAL_URL, SetupError

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
STAMP_NAME = "setup-stamp.json"

PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest
# torch brings the CUDA libraries along, whether there is a GPU or not.
GIGABYTES_INSTALLED = 7.0
REACH_SECONDS = 15

# Imports torch before the compiled part, which needs torch's libraries to be loaded. A compiled
# part that was built for another torch fails here, not in the middle of a training.
IMPORT_CHECK = """
import detectron2, importlib.util
if importlib.util.find_spec("detectron2._C"):
    import detectron2._C
"""

# Extras of setup.cfg that only some tests and programs need.
PARTS = ("crf", "export", "app")


class Environment:
    """A virtual environment, its interpreter, and pip in it."""

    def __init__(self, folder: Path) -> None:
        """``folder`` of the environment need not exist."""
        # Absolute without resolving links: Python finds its environment by the path it runs as.
        self.folder = folder.absolute()
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = self.folder / scripts / ("python.exe" if os.name == "nt" else "python")
        # The pins without those of packages that the environment sees and keeps.
        self._own_constraints = self.folder / "constraints.txt"

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
            if system_site_packages:
                self._drop_pins_of_installed()
            return
        options = ["--clear"] if clear else []
        options += ["--system-site-packages"] if system_site_packages else []
        result = self.execute([sys.executable, "-m", "venv", *options, str(self.folder)])
        if result.returncode != 0:
            # A half-made one would pass for an environment the next time.
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SetupError(f"Python could not create {self.folder}: {result.stdout.strip()}")
        if system_site_packages:
            self._drop_pins_of_installed()

    def _drop_pins_of_installed(self) -> None:
        # Of the interpreter that the environment sees; its own packages follow the pins.
        code = "import importlib.metadata as m; print(*{d.name for d in m.distributions()})"
        installed = self.execute([sys.executable, "-c", code]).stdout.split()
        self._own_constraints.write_text(unpinned(CONSTRAINTS.read_text(), installed))

    def execute(self, command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run a command with the environment's programs (ninja, for one) first on the PATH."""
        env = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1")
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(  # nosec B603  # A list of arguments, without a shell.
            command, cwd=cwd, env=env, **output
        )

    def pip(self, *arguments: str) -> None:
        """Run pip, silently unless it fails; then show the end of its output."""
        options = ["--quiet", "--disable-pip-version-check"]
        command = [str(self.python), "-m", "pip", arguments[0], *options, *arguments[1:]]
        result = self.execute(command)
        if result.returncode != 0:
            print(
                "\n".join(f"    | {line}" for line in result.stdout.splitlines()[-30:]), flush=True
            )
            raise SetupError(f"pip {arguments[0]} failed, see above.")

    def install(self, *arguments: str) -> None:
        """Install packages at the versions of the constraints."""
        own = self._own_constraints
        self.pip("install", "-c", str(own if own.is_file() else CONSTRAINTS), *arguments)

    def imports_detectron2(self) -> bool:
        """Whether the interpreter imports Detectron2 and its compiled part, if it has one."""
        # Not from the current folder, where a checkout may lie beside us.
        command = [str(self.python), "-c", IMPORT_CHECK]
        return self.execute(command, cwd=self.folder).returncode == 0


def unpinned(constraints: str, installed: list[str]) -> str:
    """Drop the lines of a constraints file that pin packages which are installed already."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    present = {plain(name) for name in installed}
    lines = constraints.splitlines(keepends=True)
    return "".join(line for line in lines if plain(line.split("==")[0].strip()) not in present)


def check_machine(folder: Path, needs_space: bool) -> None:
    """Raise SetupError unless this Python and the disk can hold an environment with PyTorch."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise SetupError(
            f"this is Python {platform.python_version()}, but the tested packages have wheels for "
            "3.11 to 3.13 only. Name another interpreter: make env PYTHON=python3.11"
        )
    place = next(x for x in (folder, *folder.parents) if x.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    if needs_space and free < GIGABYTES_INSTALLED:
        raise SetupError(
            f"{place} has {free:.1f} GB free, and PyTorch with its CUDA libraries needs "
            f"{GIGABYTES_INSTALLED:.0f} GB there. Free some space or name another folder: --venv"
        )


def check_build_tools() -> None:
    """Raise SetupError unless a C++ extension for Python can be compiled."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        raise SetupError(
            f"there is no C++ compiler ({compiler}); install one (Debian, Ubuntu: apt install g++) "
            "or set CXX."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SetupError(
            f"the headers of Python {platform.python_version()} are missing (Python.h); install "
            "them (Debian, Ubuntu: apt install python3-dev)."
        )


def check_reachable(url: str) -> None:
    """Raise SetupError unless git can read a repository, within seconds."""
    command = ["git", "ls-remote", "--exit-code", url, "HEAD"]
    env = dict(os.environ, GIT_TERMINAL_PROMPT="0")
    options = {"stdout": subprocess.DEVNULL, "timeout": REACH_SECONDS, "check": True}
    try:
        # git itself prints why it failed.
        subprocess.run(command, env=env, **options)  # nosec B603  # As above.
    except (OSError, subprocess.SubprocessError) as error:
        raise SetupError(f"the repository cannot be reached: {error}") from error


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
    if requested:
        named = functools.partial(_install_from, requirement=requested)
        sources = {requested: sources.get(requested, named)}
    for name, install in sources.items():
        try:
            install(environment)
            if not environment.imports_detectron2():
                raise SetupError(
                    "it is installed, but cannot be imported; see the message of "
                    f"`{environment.python} -c 'import detectron2, detectron2._C'`."
                )
            return
        except SetupError as error:
            print(f"    not from {name}: {error}", flush=True)
    raise SetupError(
        "Detectron2 could not be installed, see above. Remedy that, or name a source with "
        "--detectron2 (a path, a wheel or a git URL)."
    )


def _install_official(environment: Environment) -> None:
    check_build_tools()
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
    print(f"install the extra {part} (optional)", flush=True)
    try:
        environment.install("-e", f"{ROOT}[{part}]")
    except SetupError as error:
        print(f"left out: {error}")


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
        choices=PARTS,
        default=[],
        help='also try to get: "crf", pydensecrf, the implementation of the paper (compiles); '
        '"export", onnx and onnxruntime for `tsmask export`; "app", gradio for `tsmask app`. What '
        "cannot be had is left out with a reason",
    )
    add("--force", action="store_true", help="empty the folder first and do every step again")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = get_parser().parse_args(argv)
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
