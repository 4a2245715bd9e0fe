"""Reading and writing of json files as large as COCO's."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator

import msgspec

from .errors import InputError

__all__ = ["decode_json", "paused_gc", "read_json", "write_json"]


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """
    No garbage collection inside; also a decorator.

    A large file becomes millions of lists and dicts that all stay. Going through them for cycles
    again and again would take a third of the time of reading the file.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(path: str | os.PathLike) -> object:
    """
    Read a json file of any size.

    Raises:
        InputError: it cannot be read, or is not json in UTF-8.
    """
    try:
        return decode_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error}") from error


def decode_json(path: str | os.PathLike) -> object:
    """
    :func:`read_json` with sentences that do not name the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not json in UTF-8.
    """
    with open(path, "rb") as file:
        content = file.read()
    # pycocotools, which reads the same file in an evaluation, does not take one either.
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError(
            "it begins with a byte order mark; save it as UTF-8 without one (in an editor, or "
            "with: sed -i '1s/^\\xef\\xbb\\xbf//' FILE)"
        )
    try:
        with paused_gc():
            try:
                return msgspec.json.decode(content)
            except msgspec.MsgspecError:  # NaN, for instance, which Python's json writes and reads
                return json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"lists within lists, too deep to read ({error})") from error


def write_json(path: str | os.PathLike, data: dict) -> None:
    """
    Write a dict of lists, such as a COCO json, as a whole or not at all.

    Args:
        path: an existing file is replaced when all is written.
        data: its lists are written row by row: json.dump takes minutes for COCO's.

    Raises:
        InputError: the file cannot be written.
    """
    unfinished = f"{os.fspath(path)}.unfinished"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            for i, (key, value) in enumerate(data.items()):
                file.write(f"{', ' if i else '{'}{json.dumps(key)}: ")
                rows = value if isinstance(value, list) else []
                for j, row in enumerate(rows):
                    file.write(f"{', ' if j else '['}{json.dumps(row)}")
                file.write("]" if rows else json.dumps(value))
            file.write("}" if data else "{}")
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise InputError(f"{os.fspath(path)}: cannot be written: {error.strerror}") from error
