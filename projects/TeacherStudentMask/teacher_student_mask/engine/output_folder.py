"""What a run finds in OUTPUT_DIR: may it write there, and what an interrupted run has left."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterator

from fvcore.common.checkpoint import Checkpointer

from .atomic_files import WriteError, is_partial_file, is_remote

__all__ = [
    "check_last_checkpoint",
    "check_output_dir",
    "explain_write_errors",
    "tidy_output_dir",
]

logger = logging.getLogger(__name__)

# What only writing can meet; a permission may be missing for reading, too.
_WRITING_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_BLOCK = 1 << 16


def check_output_dir(output_dir: str) -> None:
    """
    Make the folder if it is not there, and try whether a file can be written into it.

    Args:
        output_dir: OUTPUT_DIR; a remote one is not looked at.

    Raises:
        WriteError: it is no folder, or nothing can be written there; says why.
    """
    if not output_dir or is_remote(output_dir):
        return
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"0")
    except OSError as error:
        raise WriteError(
            error.errno,
            f"Nothing can be written to OUTPUT_DIR {output_dir!r} ({error.strerror}); name a "
            "folder that can be written to, with OUTPUT_DIR in the config or on the command line.",
        ) from error


def tidy_output_dir(output_dir: str) -> None:
    """
    Take away what a run that was killed while writing has left.

    These are files of :func:`open_atomically` that are not complete, and the beginning of a last
    line in metrics.json, which the next line would be joined to.

    Args:
        output_dir: OUTPUT_DIR; nothing happens if it is remote or not there.
    """
    if is_remote(output_dir) or not os.path.isdir(output_dir):
        return
    for name in sorted(os.listdir(output_dir)):
        if is_partial_file(name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(output_dir, name))
            logger.warning(f"Removed {name}, left by a run that was interrupted while writing it.")
    metrics = os.path.join(output_dir, "metrics.json")
    if os.path.isfile(metrics):
        _cut_unfinished_line(metrics)


def _cut_unfinished_line(path: str) -> None:
    with open(path, "r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - _BLOCK, 0)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
            logger.warning(
                f"Removed {size - end} bytes from the end of {path}, a line that an interrupted "
                "run did not finish."
            )


def check_last_checkpoint(checkpointer: Checkpointer) -> None:
    """
    Find out before a run goes on whether the checkpoint named last can be used.

    Args:
        checkpointer: of the run.

    Raises:
        FileNotFoundError: "last_checkpoint" names a file that is not there.
        ValueError: the file is damaged.
    """
    folder = checkpointer.save_dir
    if is_remote(folder) or not checkpointer.has_checkpoint():
        return
    path = checkpointer.get_checkpoint_file()
    named, exists = os.path.basename(path), os.path.isfile(path)
    if exists and zipfile.is_zipfile(path):
        return
    others = sorted(x for x in os.listdir(folder) if x.endswith(".pth") and x != named)
    remedy = (
        f"Write the name of another checkpoint into last_checkpoint (there are: "
        f"{', '.join(others) or 'none'}), or train from the start without --resume."
    )
    if not exists:
        raise FileNotFoundError(
            f"{os.path.join(folder, 'last_checkpoint')} names {named!r}, which is no file there. "
            + remedy
        )
    raise ValueError(
        f"{path} is damaged: PyTorch's file format does not end where it ends. {remedy}"
    )


@contextlib.contextmanager
def explain_write_errors(output_dir: str) -> Iterator[None]:
    """
    End a run whose disk is full, or no longer writable, with the sentence that says so.

    When a checkpoint or a log cannot be written Detectron2 still runs what ends a training; what
    goes wrong there, and names no file, would be what is seen.

    Args:
        output_dir: OUTPUT_DIR.

    Raises:
        WriteError: in the place of an exception of the block that comes from a failure to write.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        cause = _first_write_error(error)
        if cause is None:
            raise
        said = cause.strerror
        if not isinstance(cause, WriteError):
            said = (
                f"A log or result in OUTPUT_DIR {output_dir!r} could not be written "
                f"({cause.strerror}); the checkpoints there are complete. Make room, then go on "
                "with --resume."
            )
        raise WriteError(cause.errno, said) from error


def _first_write_error(error: BaseException | None) -> OSError | None:
    """Of an exception and those that it was raised while handling, the first about writing."""
    found = None
    while error is not None:
        if isinstance(error, WriteError):
            return error
        if isinstance(error, OSError) and error.errno in _WRITING_FAILED:
            found = error
        error = error.__cause__ or error.__context__
    return found
