"""Files that are there as a whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import IO

__all__ = [
    "AtomicPathManager",
    "PARTIAL_SUFFIX",
    "WriteError",
    "is_remote",
    "is_partial_file",
    "open_atomically",
]

# Of the file beside the target that is written first; no loader of ".pth" takes it for one.
PARTIAL_SUFFIX = ".partial"


class WriteError(OSError):
    """A file could not be written; those that were there before are as they were."""


class AtomicPathManager:
    """
    A path manager, all of whose local files opened to be written appear at once when closed.

    For :attr:`Checkpointer.path_manager`. It does all else, and all that is not local, as the
    path manager below it does.
    """

    def __init__(self, path_manager):
        """
        Args:
            path_manager: Detectron2's, or another with its methods.
        """
        self.path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self.path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        """
        As the method of the path manager below; of a file to be written it returns a context
        manager, see :func:`open_atomically`.
        """
        if mode not in ("w", "wb", "wt") or is_remote(path):
            return self.path_manager.open(path, mode, **kwargs)
        return open_atomically(path, mode, **kwargs)


@contextlib.contextmanager
def open_atomically(
    path: str | os.PathLike, mode: str = "w", encoding: str | None = None
) -> Iterator[IO]:
    """
    Write a local file that takes its name, and the place of an older one, once it is complete.

    Args:
        path: the file; of a link the file it points to.
        mode: "w" or "wt" for text, "wb" for bytes.
        encoding: of text; None: UTF-8.

    Yields:
        A file that can be written to. If the block raises, the older file stays.

    Raises:
        WriteError: the disk is full, the folder read-only, ...; says which and that the older
            file, if any, is as it was.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.{os.getpid()}{PARTIAL_SUFFIX}")
    with _as_write_error(path):
        raw = _PatientFile(partial, "w")
    try:
        buffer = io.BufferedWriter(raw)
        with buffer if "b" in mode else io.TextIOWrapper(buffer, encoding or "utf-8") as stream:
            yield stream
            stream.flush()
            with _as_write_error(path):
                raw.finish()
        with _as_write_error(path):
            os.replace(partial, path)
            _sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


class _PatientFile(io.FileIO):
    """
    Keeps the first error until :meth:`finish`.

    An error raised from a write would pass through the C++ of torch.save, which hides it behind
    one of its own ("unexpected pos 704 vs 598").
    """

    error: OSError | None = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        os.fsync(self.fileno())


@contextlib.contextmanager
def _as_write_error(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(
            error.errno,
            f"{path} could not be written ({error.strerror}); files that were there before, "
            "earlier checkpoints among them, are as they were.",
        ) from error


def _sync_folder(folder: str) -> None:
    # Without it a power failure may bring the older file back. Not all file systems can.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_remote(path: str) -> bool:
    """Whether a path manager finds the path elsewhere than on a file system."""
    return "://" in os.fspath(path)


def is_partial_file(name: str) -> bool:
    """Whether a file of this name is what :func:`open_atomically` leaves if its process dies."""
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)
