"""Decides where Detectron2 comes from, and installs it."""

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, Optional

from environment import detectron2_wheel
from environment.detectron2_wheel import OFFICIAL_COMMIT, OFFICIAL_URL, SetupError

REACH_SECONDS = 15

# Imports torch before the compiled part, which needs torch's libraries to be loaded. A compiled
# part that was built for another torch fails here, not in the middle of a training.
IMPORT_CHECK = """
import detectron2, importlib.util
if importlib.util.find_spec("detectron2._C"):
    import detectron2._C
"""


class SourceUnavailable(SetupError):
    """One source of Detectron2 cannot be used on this machine; the next one may."""


def obtain_detectron2(
    environment, requested: Optional[str] = None, log: Callable[[str], None] = print
) -> None:
    """
    Makes `import detectron2` work in an environment.

    A Detectron2 that can be imported already is kept. Otherwise the official repository is tried,
    then the pure-Python wheel. A source named by the user comes before all of these.

    Args:
        environment (VirtualEnvironment): has torch, setuptools, wheel and ninja.
        requested (str): "official", "pure-python" or any pip requirement.
        log (Callable): receives lines for the user.
    """
    if not requested and can_import(environment):
        log("a Detectron2 is importable already: kept")
        return
    if requested and requested not in SOURCES:
        log(f"from {requested}, as requested")
        install_requirement(environment, requested)
        record = {"source": f"pip requirement {requested}"}
    else:
        record = install_first(environment, [requested] if requested else list(SOURCES), log)
    if not can_import(environment):
        raise SetupError(
            "Detectron2 was installed but cannot be imported; see the message of "
            f"`{environment.python} -c 'import detectron2, detectron2._C'`, or name another "
            "source with --detectron2."
        )
    record["date"] = datetime.date.today().isoformat()
    environment.write_detectron2_record(record)


def install_first(environment, names: List[str], log: Callable[[str], None]) -> Dict[str, str]:
    """
    Installs from the first source that is available, and logs why the ones before are not.
    """
    reasons = []
    for name in names:
        try:
            record = SOURCES[name](environment)
        except SourceUnavailable as error:
            log(f"not from the {name} source: {error}")
            reasons.append(f"{name}: {error}")
        else:
            log(f"from {record['source']}")
            return record
    raise SetupError(
        "Detectron2 could not be installed. "
        + " ".join(reasons)
        + " Remedy that, or name a source with --detectron2 (a path, a wheel or a git URL)."
    )


def install_official(environment) -> Dict[str, str]:
    """
    Compiles the official repository at the tested commit; takes a few minutes at most.
    """
    missing = missing_build_tool()
    if missing:
        raise SourceUnavailable(missing)
    check_reachable(OFFICIAL_URL)
    try:
        install_requirement(environment, f"git+{OFFICIAL_URL}@{OFFICIAL_COMMIT}")
    except SourceUnavailable:
        raise
    except SetupError as error:
        raise SourceUnavailable(f"it did not install ({error})") from error
    return {"source": f"{OFFICIAL_URL} (compiled here)", "commit": OFFICIAL_COMMIT}


def install_pure_python(environment) -> Dict[str, str]:
    """
    Downloads the hash-checked source distribution, builds the pure-Python wheel, installs it.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(
            f"{detectron2_wheel.SDIST_REQUIREMENT} --hash=sha256:{detectron2_wheel.SDIST_SHA256}\n"
        )
        # Downloading runs the setup.py of the archive, which imports torch: hence no isolation.
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        environment.pip("download", *options, "-r", str(requirements), "-d", folder)
        sdists = list(Path(folder).glob("*.tar.gz"))
        if len(sdists) != 1:
            raise SetupError(
                f"pip left {len(sdists)} archives for {detectron2_wheel.SDIST_REQUIREMENT} where "
                "1 was expected; check the package index in use."
            )
        wheel = detectron2_wheel.build_wheel(sdists[0], Path(folder))
        install_requirement(environment, str(wheel))
    return {
        "source": f"{detectron2_wheel.SDIST_REQUIREMENT} from the package index",
        "sha256": detectron2_wheel.SDIST_SHA256,
    }


# In the order in which they are tried.
SOURCES: Dict[str, Callable] = {
    "official": install_official,
    "pure-python": install_pure_python,
}


def install_requirement(environment, requirement: str) -> None:
    """
    Installs a Detectron2 from any pip requirement.

    What is there is removed first: pip would keep another build of the same version.
    """
    environment.pip("uninstall", "--yes", "detectron2")
    # Without isolation: setup.py of Detectron2 imports torch.
    environment.pip("install", "--no-build-isolation", *environment.pins(), requirement)


def can_import(environment) -> bool:
    """
    Says whether the environment's interpreter imports Detectron2 and its compiled part, if any.
    """
    # Not from the current folder, where a checkout may lie beside us.
    return environment.python_runs(IMPORT_CHECK)


def missing_build_tool() -> Optional[str]:
    """
    Says what is missing to compile a C++ extension for Python; None if nothing is.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        return (
            f"there is no C++ compiler ({compiler}); install one "
            "(Debian, Ubuntu: apt install g++) or set CXX."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return (
            f"the headers of Python {platform.python_version()} are missing (Python.h); install "
            "them (Debian, Ubuntu: apt install python3-dev)."
        )
    return None


def check_reachable(url: str, run: Callable = subprocess.run) -> None:
    """
    Raises SourceUnavailable unless git can read a repository, within seconds.
    """
    if not shutil.which("git"):
        raise SourceUnavailable("there is no git (Debian, Ubuntu: apt install git).")
    command = ["git", "ls-remote", "--exit-code", url, "HEAD"]
    env = dict(os.environ, GIT_TERMINAL_PROMPT="0")
    try:
        result = run(command, env=env, capture_output=True, text=True, timeout=REACH_SECONDS)
    except subprocess.TimeoutExpired:
        raise SourceUnavailable(f"{url} does not answer within {REACH_SECONDS} s.") from None
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["git gave no reason"]
        raise SourceUnavailable(f"{url} cannot be reached ({lines[-1]}).")
