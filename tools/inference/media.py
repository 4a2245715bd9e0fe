"""What a program can be given to look at: images and videos. Finding and reading them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image

from teacher_student_mask.checks.image_checks import DEEP_MODES

logger = logging.getLogger("teacher_student_mask")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
OVERLAY_SUFFIXES = (".jpeg", ".jpg", ".png")

__all__ = [
    "IMAGE_SUFFIXES",
    "OVERLAY_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Source",
    "SourceError",
    "find_sources",
    "read_image_file",
    "video_property",
]


class SourceError(Exception):
    """One input is not there, cannot be read, or its overlay cannot be written."""


@dataclass(frozen=True)
class Source:
    """
    An image or a video.

    Args:
        path: of the file.
        overlay: where its overlay goes, relative to the folder of the overlays.
    """

    path: Path
    overlay: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    def announced_images(self) -> int:
        """How many images reading will give, as far as the file says it; at least 1."""
        if not self.is_video:
            return 1
        return max(1, int(video_property(self.path, cv2.CAP_PROP_FRAME_COUNT)))

    def fps(self) -> float:
        """Frames a second that the video announces; 0 where it does not."""
        return video_property(self.path, cv2.CAP_PROP_FPS)

    def repeats(self) -> int:
        """How often the image just read belongs into its overlay; a camera's may lag behind."""
        return 1

    def image_fields(self, k: int) -> dict:
        """What images.json says of the k-th image read, beside its file."""
        return {"frame": k} if self.is_video else {}

    def read(self) -> Iterator[np.ndarray]:
        """
        Yield the image, or the frames of the video, uint8 (H, W, 3), BGR.

        Raises:
            SourceError: the image, or not one frame of the video, can be read.
        """
        if self.is_video:
            yield from _read_frames(self.path)
        else:
            yield read_image_file(self.path)


def find_sources(inputs: list[str], *output_dirs: Path) -> list[Source]:
    """
    List the images and videos that the inputs name, each once.

    A file from a folder keeps its place below that folder; where two overlays would have the same
    name, the later one is numbered.

    Args:
        inputs: files, folders and globs.
        output_dirs: folders of overlays and the like, which are not taken for inputs.

    Raises:
        SourceError: an input that matches nothing, or a file of an unknown kind.
    """
    output_dirs = {x.resolve() for x in output_dirs}
    sources: dict[Path, Source] = {}
    taken: set[str] = set()
    num_ignored = num_repeated = 0
    for text in inputs:
        num_found = 0
        for path, name in _expand(text):
            resolved = path.resolve()
            if not output_dirs.isdisjoint(resolved.parents):
                continue
            if not _is_known(path):
                num_ignored += 1
                continue
            num_found += 1
            if resolved in sources:
                num_repeated += 1
            else:
                sources[resolved] = Source(path, _distinct_overlay(name, taken))
        if num_found == 0:
            raise SourceError(f"{text!r} has no image and no video. {_known_suffixes()}")
    if num_ignored:
        logger.warning(f"Left out {num_ignored} files that are neither images nor videos.")
    if num_repeated:
        logger.info(f"{num_repeated} files are named more than once; each runs once.")
    return list(sources.values())


def _expand(text: str) -> list[tuple[Path, Path]]:
    """The files that one input names, each with its name relative to the input."""
    path = Path(text)
    if path.is_dir():
        return [(p, p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
    if path.is_file():
        if not _is_known(path):
            raise SourceError(f"{text!r} is of an unknown kind. {_known_suffixes()}")
        return [(path, Path(path.name))]
    matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
    if not matches:
        raise SourceError(f"{text!r} matches no file and no folder.")
    return [(p, Path(p.name)) for p in matches if p.is_file()]


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _known_suffixes() -> str:
    return f"Images: {', '.join(IMAGE_SUFFIXES)}; videos: {', '.join(VIDEO_SUFFIXES)}."


def _distinct_overlay(name: Path, taken: set[str]) -> Path:
    """A name for the overlay of the file that is not yet taken; it is added to those."""
    suffix = name.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        suffix = ".mp4"
    elif suffix not in OVERLAY_SUFFIXES:
        suffix = ".png"
    overlay, number = name.with_suffix(suffix), 2
    # Some file systems do not tell A.png from a.png.
    while str(overlay).lower() in taken:
        overlay = name.with_name(f"{name.stem}_{number}{suffix}")
        number += 1
    taken.add(str(overlay).lower())
    return overlay


def read_image_file(path: Path) -> np.ndarray:
    """
    Read an image as Detectron2 does in training, with its EXIF orientation.

    Returns:
        uint8, shape (H, W, 3), BGR.

    Raises:
        SourceError: it is not there, cannot be read, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
        if mode.startswith(DEEP_MODES):
            raise ValueError(f"more than 8 bits a channel ({mode}); convert it first.")
        return np.ascontiguousarray(read_image(str(path), format="BGR"))
    # Pillow's readers raise errors of many types on broken files, SyntaxError among them.
    except Exception as error:
        raise SourceError(f"{path}: {error}") from error


def _read_frames(path: Path) -> Iterator[np.ndarray]:
    _check_name_of_video(path)
    capture = cv2.VideoCapture(str(path))
    num_frames = 0
    try:
        while True:
            success, frame = capture.read()
            if not success:
                break
            num_frames += 1
            yield frame
    finally:
        capture.release()
    if num_frames == 0:
        raise SourceError(f"{path}: OpenCV cannot read a frame of this video.")
    announced = video_property(path, cv2.CAP_PROP_FRAME_COUNT)
    if num_frames < announced:
        logger.warning(f"{path}: read {num_frames} of the {announced:.0f} frames it announces.")


def _check_name_of_video(path: Path) -> None:
    # OpenCV crashes on them.
    if not _is_utf8(path):
        raise SourceError(
            f"{path}: the name of a video must be UTF-8, which this one is not; rename the file."
        )


def _is_utf8(path: Path) -> bool:
    # Bytes that are none are surrogates in the text of a path.
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def video_property(path: Path, which: int) -> float:
    """A property of OpenCV's; 0 where the video cannot be opened or does not say."""
    if not _is_utf8(path):
        return 0.0
    capture = cv2.VideoCapture(str(path))
    value = capture.get(which)
    capture.release()
    return value if np.isfinite(value) and value > 0 else 0.0
