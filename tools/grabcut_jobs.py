"""Making GrabCut's masks of many images: in several processes, and going on after a stop."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from dataclasses import dataclass
from multiprocessing import get_context

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

from teacher_student_mask.modeling import grab_cut

__all__ = ["Job", "key_of", "make_masks", "read_cache", "run_cached", "run_jobs"]

_CACHE_VERSION = 1


@dataclass(frozen=True)
class Job:
    """
    The objects of an image that need a mask.

    Args:
        path: of the image.
        size: height and width that the json says.
        keys: of the objects in the cache.
        boxes: left, top, width, height.
    """

    path: str
    size: tuple[int, int]
    keys: list[str]
    boxes: list[list[float]]


def key_of(annotation: dict, file_name: str) -> str:
    """What an object has in the cache; another one if its box or its image's name has changed."""
    content = json.dumps([file_name, annotation["bbox"]])
    return f"{annotation['id']}-{zlib.crc32(content.encode()):08x}"


def run_cached(jobs: list[Job], cache: str, workers: int) -> tuple[dict[str, str], list[str]]:
    """
    Make the masks that the cache lacks, and add them to it image by image.

    Args:
        jobs: what is needed.
        cache: a text file, a json on each line; made if new.
        workers: number of processes.

    Returns:
        The counts of the RLEs by key, and a sentence about each image that cannot be used.

    Raises:
        ValueError: the cache is of another version of this program or of OpenCV.
        OSError: it cannot be read or written.
    """
    masks = read_cache(cache)
    todo = [job for job in jobs if not masks.keys() >= set(job.keys)]
    if len(todo) < len(jobs):
        print(f"Going on: {len(jobs) - len(todo)} of {len(jobs)} images are done.")
    problems = []
    with open(cache, "a", encoding="utf-8") as f:
        if f.tell() == 0:
            f.write(json.dumps(_fingerprint()) + "\n")
        for result in tqdm(run_jobs(todo, workers), total=len(todo), unit="image"):
            if isinstance(result, str):
                problems.append(result)
                continue
            masks |= result
            f.write(json.dumps(result) + "\n")
            f.flush()
    return masks, problems


def read_cache(path: str) -> dict[str, str]:
    """
    Read what an earlier run has left; a last line that it could not finish is cut off.

    Raises:
        ValueError: see :func:`run_cached`.
    """
    if not os.path.exists(path):
        return {}
    masks, length = {}, 0
    with open(path, "rb") as f:
        for i, line in enumerate(f):
            if not line.endswith(b"\n"):
                break
            content = json.loads(line)
            if i == 0 and content != _fingerprint():
                raise ValueError(
                    f"{path}: of another version ({content}, here {_fingerprint()}); remove it to "
                    "begin again."
                )
            masks |= content if i > 0 else {}
            length += len(line)
    os.truncate(path, length)
    return masks


def _fingerprint() -> dict:
    return {"version": _CACHE_VERSION, "opencv": cv2.__version__}


def run_jobs(jobs: Iterable[Job], workers: int) -> Iterator[dict[str, str] | str]:
    """Yield :func:`make_masks` of each job, in any order; few images are in memory at a time."""
    if workers == 1:
        yield from map(make_masks, jobs)
        return
    # OpenCV's own threads would compete; forking is much faster than importing everything again.
    context = get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, context, initializer=cv2.setNumThreads, initargs=(0,))
    try:
        pending = set()
        for job in jobs:
            pending.add(pool.submit(make_masks, job))
            if len(pending) >= 4 * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (x.result() for x in done)
        yield from (x.result() for x in as_completed(pending))
    finally:
        pool.shutdown(cancel_futures=True)


def make_masks(job: Job) -> dict[str, str] | str:
    """The counts of the compressed RLEs by key, or why the image cannot be used."""
    try:
        image = np.ascontiguousarray(read_image(job.path, "BGR"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"{job.path}: {error}"
    if image.shape[:2] != job.size:
        return f"{job.path}: {image.shape[:2]} pixels (height, width), the json says {job.size}"
    found = {}
    for key, (left, top, width, height) in zip(job.keys, job.boxes):
        mask = grab_cut(image, (left, top, left + width, top + height))
        found[key] = mask_util.encode(np.asfortranarray(mask, np.uint8))["counts"].decode("ascii")
    return found
