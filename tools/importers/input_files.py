"""The files that annotations are read from: texts, jsons, and the headers of images."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from teacher_student_mask.checks.image_checks import DEEP_MODES, TRANSPOSED, orientation_of
from teacher_student_mask.checks.reading import paused_gc

__all__ = [
    "ImageHeader",
    "InputError",
    "check_declared_size",
    "check_different",
    "read_header",
    "read_json",
    "read_text",
]

# What stands before the EXIF or XMP of a PNG.
_PNG_METADATA = re.compile(rb"eXIf|Raw profile type|XML:com\.adobe\.xmp")


class InputError(Exception):
    """The input cannot be imported; the message names file, place, value and what is allowed."""


@dataclass(frozen=True)
class ImageHeader:
    """An image file as training sees it, which turns images as their EXIF orientation says."""

    path: Path
    size: tuple[int, int]  # width and height after it was turned
    orientation: object  # of EXIF: 1 or None: as it is stored; 2 to 8: mirrored or turned

    @property
    def is_turned(self) -> bool:
        return self.orientation in range(2, 9)

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height for programs that do not look at EXIF."""
        return self.size[::-1] if self.orientation in TRANSPOSED else self.size


def read_header(path: Path, where: str) -> ImageHeader:
    """
    Args:
        path: of the image.
        where: what names the image, for the message.

    Raises:
        InputError: there is no such file, it is no image, or one that training would spoil.
    """
    try:
        with warnings.catch_warnings():
            # Of large images and odd metadata, which do no harm.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                mode, size, orientation = image.mode, image.size, _orientation_of(image, path)
    except FileNotFoundError as error:
        raise InputError(f"{where}: its image {path} does not exist.") from error
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise InputError(f"{where}: its image {path} cannot be read: {error}.") from error
    if mode.startswith(DEEP_MODES):
        raise InputError(
            f"{where}: its image {path} is in PIL's mode {mode!r}; allowed: 8 bits a channel, as "
            "training would cut all values above 255; convert the image."
        )
    return ImageHeader(path, size[::-1] if orientation in TRANSPOSED else size, orientation)


def _orientation_of(image: Image.Image, path: Path) -> object:
    # A PNG may have its EXIF behind the pixels. Pillow would decode all of them to look for it, in
    # every PNG, and most have none.
    if image.format == "PNG" and "exif" not in image.info:
        if not _PNG_METADATA.search(path.read_bytes()):
            return None
    return orientation_of(image)


def check_declared_size(
    header: ImageHeader, declared: Sequence[object], where: str, fields: str
) -> None:
    """
    Compare the size that stands beside the labels with that of the image: coordinates refer to it.

    Args:
        header: of the image.
        declared: width and height, as numbers or text; None, "" or 0: not known.
        where: what says so, for the message.
        fields: their names, for the message.

    Raises:
        InputError: they differ, or are no numbers.
    """
    try:
        sides = [0.0 if x in (None, "") else float(x) for x in declared]
    except (OverflowError, TypeError, ValueError) as error:
        width, height = (str(x)[:40] for x in declared)
        raise InputError(
            f"{where}: the size in {fields} is {width} x {height}; allowed: whole numbers of "
            "pixels, or 0 where they are not known."
        ) from error
    if _fits(sides, header.size):
        return
    turned = f", as its EXIF orientation {header.orientation} turns it" if header.is_turned else ""
    remedy = "import with the image that was labelled, or correct the size and all coordinates"
    if _fits(sides, header.stored_size):
        remedy = (
            "if the labels fit the image as it is stored, take the orientation, by which training "
            "turns it, out of the file (exiftool -Orientation= FILE)"
        )
    raise InputError(
        f"{where}: the size in {fields} is {sides[0]:.10g} x {sides[1]:.10g}, but its image "
        f"{header.path} has {header.size[0]} x {header.size[1]} pixels{turned}; allowed: the size "
        f"of the image; {remedy}."
    )


def _fits(sides: Sequence[float], size: tuple[int, int]) -> bool:
    return all(side in (0, there) for side, there in zip(sides, size))


def check_different(class_names: Sequence[str], where: str) -> None:
    """
    Raises:
        InputError: a name is there more than once.
    """
    for name in class_names:
        count = class_names.count(name)
        if count > 1:
            raise InputError(
                f"{where}: the class names are not all different: {name!r} is there {count} times."
            )


def read_text(path: Path) -> str:
    """
    The text of a file in UTF-8, with or without a byte order mark, as editors on Windows write it.

    Raises:
        InputError: there is no such file, or it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text in UTF-8: {error}.") from error


@paused_gc()
def read_json(path: Path) -> object:
    """
    The content of a json, of any size.

    Raises:
        InputError: there is no such file, or it is no json in UTF-8.
    """
    try:
        return json.loads(read_text(path))
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: no json: {error}.") from error
