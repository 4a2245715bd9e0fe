"""
Find and segment the objects in images and videos with a trained model.

Inputs are image files, video files, folders (searched with their subfolders) and quoted globs. The
output folder then holds
  overlays/                    a picture for each image, an mp4 for each video, with masks, boxes,
                               classes and scores; small pictures are enlarged
  coco_instances_results.json  the objects, in COCO's result format: image_id, category_id, bbox
                               (x, y, width, height), score, segmentation (compressed RLE)
  images.json                  the images (for a video: its frames, from 0) and the categories that
                               the ids stand for; COCO("images.json").loadRes(...) reads both
Files of an earlier run are replaced. What cannot be read is listed at the end; the rest is done.

examples:
  tsmask predict photo.jpg --config-file output/run/config.yaml \\
      --weights output/run/model_final.pth --output-dir output/predictions
  tsmask predict holiday/ "archive/2024-*/*.png" clip.mp4 --config-file ... --output-dir ... \\
      --score-threshold 0.8 --no-overlays
  image | teacher | student | ground truth, side by side:
  tsmask predict images/ --config-file ... --output-dir ... --compare --annotations val.json
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from detectron2.structures import Instances

    from ..trained_model import TrainedModel

__all__ = ["add_arguments", "run"]

_IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add inputs, model and outputs."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, video, folder or glob")
    add("--config-file", required=True, metavar="YAML", help="config of the model")
    add("--weights", metavar="PTH", help="checkpoint (default: the config's MODEL.WEIGHTS)")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    add(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="keep detections with a score above this (default: %(default)s)",
    )
    add("--no-overlays", action="store_true", help="write the json files only")
    add(
        "--compare",
        action="store_true",
        help="pictures show image | teacher | student; the json files have the masks of "
        "TEST.MASK_HEAD",
    )
    add(
        "--annotations",
        metavar="JSON",
        help="with --compare, a further panel: what this COCO json has for the image",
    )
    add(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the config; everything after --opts belongs to it",
    )


def run(args: argparse.Namespace) -> int:
    """Predict; returns 1 if an input could not be read."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..trained_model import load_model

    if args.annotations and not args.compare:
        raise InputError("--annotations needs --compare.")
    overlay_dir = args.output_dir / "overlays"
    files = _find_files(args.inputs, overlay_dir)
    trained = load_model(
        args.config_file,
        weights=args.weights,
        opts=args.opts,
        score_threshold=args.score_threshold,
    )
    truth = _ground_truth(args.annotations, trained.class_names) if args.annotations else None
    args.output_dir.mkdir(parents=True, exist_ok=True)
    images, results, failures = [], [], []

    def predict(path: Path, overlay: str) -> Iterator[np.ndarray]:
        """Predict a file, and yield its pictures."""
        is_video = path.suffix.lower() in _VIDEOS
        for frame, image in enumerate(_read(path)):
            found = trained.predict(image)
            _add_results(path, found, frame if is_video else None, overlay, images, results)
            if args.compare:
                yield _compare(trained, image, found, truth and truth(path, image))
            elif overlay:
                yield _draw(trained, image, found, scale=1 if is_video else None)

    with logging_redirect_tqdm():
        for path, overlay in tqdm(list(files.items()), unit="file"):
            try:
                if args.no_overlays:
                    list(predict(path, ""))
                else:
                    _write_overlay(path, overlay_dir / overlay, predict(path, overlay.as_posix()))
            except (InputError, OSError) as error:
                failures.append(str(error))

    _write_results(trained, images, results, args.output_dir)
    if failures:
        print(f"{len(failures)} of {len(files)} inputs failed:", file=sys.stderr)
        print("\n".join(f"  {x}" for x in failures), file=sys.stderr)
    return 1 if failures else 0


