"""
Changing single rows of a large json file and nothing else, byte for byte.

The file is read piece by piece and never held as a whole. Each byte is taken as one character
(Latin-1), so that positions in the text are positions in the file; all that has a meaning in json
is ASCII. Strings with other characters come out garbled in values; ``json.loads`` of the raw bytes
gives them right.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from teacher_student_mask.checks.annotation_report import short_repr

__all__ = ["JsonRows", "Piece", "splice"]

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")
# Bytes that are read at a time, or more where one value is longer.
_CHUNK = 1 << 20
# Longest word or escape that the end of the text can cut: "-Infinity", "\ud83d\ude00".
_LONGEST_WORD = 16
_BYTE_ORDER_MARK = codecs.BOM_UTF8.decode("latin-1")


class Piece(NamedTuple):
    """
    A part of the file.

    Attributes:
        raw: its bytes.
        offset: of the first one in the file.
        key: the top-level list that the piece is a row of, such as "annotations"; None for what
            stands between rows.
        value: of the row, strings that are not ASCII garbled; None for what is no row.
    """

    raw: bytes
    offset: int
    key: str | None = None
    value: object = None


class JsonRows:
    """
    The rows of the lists at the top of a json file, such as COCO's annotations.

    Iterating yields every byte of the file in the order of the file, once: each element of each
    list that is a value of the top-level object is a piece, and so is the text between two. Memory
    is that of the longest piece. A byte order mark alone is left out: pycocotools, and with it
    training and evaluation, could not read a copy that has one.

    Attributes:
        path: of the file.
        sha256: hexadecimal, of the whole file, a byte order mark included; "" until it has been
            read to its end.
        no_lists: {key at the top: a short text of its value} of those that are no list.
        lists: the keys at the top that are lists.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.sha256 = ""
        self.lists: set[str] = set()
        self.no_lists: dict[str, str] = {}

    def __iter__(self) -> Iterator[Piece]:
        """
        Raises:
            OSError: the file cannot be read.
            ValueError: it is no json object in UTF-8, or has a key twice at its top; names the file
                and the byte.
        """
        self.lists, self.no_lists = set(), {}
        with open(self.path, "rb") as stream:
            window = _Window(stream, self.path)
            window.skip_byte_order_mark()
            yield from self._pieces(window)
            self.sha256 = window.digest.hexdigest()

    def _pieces(self, window: _Window) -> Iterator[Piece]:
        window.read_one_of("{")
        is_empty = window.next_character() == "}"
        if is_empty:
            window.read_one_of("}")
        while not is_empty:
            if window.next_character() != '"':
                window.read_one_of('"')
            key = window.read_value()
            if key in self.lists or key in self.no_lists:
                raise window.error(f"the key {key!r} stands twice at the top of the file")
            window.read_one_of(":")
            if window.next_character() == "[":
                self.lists.add(key)
                yield from _rows(window, key)
            else:
                self.no_lists[key] = short_repr.repr(window.read_value())
            is_empty = window.read_one_of(",}") == "}"
        if window.next_character():
            raise window.error("found text behind the json object")
        yield Piece(*window.take())


