"""Reading of large json files."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Iterator

__all__ = ["paused_gc", "read_json"]


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


@paused_gc()
def read_json(path: str | os.PathLike) -> object:
    """
    Raises:
        OSError: the file cannot be read.
        ValueError: it is no json in UTF-8; the sentence does not name the file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            # pycocotools, which reads the same file in an evaluation, does not take one either.
            if file.read(1) == "\ufeff":
                raise ValueError(
                    "it begins with a byte order mark; save it as UTF-8 without one (in an editor, "
                    "or with: sed -i '1s/^\\xef\\xbb\\xbf//' FILE)"
                )
            file.seek(0)
            return json.load(file)
    except RecursionError as error:
        raise ValueError(f"lists within lists, too deep to read ({error})") from error