def _add_results(
    path: Path,
    found: Instances,
    frame: int | None,
    overlay: str,
    images: list[dict],
    results: list[dict],
) -> None:
    """Append an entry of images.json, and those of its objects with contiguous class ids."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    height, width = found.image_size
    entry = {"id": len(images) + 1, "file_name": str(path), "height": height, "width": width}
    if frame is not None:
        entry["frame"] = frame
    if overlay:
        entry["overlay"] = f"overlays/{overlay}"
    images.append(entry)
    results += instances_to_coco_json(found, entry["id"])


def _write_results(
    trained: TrainedModel, images: list[dict], results: list[dict], output_dir: Path
) -> None:
    """Write images.json and coco_instances_results.json, and print a summary."""
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
        (output_dir / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    found = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "none"
    print(f"{len(results)} objects in {len(images)} images and frames: {found}")
    print(f"Results: {output_dir}")


# ---- files ----


def _find_files(inputs: list[str], overlay_dir: Path) -> dict[Path, Path]:
    """
    The images and videos that the inputs name, each once, and a name for the overlay of each.

    A file from a folder keeps its place below that folder. Overlays of an earlier run are left out.
    """
    files, known, names = {}, set(), set()
    for text in inputs:
        root = Path(text)
        if root.is_dir():
            paths = root.rglob("*")
        else:
            root = None
            paths = (
                [Path(text)] if Path(text).is_file() else map(Path, glob.glob(text, recursive=True))
            )
        paths = [x for x in sorted(paths) if x.suffix.lower() in (*_IMAGES, *_VIDEOS)]
        if not paths:
            raise InputError(
                f"{text!r} has no image and no video; images end in {', '.join(_IMAGES)}, videos "
                f"in {', '.join(_VIDEOS)}."
            )
        for path in paths:
            real = path.resolve()
            if real in known or overlay_dir.resolve() in real.parents or not real.is_file():
                continue
            known.add(real)
            name, suffix = path.relative_to(root) if root else Path(path.name), path.suffix.lower()
            if suffix not in (".jpeg", ".jpg", ".png"):
                suffix = ".mp4" if suffix in _VIDEOS else ".png"
            overlay = name.with_suffix(suffix)
            number = itertools.count(2)
            # Some file systems do not tell A.png from a.png.
            while str(overlay).lower() in names:
                overlay = name.with_name(f"{name.stem}_{next(number)}{suffix}")
            names.add(str(overlay).lower())
            files[path] = overlay
    return files


def _read(path: Path) -> Iterator[np.ndarray]:
    """Yield the image, or the frames of the video: uint8 (H, W, 3), BGR."""
    import supervision as sv
    from detectron2.data.detection_utils import read_image
    from PIL import Image

    # Readers raise errors of many types on broken files, SyntaxError among them.
    try:
        if path.suffix.lower() in _VIDEOS:
            frame = None
            for frame in sv.get_video_frames_generator(str(path)):
                yield frame
            if frame is None:
                raise ValueError("OpenCV cannot read a frame of this video.")
            return
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel ({file.mode}); convert it first.")
        yield read_image(str(path), format="BGR").copy()  # with its EXIF orientation
    except Exception as error:
        raise InputError(f"{path}: {error}") from error


def _write_overlay(source: Path, target: Path, pictures: Iterator[np.ndarray]) -> None:
    """Write the picture, or the frames of the video, which all have one size."""
    import cv2
    import supervision as sv

    first = next(pictures)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix.lower() not in _VIDEOS:
        target.write_bytes(cv2.imencode(target.suffix, first)[1])
        return
    fps = sv.VideoInfo.from_video_path(str(source)).fps
    info = sv.VideoInfo(first.shape[1], first.shape[0], fps if fps > 0 else 25.0)
    with sv.VideoSink(str(target), info) as sink:
        for picture in itertools.chain([first], pictures):
            sink.write_frame(picture)


# ---- pictures ----


def _draw(
    trained: TrainedModel, image: np.ndarray, found: Instances, scale: int | None = None
) -> np.ndarray:
    """Draw detections; with ``scale`` None small images are enlarged."""
    import supervision as sv

    from ..drawing import draw_instances

    classes, scores = found.pred_classes.tolist(), found.scores.tolist()
    labels = [f"{trained.class_names[k]} {x:.0%}" for k, x in zip(classes, scores)]
    detections = sv.Detections.from_detectron2({"instances": found})
    return draw_instances(image, detections, labels, scale=scale)


def _compare(
    trained: TrainedModel, image: np.ndarray, found: Instances, truth: np.ndarray | None
) -> np.ndarray:
    """Join the image, the masks of each head on the same detections, and the ground truth."""
    import cv2
    import numpy as np

    panels = {"image": image}
    if "teacher" in trained.heads:
        roi_heads = trained.model.roi_heads
        chosen = roi_heads.test_mask_head
        for head in ("teacher", "student"):
            roi_heads.test_mask_head = head
            masks = found if head == chosen else trained.predict(image)
            panels[head] = _draw(trained, image, masks)
        roi_heads.test_mask_head = chosen
    else:
        panels["model"] = _draw(trained, image, found)
    if truth is not None:
        panels["ground truth"] = truth
    *_, drawn = panels.values()
    titled = []
    for title, panel in panels.items():
        panel = cv2.resize(panel, drawn.shape[1::-1])
        panel = cv2.copyMakeBorder(panel, 30, 0, 3, 3, cv2.BORDER_CONSTANT, value=(255,) * 3)
        cv2.putText(panel, title, (6, 21), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0,) * 3, 1, cv2.LINE_AA)
        titled.append(panel)
    return np.hstack(titled)


def _ground_truth(
    json_file: str, class_names: list[str]
) -> Callable[[Path, np.ndarray], np.ndarray]:
    """Return what draws the objects of a COCO json; images are found by the end of their paths."""
    from ..coco_json import read_coco
    from ..drawing import annotations_to_detections, draw_instances

    data = read_coco(json_file)
    names = {x["id"]: x["name"] for x in data["categories"]}
    # A class has the colour that it has among the model's.
    colors = list(dict.fromkeys([*class_names, *names.values()]))
    images = {Path(x["file_name"]).parts: x for x in data["images"]}
    annotations: dict[int, list[dict]] = {x["id"]: [] for x in data["images"]}
    for x in data["annotations"]:
        annotations[x["image_id"]].append(x)

    def label_of(x: dict) -> str:
        if x.get("iscrowd"):
            kind = " (crowd)"
        elif not x.get("segmentation"):
            kind = " (box only)"
        else:
            kind = " (model)" if x.get("mask_source") == "model" else ""
        return names[x["category_id"]] + kind

    def draw(path: Path, image: np.ndarray) -> np.ndarray:
        parts = path.absolute().parts
        entry = next((images[p] for k in range(len(parts)) if (p := parts[k:]) in images), None)
        if entry is None or (entry["height"], entry["width"]) != image.shape[:2]:
            raise InputError(f"{path}: {json_file} does not have the image, or in another size.")
        objects = annotations[entry["id"]]
        classes = [colors.index(names[x["category_id"]]) for x in objects]
        detections = annotations_to_detections(objects, image.shape[:2], classes)
        return draw_instances(image, detections, [label_of(x) for x in objects])

    return draw
