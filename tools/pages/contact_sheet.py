"""A page with a small picture of everything that was looked at."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.structures import Instances

from inference.media import SourceError
from pages.html_pages import check_jinja2, make_thumbnail, to_url, write_page, write_picture

__all__ = ["PAGE", "THUMBNAILS", "ContactSheet"]

# In the output folder.
PAGE, THUMBNAILS = "contact_sheet.html", "thumbnails"

_SIDE = 360  # of a thumbnail, pixels
_WIDE = 2.0  # times as wide as high: several panels, which are given more room


@dataclass
class _Tile:
    name: str
    overlay: str  # URL
    thumbnail: Path  # relative to the page
    is_video: bool
    width: int = 0
    height: int = 0
    num_frames: int = 0
    items: list[tuple[int, str, float]] = field(default_factory=list)


class ContactSheet:
    """
    Collects thumbnails and scores, and writes the page: ``contact_sheet.html``.

    The thumbnails are files beside it, which the browser loads as they come into view, so that a
    folder of thousands of images stays one page. A video is shown by its frame with most objects.
    """

    def __init__(self, output_dir: Path, names: list[str]) -> None:
        """
        Args:
            output_dir: with the overlays in it.
            names: of the classes.

        Raises:
            UsageError: jinja2 is not installed.
        """
        check_jinja2("--html")
        self._folder = output_dir
        self._names = names
        self._tiles: dict[str, _Tile] = {}

    def add(self, name: str, overlay: str, picture: np.ndarray, found: Instances, is_video: bool):
        """
        Args:
            name: of the source.
            overlay: path of the full picture or video, relative to the output folder.
            picture: the overlay of the image or of one frame, uint8 BGR.
            found: what is in it, on the CPU.
            is_video: a further call with the same ``overlay`` is a further frame.

        Raises:
            SourceError: the thumbnail cannot be written.
        """
        tile = self._tiles.get(overlay)
        is_first = tile is None
        if is_first:
            path = Path(THUMBNAILS) / Path(overlay).relative_to(Path(overlay).parts[0])
            tile = _Tile(name, to_url(overlay), path.with_name(f"{path.name}.jpg"), is_video)
            self._tiles[overlay] = tile
        tile.num_frames += is_video
        if is_first or len(found) > len(tile.items):
            is_wide = picture.shape[1] >= _WIDE * picture.shape[0]
            thumbnail = make_thumbnail(picture, 3 * _SIDE if is_wide else _SIDE)
            try:
                write_picture(self._folder / tile.thumbnail, thumbnail)
            except OSError as error:
                raise SourceError(f"{name}: cannot write its thumbnail: {error}") from error
            tile.height, tile.width = thumbnail.shape[:2]
            scores = (round(x, 4) for x in found.scores.tolist())
            tile.items = [(c, "", s) for c, s in zip(found.pred_classes.tolist(), scores)]

    def write(self, failures: list[str], threshold: float) -> Path:
        """
        Write the page.

        Args:
            failures: sentences about what could not be read.
            threshold: of the scores.
        """
        tiles = list(self._tiles.values())
        counts = Counter(c for tile in tiles for c, *_ in tile.items)
        content = {
            "title": f"Contact sheet of {self._folder.resolve().name}",
            "facts": [
                ("images", sum(not x.is_video for x in tiles)),
                ("videos", sum(x.is_video for x in tiles)),
                ("objects", counts.total()),
                ("score threshold", f"{threshold:g}"),
            ],
            "provenance": [],
            "classes": [
                (c, self._names[c], n) for c, n in sorted(counts.items(), key=lambda x: -x[1])
            ],
            "pictures": [{**vars(x), "thumbnail": to_url(x.thumbnail)} for x in tiles],
            "is_wide": sum(x.width >= _WIDE * x.height for x in tiles) * 2 > len(tiles),
            "failures": failures,
        }
        data = [{"name": x.name, "items": x.items} for x in tiles]
        write_page(self._folder / PAGE, "contact_sheet.html.j2", content, data)
        return self._folder / PAGE