class _Window:
    """The part of the file that is in memory: the piece that is being read, and what follows."""

    def __init__(self, stream: BinaryIO, path: str):
        self.digest = hashlib.sha256()
        self._stream, self._path = stream, path
        self._text, self._start = "", 0  # where the text begins in the file
        self._mark = 0  # where the piece begins in the text
        self._position = 0  # how far it has been read
        self._is_complete = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def skip_byte_order_mark(self) -> None:
        """At the beginning of the file; no piece has it."""
        while len(self._text) < len(_BYTE_ORDER_MARK) and not self._is_complete:
            self._read_more()
        if self._text.startswith(_BYTE_ORDER_MARK):
            self._mark = self._position = len(_BYTE_ORDER_MARK)

    def next_character(self) -> str:
        """The next one that is not blank, which stays to be read; "" at the end of the file."""
        while True:
            self._position = _BLANK.match(self._text, self._position).end()
            if self._position < len(self._text) or self._is_complete:
                return self._text[self._position : self._position + 1]
            self._read_more()

    def read_one_of(self, allowed: str) -> str:
        character = self.next_character()
        if not character or character not in allowed:
            found = repr(character) if character else "the end of the file"
            raise self.error(f"found {found}; allowed: {' or '.join(allowed)}")
        self._position += 1
        return character

    def read_value(self) -> object:
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._is_complete or not self._may_be_cut(error):
                    raise self.error(error.msg, error.pos - self._position) from error
            except ValueError as error:
                # Python's limit; json has none. Reading on would not help.
                digits = f"more than {sys.get_int_max_str_digits()} digits"
                raise self.error(f"a value with a whole number of {digits}") from error
            except RecursionError as error:
                raise self.error("lists within lists, too deep to read") from error
            else:
                # A number may go on in what has not been read yet: of "1.0e+2" all that is read of
                # "1.0e+" is the 1.0.
                if end + _LONGEST_WORD <= len(self._text) or self._is_complete:
                    self._position = end
                    return value
            self._read_more()

    def take(self) -> tuple[bytes, int]:
        """The piece, as far as it has been read, and its offset; the next one begins here."""
        raw = self._text[self._mark : self._position].encode("latin-1")
        offset = self._start + self._mark
        self._mark = self._position
        return raw, offset

    def error(self, problem: str, distance: int = 0) -> ValueError:
        byte = self._start + self._position + distance
        return ValueError(
            f"{self._path}: byte {byte}: {problem}. The file must be a json object in UTF-8, as "
            'COCO\'s {"images": [...], "annotations": [...], "categories": [...]}.'
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        # Whether more of the file could help.
        is_at_end = error.pos > len(self._text) - _LONGEST_WORD
        return is_at_end or error.msg.startswith("Unterminated string")

    def _read_more(self) -> None:
        data = self._stream.read(max(_CHUNK, len(self._text) - self._mark))
        self._is_complete = not data
        try:
            self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            read = self._start + len(self._text)
            raise ValueError(
                f"{self._path}: near byte {read + error.start}: no UTF-8 ({error.reason}); save "
                "the file in UTF-8."
            ) from error
        self.digest.update(data)
        self._text = self._text[self._mark :] + data.decode("latin-1")
        self._start += self._mark
        self._position -= self._mark
        self._mark = 0


def _rows(window: _Window, key: str) -> Iterator[Piece]:
    window.read_one_of("[")
    if window.next_character() == "]":
        window.read_one_of("]")
        return
    while True:
        window.next_character()
        yield Piece(*window.take())
        value = window.read_value()
        yield Piece(*window.take(), key, value)
        if window.read_one_of(",]") == "]":
            return


def splice(raw: bytes, changes: Mapping[str, object]) -> bytes:
    """
    Set members of a json object in its text, and leave every other byte of it as it is.

    A member that is there gets its new value in its place. New ones follow the last one, in the
    order of ``changes``, with the blanks that stand before and within that one.

    Args:
        raw: the text of one json object.
        changes: {key, in ASCII: new value}.

    Returns:
        The text with the changes; ``json.loads`` of it is ``json.loads(raw) | changes``.

    Raises:
        ValueError: it is no object, or has a key of ``changes`` twice.
    """
    text = raw.decode("latin-1")
    members, end = _members(text)
    parts, done = [], 0
    remaining = dict(changes)
    for member in members:
        if member.key not in changes:
            continue
        if member.key not in remaining:
            raise ValueError(f"the key {member.key!r} stands twice; allowed: once")
        parts += [text[done : member.value_start], json.dumps(remaining.pop(member.key))]
        done = member.value_end
    insert_at = members[-1].value_end if members else end
    comma, colon = ", ", ": "
    if members:
        colon = text[members[-1].key_end : members[-1].value_start]
    if len(members) > 1:
        comma = text[members[-2].value_end : members[-1].key_start]
    parts.append(text[done:insert_at])
    for i, (key, value) in enumerate(remaining.items()):
        parts.append(comma if members or i else "")
        parts.append(f"{json.dumps(key)}{colon}{json.dumps(value)}")
    parts.append(text[insert_at:])
    return "".join(parts).encode("latin-1")


class _Member(NamedTuple):
    key: str
    key_start: int
    key_end: int
    value_start: int
    value_end: int


def _members(text: str) -> tuple[list[_Member], int]:
    """The members of an object, and where it ends."""
    try:
        is_object = isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        is_object = False
    if not is_object:
        raise ValueError(f"{text[:200]} is no json object.")
    members = []
    position = _skip_blank(text, text.index("{") + 1)
    while text[position] != "}":
        # At a key, or at the comma before one; json.loads has found the text to be right.
        if text[position] == ",":
            position = _skip_blank(text, position + 1)
        key_start = position
        key, key_end = _DECODER.raw_decode(text, position)
        value_start = _skip_blank(text, _skip_blank(text, key_end) + 1)
        _, value_end = _DECODER.raw_decode(text, value_start)
        members.append(_Member(key, key_start, key_end, value_start, value_end))
        position = _skip_blank(text, value_end)
    return members, position


def _skip_blank(text: str, position: int) -> int:
    return _BLANK.match(text, position).end()
