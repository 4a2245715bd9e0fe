"""
Find and segment the objects in images and videos with a trained model.

Inputs are image files, video files, folders (searched with their subfolders) and quoted globs. The
output folder then holds
  overlays/                    a picture for each image, an mp4 for each video, with masks, boxes,
                               classes and scores; small ones are enlarged
  coco_instances_results.json  the objects, in COCO's result format
  images.json                  the images (for a video: its frames, from 0) and the categories that
                               the ids stand for; COCO("images.json").loadRes(...) reads both
Files of an earlier run are replaced. What cannot be read is listed at the end; the rest is done.

examples:
  tsmask predict output/train photo.jpg "archive/2024-*/*.png" clip.mp4 \\
      --output-dir output/predictions --score-threshold 0.8
  a model that is not in the folder of a training:
  tsmask predict images/ --config-file model.yaml --weights model.pth --output-dir output/others
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .main import add_model_arguments, choose_model, load_chosen_model

if TYPE_CHECKING:
    import numpy as np
    from detectron2.structures import Instances

    from ..trained_model import TrainedModel

__all__ = ["add_arguments", "run"]

_IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add model, inputs and outputs."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, video, folder or glob; all behind MODEL")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    text = "keep detections with a score above this (default: %(default)s)"
    add("--score-threshold", type=float, default=0.5, metavar="P", help=text)


def run(args: argparse.Namespace) -> int:
    """Predict; returns 1 if an input could not be read."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from tqdm import tqdm

    if args.config_file and args.model:  # the first word is an input, too
        args.inputs.insert(0, args.model)
        args.model = None
    choose_model(args)  # before the search for images
    overlay_dir = args.output_dir / "overlays"
    files = _find_files(args.inputs, overlay_dir)
    trained = load_chosen_model(args, score_threshold=args.score_threshold)
    overlay_dir.mkdir(parents=True, exist_ok=True)
    images, results, failures = [], [], []

    for number, path in enumerate(tqdm(files, unit="file"), start=1):
        is_video = path.suffix.lower() in _VIDEOS
        overlay = overlay_dir / f"{number:04d}_{path.stem}{'.mp4' if is_video else '.jpg'}"
        try:
            for frame, found in enumerate(_predict(trained, path, overlay)):
                entry = {"id": len(images) + 1, "file_name": str(path)}
                entry["overlay"] = f"overlays/{overlay.name}"
                entry["height"], entry["width"] = found.image_size
                images.append(entry | ({"frame": frame} if is_video else {}))
                results.extend(instances_to_coco_json(found, entry["id"]))
        except InputError as error:
            failures.append(str(error))
    counts = Counter(trained.class_names[x["category_id"]] for x in results)
    for result in results:
        result["category_id"] = trained.category_ids[result["category_id"]]
    categories = zip(trained.category_ids, trained.class_names)
    described = {
        "images": images,
        "annotations": [],  # COCO(...) of pycocotools wants the key
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    for name, content in (("images", described), ("coco_instances_results", results)):
        (args.output_dir / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    found = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "none"
    print(f"{len(results)} objects in {len(images)} images and frames: {found}")
    print(f"Results: {args.output_dir}")
    if not results:
        print("Nothing has a score above --score-threshold; a lower one shows what was near it.")
    if failures:
        print(
            f"{len(failures)} of {len(files)} inputs failed:",
            *failures,
            sep="\n  ",
            file=sys.stderr,
        )
    return 1 if failures else 0


def _predict(trained: TrainedModel, path: Path, overlay: Path) -> Iterator[Instances]:
    """Yield the objects of the image, or of the frames of the video, and write the overlay."""
    import cv2
    import supervision as sv

    from ..drawing import draw_predictions

    is_video, sink = overlay.suffix == ".mp4", None
    with contextlib.ExitStack() as stack:
        for image in _read(path):
            found = trained.predict(image)
            picture = draw_predictions(image, found, trained.class_names)
            if not is_video:
                overlay.write_bytes(cv2.imencode(".jpg", picture)[1])
            else:
                if sink is None:  # all frames have one size
                    fps = sv.VideoInfo.from_video_path(str(path)).fps or 25
                    info = sv.VideoInfo(picture.shape[1], picture.shape[0], fps)
                    sink = stack.enter_context(sv.VideoSink(str(overlay), info))
                sink.write_frame(picture)
            yield found
    if is_video and sink is None:
        raise InputError(f"{path}: no frame of this video can be read.")


def _find_files(inputs: list[str], overlay_dir: Path) -> list[Path]:
    """The images and videos that the inputs name, each once, without overlays of earlier runs."""
    files = {}
    for text in inputs:
        path = Path(text)
        # A name may have brackets.
        paths = [path] if path.is_file() else map(Path, glob.glob(text, recursive=True))
        if path.is_dir():  # hidden files are copies of other programs, as .ipynb_checkpoints
            paths = [x for x in path.rglob("*") if "/." not in f"/{x.relative_to(path)}"]
        paths = [x for x in sorted(paths) if x.suffix.lower() in (*_IMAGES, *_VIDEOS)]
        if not paths:
            kinds = f"images end in {', '.join(_IMAGES)}, videos in {', '.join(_VIDEOS)}"
            raise InputError(f"{text!r} has no image and no video; {kinds}.")
        files |= {x.resolve(): x for x in paths if overlay_dir.resolve() not in x.resolve().parents}
    return list(files.values())


def _read(path: Path) -> Iterator[np.ndarray]:
    """Yield the image, or the frames of the video: uint8 (H, W, 3), BGR."""
    import supervision as sv

    from ..drawing import read_image

    if path.suffix.lower() not in _VIDEOS:
        yield read_image(path)
        return
    try:
        yield from sv.get_video_frames_generator(str(path))
    except Exception as error:  # of many types
        raise InputError(f"{path}: {error}") from error
