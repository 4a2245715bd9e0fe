"""
What the processes of an unfinished run have done so far, on the disk, so that it can go on.

A folder holds "plan.json", which says what the run is about, and one file for each process. Such a
file has a line for each object and then one for its image; objects without the line of their image
do not count. Each line begins with a checksum of the rest, so what a kill or a power failure left
half written is found and cut off. "ranking.sha256" tells the ranking that the run has written
before it was interrupted from a file of somebody else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from teacher_student_mask.engine import open_atomically

__all__ = ["FinishedImage", "PartWriter", "Parts", "PartsError", "read_object", "sha256_of"]

logger = logging.getLogger("teacher_student_mask")


class PartsError(Exception):
    """The folder belongs to another run, or to one that is still going; says what to do."""


class FinishedImage(NamedTuple):
    """
    Attributes:
        part: number of the file, in the order of ``Parts.files()``.
        record: of the image.
        objects: (offset of the line in the file, record) of each object.
    """

    part: int
    record: dict
    objects: list[tuple[int, dict]]


class Parts:
    """The folder of an unfinished run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._plan_file = folder / "plan.json"
        self._ranking_file = folder / "ranking.sha256"

    def start(self, plan: Mapping[str, str]) -> None:
        """
        Make the folder, or find that it is of the same run and cut off what is half written.

        By one process, before any other looks.

        Args:
            plan: what must be the same for a run to go on, {what: its value}.

        Raises:
            PartsError: another plan, or another process is writing here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._plan_file.is_file():
            self.check(plan)
        else:
            with open_atomically(self._plan_file) as f:
                json.dump(dict(plan), f, indent=1)
        for path in self.files():
            with open(path, "r+b") as stream:
                _lock(stream, path)
                end = _end_of_last_image(stream)
                size = os.fstat(stream.fileno()).st_size
                if end < size:
                    stream.truncate(end)
                    logger.warning(
                        f"Removed {size - end} bytes from the end of {path}, images that an "
                        "interrupted run did not finish."
                    )

    def check(self, plan: Mapping[str, str]) -> None:
        """
        Raises:
            PartsError: the folder is not there, or of another run; names each difference.
        """
        try:
            old = json.loads(self._plan_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PartsError(
                f"{self._plan_file} is not there, though the first process wrote it: the folder of "
                "the output must be on a disk that all machines share."
            ) from error
        except ValueError as error:
            raise PartsError(
                f"{self._plan_file}: unreadable ({error}); --restart begins anew."
            ) from error
        if old == plan:
            return
        keys = [k for k in {**old, **plan} if old.get(k) != plan.get(k)]
        shown = "; ".join(f"{k}: {_difference(old.get(k), plan.get(k))}" for k in keys)
        raise PartsError(
            f"{self.folder} holds what an unfinished run has done, and this one differs: {shown}. "
            "Go on with the same command, or begin anew with --restart."
        )

    def files(self) -> list[Path]:
        """The files of the processes; their order stays while none is added."""
        return sorted(self.folder.glob("rank-*.jsonl"))

    def images(self) -> Iterator[FinishedImage]:
        """What has been finished, file after file."""
        for number, path in enumerate(self.files()):
            with open(path, "rb") as stream:
                for _, record, objects in _finished(stream):
                    yield FinishedImage(number, record, objects)

    def claim_ranking(self, sha256: str) -> None:
        """Say, before it takes its name, that a ranking with this content is of the run."""
        with open_atomically(self._ranking_file) as f:
            f.write(sha256)

    def has_written(self, path: Path) -> bool:
        """Whether a file is the ranking of the run, and nobody has changed it since."""
        try:
            return self._ranking_file.read_text(encoding="utf-8") == sha256_of(path)
        except (OSError, ValueError):
            return False

    def restart(self) -> None:
        """Throw away what has been done; the ranking is known to be of the run all the same."""
        claim = self._ranking_file.read_bytes() if self._ranking_file.is_file() else None
        self.remove()
        if claim is not None:
            self.folder.mkdir()
            self._ranking_file.write_bytes(claim)

    def remove(self) -> None:
        """Remove the folder with all that is in it; nothing happens if it is not there."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)


class PartWriter:
    """Adds to the file of one process. A context manager."""

    def __init__(self, parts: Parts, rank: int):
        """
        Args:
            parts: a folder that has been started.
            rank: of the process; no other has it at the same time.

        Raises:
            PartsError: another process is writing to the file.
        """
        path = parts.folder / f"rank-{rank:05d}.jsonl"
        self._stream = open(path, "ab")
        _lock(self._stream, path)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def add(self, record: dict, objects: list[dict]) -> None:
        """
        Add one finished image; it survives a kill of the process from here on.

        Args:
            record: of the image; has "image".
            objects: the records of its objects, none of which has "image".
        """
        self._stream.write(b"".join(_to_line(x) for x in (*objects, record)))
        self._stream.flush()


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal, of the content of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for data in iter(lambda: f.read(1 << 20), b""):
            digest.update(data)
    return digest.hexdigest()


def read_object(stream: BinaryIO, offset: int) -> dict:
    """The record of an object from the file of a process, of which an image was yielded."""
    stream.seek(offset)
    return _from_line(stream.readline())


def _to_line(record: dict) -> bytes:
    content = json.dumps(record).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _from_line(line: bytes) -> dict | None:
    # None if the line is not as it was written.
    checksum, _, content = line[:-1].partition(b" ")
    if line[-1:] != b"\n" or checksum != b"%08x" % zlib.crc32(content):
        return None
    return json.loads(content)


def _finished(stream: BinaryIO) -> Iterator[tuple[int, dict, list[tuple[int, dict]]]]:
    # Of each image where its lines end, its record and those of its objects.
    objects, offset = [], 0
    for line in stream:
        record = _from_line(line)
        if record is None:
            return
        end = offset + len(line)
        if "image" in record:
            yield end, record, objects
            objects = []
        else:
            objects.append((offset, record))
        offset = end


def _end_of_last_image(stream: BinaryIO) -> int:
    end = 0
    for end, *_ in _finished(stream):
        pass
    return end


def _lock(stream: BinaryIO, path: Path) -> None:
    # Goes with the process, however it ends.
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PartsError(f"{path}: another process is writing to it; wait for its end.") from error


def _difference(old: str | None, new: str | None) -> str:
    old, new = ("nothing" if x is None else x for x in (old, new))
    if "\n" not in old + new:
        return f"{old} before, now {new}"
    old_lines, new_lines = old.splitlines(), new.splitlines()
    gone = [x.strip() for x in old_lines if x not in new_lines]
    come = [x.strip() for x in new_lines if x not in old_lines]
    return f"{', '.join(gone[:5]) or 'nothing'} before, now {', '.join(come[:5]) or 'nothing'}"
