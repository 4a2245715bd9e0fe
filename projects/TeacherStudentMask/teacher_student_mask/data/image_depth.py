"""Images of more than 8 bits a channel, whose values training would cut."""

from __future__ import annotations

from detectron2.utils.file_io import PathManager
from PIL import Image

from ..checks.image_checks import DEEP_MODES

__all__ = ["refuse_deep_image"]

# The first bytes of every JPEG.
_JPEG = b"\xff\xd8\xff"


def refuse_deep_image(file_name: str, where: str) -> None:
    """
    Args:
        file_name: of the image; its header alone is read.
        where: names the image in messages.

    Raises:
        ValueError: more than 8 bits a channel.
        OSError: the file is not there, or no image.
    """
    mode = _mode_of_image(file_name)
    if mode.startswith(DEEP_MODES):
        raise ValueError(
            f"{where}: the image has PIL's mode {mode!r}, whose values above 255 would be cut; "
            "convert it to 8 bits a channel."
        )


def _mode_of_image(file_name: str) -> str:
    # PathManager, as for all files of a dataset, also gets remote ones.
    with PathManager.open(file_name, "rb") as f:
        # A JPEG has 8 bits in all modes that PIL can read, so this need not parse its header.
        if f.read(len(_JPEG)) == _JPEG:
            return "RGB"
        f.seek(0)
        with Image.open(f) as image:
            return image.mode
