"""What only some tests and programs need: tried once, left out with a reason if not to be had."""

import os
import shutil
import subprocess
from typing import Callable, Dict, Optional

from environment import detectron2_source
from environment.detectron2_wheel import SetupError
from environment.virtual_environment import VirtualEnvironment

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def install_crf(environment: VirtualEnvironment) -> None:
    """
    Tries to install the extra `crf`, which compiles for minutes.
    """
    print("install pydensecrf (optional; compiles for some minutes)", flush=True)
    missing = detectron2_source.missing_build_tool()
    if missing:
        print(f"left out: {missing}")
        return
    _pip_install(environment, "pydensecrf2")


def install_browser(environment: VirtualEnvironment) -> None:
    """
    Tries to install Playwright and, where this user may install system packages, Chromium.
    """
    print("install what tests of the report in a browser need (optional)", flush=True)
    reason = None if find_browser() else install_chromium()
    if reason:
        print(f"left out: {reason}")
        return
    _pip_install(environment, "playwright")


def install_export(environment: VirtualEnvironment) -> None:
    """
    Tries to install the extra `export`: ONNX files and onnxruntime, 110 MB.
    """
    print("install onnx and onnxruntime (optional)", flush=True)
    _pip_install(environment, "onnx", "onnxruntime")


def install_app(environment: VirtualEnvironment) -> None:
    """
    Tries to install the extra `app`: gradio with some 35 packages, 220 MB.
    """
    print("install gradio (optional; some 35 packages)", flush=True)
    _pip_install(environment, "gradio")


def find_browser() -> Optional[str]:
    """
    Returns the path of Chromium or Chrome, if there is one.
    """
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def install_chromium(run: Callable = subprocess.run) -> Optional[str]:
    """
    Installs Debian's Chromium; returns why not, if it could not.
    """
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "there is no Chromium (Debian, Ubuntu: sudo apt install chromium)"
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        command = ["apt-get", "-qq", *arguments]
        try:
            result = run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=600,
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)} took more than 10 minutes"
        if result.returncode != 0:
            last = (result.stdout.strip().splitlines() or ["no output"])[-1]
            return f"{' '.join(command)} failed: {last}"
    return None


def _pip_install(environment: VirtualEnvironment, *packages: str) -> None:
    try:
        environment.pip("install", *environment.pins(), *packages)
    except SetupError as error:
        print(f"left out: {error}")


PARTS: Dict[str, Callable[[VirtualEnvironment], None]] = {
    "crf": install_crf,
    "browser": install_browser,
    "export": install_export,
    "app": install_app,
}
