"""
Builds a pure-Python wheel of Detectron2 0.6 from a source distribution on PyPI.

Detectron2 has no release on PyPI. The source distribution named here holds the Python files of
upstream's tag v0.6, byte for byte, without the C++ sources. This project needs none of the
operators those compile to, so a wheel of the Python files alone is enough to train and evaluate
where the official repository cannot be reached. Only the standard library is used.
"""

from __future__ import annotations

import base64
import hashlib
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

OFFICIAL_URL = "https://github.com/facebookresearch/detectron2.git"
OFFICIAL_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"

SDIST_REQUIREMENT = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

VERSION = "0.6+purepython"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

# As in setup.py of v0.6, but for two: `black` was pinned to a release that does not run with
# current packages (upstream has since dropped the pin), and `dataclasses` is for Python 3.6.
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "future",
    "pydot",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
    "black",
)


class SetupError(Exception):
    """What went wrong, why, and what to do about it, in words for the user."""


class Patch(NamedTuple):
    """One change to a file of the source distribution."""

    path: str
    old: str
    new: str
    reason: str


PATCHES = (
    Patch(
        path="detectron2/data/transforms/transform.py",
        old="Image.LINEAR",
        new="Image.BILINEAR",
        reason="Pillow 10 removed the name Image.LINEAR",
    ),
    # Every COCOEvaluator uses the compiled evaluation unless told otherwise. Upstream's main
    # branch falls back to pycocotools in the same way when its C++ part is absent.
    Patch(
        path="detectron2/evaluation/coco_evaluation.py",
        old="from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        new="COCOeval_opt = COCOeval\n",
        reason="the fast COCO evaluation needs compiled code; pycocotools takes its place",
    ),
    # Through the stub, which says what is missing; torch would only say "no attribute".
    Patch(
        path="detectron2/layers/nms.py",
        old="    return torch.ops.detectron2.nms_rotated(",
        new="    from detectron2 import _C\n\n    return _C.nms_rotated(",
        reason="there is no compiled nms_rotated; the error says so",
    ),
)

STUB = f'''\
"""
Stands in for the compiled part of Detectron2, which this pure-Python build does not have.

The import works, so that everything that needs no compiled operator does too; using an operator
raises an error that says what to do. Written by tools/detectron2_wheel.py of TeacherStudentMask.
"""

IS_STUB = True
_ABSENT = "not available (pure-Python build of Detectron2)"


def get_compiler_version():
    return _ABSENT


def get_cuda_version():
    return _ABSENT


def has_cuda():
    return False


def __getattr__(name):
    # An AttributeError, so that hasattr() and getattr() with a default keep their meaning.
    raise AttributeError(
        f"detectron2._C.{{name}} is not available: this is the pure-Python build of Detectron2 "
        f"({VERSION}), which has no compiled operators. Install the compiled one with: "
        "pip install --no-build-isolation "
        "'git+{OFFICIAL_URL}@{OFFICIAL_COMMIT}'"
    )
'''

METADATA_HEAD = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 0.6 without its compiled operators (built by TeacherStudentMask)
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
License-File: LICENSE
Requires-Python: >=3.6
"""

WHEEL_FILE = """\
Wheel-Version: 1.0
Generator: TeacherStudentMask tools/detectron2_wheel.py
Root-Is-Purelib: true
Tag: py3-none-any
"""


def build_wheel(sdist: Path, folder: Path) -> Path:
    """
    Builds the pure-Python wheel.

    Args:
        sdist (Path): the source distribution, a .tar.gz file; pip has checked its SDIST_SHA256.
        folder (Path): where to write the wheel; must exist.

    Returns:
        Path: the wheel.
    """
    files = read_package(sdist)
    for patch in PATCHES:
        apply_patch(files, patch)
    files["detectron2/_C.py"] = STUB.encode()
    files[f"{DIST_INFO}/LICENSE"] = files.pop("LICENSE")
    files[f"{DIST_INFO}/METADATA"] = metadata(sdist.name).encode()
    files[f"{DIST_INFO}/WHEEL"] = WHEEL_FILE.encode()
    wheel = folder / WHEEL_NAME
    write_wheel(wheel, files)
    return wheel


def read_package(sdist: Path) -> dict[str, bytes]:
    """
    Reads the `detectron2` package and the licence from a source distribution.

    `detectron2/projects` is left out: it points at folders outside the package.

    Returns:
        dict[str, bytes]: contents by path, relative to the top folder of the archive.
    """
    files = {}
    with tarfile.open(sdist, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts[1:]
            if not member.isfile() or ".." in parts:
                continue
            in_package = parts[:1] == ("detectron2",) and parts[1:2] != ("projects",)
            if in_package or parts == ("LICENSE",):
                files["/".join(parts)] = archive.extractfile(member).read()
    return files


def apply_patch(files: dict[str, bytes], patch: Patch) -> None:
    """Makes one change in `files`, with a note at the top of the file, as the licence asks."""
    text = files[patch.path].decode()
    if patch.old not in text:
        raise SetupError(f"{patch.path} does not hold {patch.old.strip()!r}, which is to change.")
    note = f"# Modified by TeacherStudentMask: {patch.reason}.\n"
    files[patch.path] = (note + text.replace(patch.old, patch.new)).encode()


def metadata(sdist_name: str) -> str:
    """Returns the METADATA file of the wheel: names, requirements and where the files come from."""
    changes = "".join(f"- {patch.path}: {patch.reason}\n" for patch in PATCHES)
    return (
        METADATA_HEAD
        + "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
        + f"\nThe Python files of Detectron2 0.6, taken from {sdist_name}\n"
        + f"(SHA-256 {SDIST_SHA256}).\n\n"
        + "Changes:\n"
        + changes
        + "- detectron2/_C.py: a stand-in for the compiled operators, which are absent\n"
        + "- detectron2/projects: left out\n"
    )


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    """Writes a wheel, adding the RECORD file. The same files give the same bytes."""
    record: list[str] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest())
            record.append(f"{name},sha256={digest.decode().rstrip('=')},{len(files[name])}\n")
            archive.writestr(zip_entry(name), files[name])
        record.append(f"{DIST_INFO}/RECORD,,\n")
        archive.writestr(zip_entry(f"{DIST_INFO}/RECORD"), "".join(record))


def zip_entry(name: str) -> zipfile.ZipInfo:
    """Returns an entry with a fixed date and permissions -rw-r--r--."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o100644 << 16
    return entry
