"""Image files as training reads them: size after EXIF's orientation, and depth of the pixels."""

from __future__ import annotations

import os
import warnings

from PIL import Image

__all__ = ["DEEP_MODES", "TRANSPOSED", "orientation_of", "problems_of_image"]

_EXIF_ORIENTATION = 0x0112
# Orientations that swap width and height.
TRANSPOSED = (5, 6, 7, 8)

# PIL's modes of more than 8 bits a channel; converting them to RGB cuts all values above 255.
DEEP_MODES = ("I", "F")


def problems_of_image(path: str | os.PathLike, height: int, width: int) -> dict[str, str]:
    """
    Read one image to its end.

    Args:
        path: the file.
        height, width: in pixels, as the json has them.

    Returns:
        What is wrong with it or odd, as text, by its kind: "unreadable", "size", "orientation",
        "depth" or "colour".
    """
    name = repr(os.fspath(path))
    try:
        with warnings.catch_warnings():
            # Of large images and odd metadata, which do no harm.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                mode, size, orientation = image.mode, image.size, orientation_of(image)
    # PIL's readers raise many kinds on broken files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        return {"unreadable": f"{name}, which cannot be read ({error})"}
    problems = {}
    turned = size[::-1] if orientation in TRANSPOSED else size
    if turned != (width, height):
        by_exif = f", turned by EXIF orientation {orientation}" if turned != size else ""
        found = f"{turned[0]}, {turned[1]}{by_exif}"
        problems["size"] = f"{width}, {height}, but {name} has {found}"
    elif orientation in range(2, 9):
        problems["orientation"] = f"{name} with EXIF orientation {orientation}"
    if mode.startswith(DEEP_MODES):
        problems["depth"] = f"{name} in PIL's mode {mode!r}"
    if mode in ("CMYK", "LAB"):
        problems["colour"] = f"{name} in {mode}"
    return problems


def orientation_of(image: Image.Image) -> object:
    """EXIF's orientation of an open image, 1 to 8 where it is sound; None: it has none."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken metadata; Detectron2 reads such an image without them, too
        return None
