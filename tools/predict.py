#!/usr/bin/env python
"""
Run a trained model on images, folders, globs and videos.

Writes pictures with the detected objects, and their masks as COCO results. The model runs in
Detectron2's DefaultPredictor. See --help.
"""

from __future__ import annotations

import argparse
import colorsys
import glob
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from teacher_student_mask import add_teacher_student_mask_config

logger = logging.getLogger("teacher_student_mask")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
OVERLAY_SUFFIXES = (".jpeg", ".jpg", ".png")
# Labels are not legible on pictures smaller than this; overlays of such pictures are enlarged.
MIN_OVERLAY_SIDE = 400

DESCRIPTION = """
Finds and segments the objects in images and videos with a trained model.

Inputs are image files, video files, folders (searched with their subfolders) and quoted globs. The
output folder then holds
  overlays/                    a picture for each image, an mp4 for each video, with masks, boxes,
                               classes and scores; small pictures are enlarged so that the labels
                               can be read
  coco_instances_results.json  the objects, in COCO's result format: image_id, category_id, bbox
                               (x, y, width, height), score, segmentation (compressed RLE)
  images.json                  what the ids mean: file, size and overlay of each image (for a video:
                               of each frame, counted from 0), and the categories
Results of an earlier run in that folder are replaced.
"""

EXAMPLES = """
examples:
  an image, with a model that train_net.py trained:
    %(prog)s --config-file output/run/config.yaml --weights output/run/model_final.pth \\
        --output-dir output/predictions photo.jpg

  everything in two folders, a glob and a video; only certain detections; masks without pictures:
    %(prog)s --config-file ... --output-dir ... --score-threshold 0.8 --no-overlays \\
        holiday/ work/ "archive/2024-*/*.png" clip.mp4

  any config key, at the end:
    %(prog)s --config-file ... --output-dir ... photo.jpg --opts MODEL.DEVICE cpu

  the results in Python:
    from pycocotools.coco import COCO
    results = COCO("images.json").loadRes("coco_instances_results.json")
    mask = results.annToMask(results.anns[1])

exit code: 0; 1 if an input could not be read, or its overlay could not be written (the others are
done, the list is printed at the end); 2 if nothing could be started.
"""


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what would be right."""


class SourceError(Exception):
    """One input cannot be read, or its overlay cannot be written."""


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


@dataclass(frozen=True)
class Classes:
    """
    Args:
        names: of the contiguous ids.
        dataset_ids: the category ids that the dataset's json has for the contiguous ids.
    """

    names: list[str]
    dataset_ids: list[int]


@dataclass
class Predictions:
    """What has been found so far, in COCO's format."""

    classes: Classes
    images: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    counts: Counter = field(default_factory=Counter)

    def add(self, image: dict, instances: Instances, seconds: float) -> None:
        """
        Args:
            image: fields of the image for images.json; it is given an id.
            instances: the detections, on the CPU.
            seconds: how long the model took.
        """
        image_id = len(self.images) + 1
        height, width = instances.image_size
        self.images.append({"id": image_id, "height": height, "width": width, **image})
        for result in instances_to_coco_json(instances, image_id):
            self.counts[result["category_id"]] += 1
            result["category_id"] = self.classes.dataset_ids[result["category_id"]]
            self.results.append(result)
        self.seconds += seconds

    def write(self, output_dir: Path) -> None:
        """Write the two json files."""
        classes = zip(self.classes.dataset_ids, self.classes.names)
        images = {
            "info": {"description": "Images and categories of coco_instances_results.json"},
            "images": self.images,
            # COCO(...) of pycocotools wants the key.
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in classes],
        }
        for name, content in (
            ("images.json", images),
            ("coco_instances_results.json", self.results),
        ):
            with open(output_dir / name, "w", encoding="utf-8") as f:
                json.dump(content, f)

    def table(self) -> str:
        """Images, detections and time, then detections per class."""
        per_image = f"{self.seconds / len(self.images):.3f}" if self.images else "-"
        rows = [
            ["images and frames", len(self.images)],
            ["seconds per image", per_image],
            ["detections", len(self.results)],
        ]
        rows += [[f"  {self.classes.names[i]}", n] for i, n in self.counts.most_common()]
        return tabulate(
            rows,
            colalign=("left", "right"),
            disable_numparse=True,
            preserve_whitespace=True,
        )


def parse_args(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, folder or glob")
    parser.add_argument("--config-file", required=True, metavar="YAML", help="config of the model")
    parser.add_argument(
        "--weights", metavar="PTH", help="checkpoint (default: the config's MODEL.WEIGHTS)"
    )
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR", help="made if new")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="keep detections with a score above this (default: %(default)s)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write the json files only")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the config; everything after --opts belongs to it",
    )
    return parser, parser.parse_args(argv)


def find_sources(inputs: list[str], overlay_dir: Path) -> list[Source]:
    """
    List the images and videos that the inputs name, each once.

    A file from a folder keeps its place below that folder; where two overlays would have the same
    name, the later one is numbered.

    Args:
        inputs: files, folders and globs.
        overlay_dir: folder of the overlays, which are not taken for inputs.

    Raises:
        UsageError: an input that matches nothing, or a file of an unknown kind.
    """
    sources: dict[Path, Source] = {}
    num_ignored = num_repeated = 0
    for text in inputs:
        num_found = 0
        for path, name in _expand(text):
            resolved = path.resolve()
            if overlay_dir.resolve() in resolved.parents:
                continue
            if not _is_known(path):
                num_ignored += 1
                continue
            num_found += 1
            num_repeated += resolved in sources
            sources.setdefault(resolved, Source(path, name))
        if num_found == 0:
            raise UsageError(f"{text!r} has no image and no video. {_known_suffixes()}")
    if num_ignored:
        logger.warning(f"Left out {num_ignored} files that are neither images nor videos.")
    if num_repeated:
        logger.info(f"{num_repeated} files are named more than once; each runs once.")
    return _with_distinct_overlays(list(sources.values()))


def _expand(text: str) -> Iterator[tuple[Path, Path]]:
    """The files that one input names, each with its name relative to the input."""
    path = Path(text)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return ((p, p.relative_to(path)) for p in files)
    if path.is_file():
        if not _is_known(path):
            raise UsageError(f"{text!r} is of an unknown kind. {_known_suffixes()}")
        return iter([(path, Path(path.name))])
    matches = sorted(glob.glob(text, recursive=True))
    if not matches:
        raise UsageError(f"{text!r} matches no file and no folder.")
    return ((Path(p), Path(Path(p).name)) for p in matches if os.path.isfile(p))


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES


def _known_suffixes() -> str:
    return f"Images: {', '.join(IMAGE_SUFFIXES)}; videos: {', '.join(VIDEO_SUFFIXES)}."


def _with_distinct_overlays(sources: list[Source]) -> list[Source]:
    taken, distinct = set(), []
    for source in sources:
        suffix = source.overlay.suffix.lower()
        if source.is_video:
            suffix = ".mp4"
        elif suffix not in OVERLAY_SUFFIXES:
            suffix = ".png"
        overlay, number = source.overlay.with_suffix(suffix), 2
        # Some file systems do not tell A.png from a.png.
        while str(overlay).lower() in taken:
            overlay = source.overlay.with_name(f"{source.overlay.stem}_{number}{suffix}")
            number += 1
        taken.add(str(overlay).lower())
        distinct.append(replace(source, overlay=overlay))
    return distinct


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """
    Build the config.

    Raises:
        UsageError: the config or the weights are missing, or a key or value is wrong.
    """
    if not os.path.isfile(args.config_file):
        raise UsageError(f"--config-file {args.config_file}: no such file.")
    if not 0 <= args.score_threshold <= 1:
        raise UsageError(f"--score-threshold must be in [0, 1], got {args.score_threshold}.")
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--config-file {args.config_file}: {error}") from error
    try:
        cfg.merge_from_list(args.opts)
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(f"--opts {' '.join(args.opts)}: {error}") from error

    if args.weights is not None:
        cfg.MODEL.WEIGHTS = args.weights
    _check_weights(cfg.MODEL.WEIGHTS, args.config_file)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = args.score_threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = args.score_threshold
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no GPU: using the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def _check_weights(weights: str, config_file: str) -> None:
    if "://" in weights or os.path.isfile(weights):
        return
    if weights:
        message = f"The weights {weights} do not exist."
    else:
        message = f"{config_file} names no MODEL.WEIGHTS, and a model without them finds nothing."
    nearby = Path(config_file).with_name("model_final.pth")
    hint = f"There are weights next to the config: --weights {nearby}" if nearby.is_file() else ""
    raise UsageError(f"{message} {hint or 'Give --weights.'}")


def find_classes(cfg: CfgNode) -> Classes:
    """
    The classes of the config's first test or training dataset that can be loaded.

    If there is none, or it has another number of classes than the model, the classes are "class 0",
    "class 1", ... and their ids the contiguous ones.
    """
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    problems = []
    for name in (*cfg.DATASETS.TEST[:1], *cfg.DATASETS.TRAIN[:1]):
        if name not in DatasetCatalog.list():
            problems.append(f"{name} is not registered")
            continue
        metadata = MetadataCatalog.get(name)
        if not metadata.get("thing_classes"):
            # The names of many datasets are known only once their json has been read.
            try:
                DatasetCatalog.get(name)
            except (KeyError, OSError, ValueError) as error:
                problems.append(f"{name}: {error}")
                continue
        names = list(metadata.get("thing_classes", []))
        if len(names) != num_classes:
            problems.append(f"{name} has {len(names)} classes, the model {num_classes}")
            continue
        contiguous_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        dataset_ids = {contiguous: i for i, contiguous in contiguous_ids.items()}
        return Classes(names, [dataset_ids.get(i, i) for i in range(num_classes)])
    logger.warning(
        "The classes have no names, and their ids are contiguous: "
        f"{'; '.join(problems) or 'the config names no dataset'}. "
        "Datasets are looked for under $DETECTRON2_DATASETS (default: ./datasets)."
    )
    return Classes([f"class {i}" for i in range(num_classes)], list(range(num_classes)))


def check_output_dir(output_dir: Path) -> None:
    """
    Make the folder.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UsageError(f"Cannot write to --output-dir {output_dir}: {error}") from error


def load_image(path: Path) -> np.ndarray:
    """
    Read an image as Detectron2 does in training, with its EXIF orientation.

    Returns:
        uint8 (H, W, 3), BGR.

    Raises:
        SourceError: the file is no image, is broken, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
        if mode.startswith(("I", "F")):
            raise SourceError(f"{path}: more than 8 bits a channel ({mode}); convert it first.")
        return np.ascontiguousarray(read_image(str(path), format="BGR"))
    except SourceError:
        raise
    # Pillow's readers raise errors of many types on broken files, SyntaxError among them.
    except Exception as error:
        raise SourceError(f"{path}: {error}") from error


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """
    Yield the frames of a video, uint8 (H, W, 3), BGR.

    Raises:
        SourceError: not one frame can be read.
    """
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
    announced = _video_property(path, cv2.CAP_PROP_FRAME_COUNT)
    if num_frames < announced:
        logger.warning(f"{path}: read {num_frames} of the {announced:.0f} frames it announces.")


def _video_property(path: Path, which: int) -> float:
    """0 where the video cannot be opened or does not say."""
    capture = cv2.VideoCapture(str(path))
    try:
        value = capture.get(which)
    finally:
        capture.release()
    return value if np.isfinite(value) and value > 0 else 0.0


def draw_overlay(
    image: np.ndarray, instances: Instances, names: list[str], *, color_by_class: bool = False
) -> np.ndarray:
    """
    Draw masks, boxes, classes and scores.

    Args:
        image: uint8 (H, W, 3), BGR.
        instances: the detections, on the CPU.
        names: of the classes.
        color_by_class: give each class its colour, not each object, so that colours stay from one
            frame of a video to the next.

    Returns:
        uint8 BGR; larger than the image by a whole factor if the image is small.
    """
    scale = max(1, -(-MIN_OVERLAY_SIDE // max(image.shape[:2])))
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    visualizer = Visualizer(image[:, :, ::-1], scale=scale)
    output = visualizer.overlay_instances(
        masks=instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        boxes=instances.pred_boxes,
        labels=[f"{names[c]} {100 * s:.0f}%" for c, s in zip(classes, scores)],
        assigned_colors=[_color(k) for k in (classes if color_by_class else range(len(classes)))],
    )
    return np.ascontiguousarray(output.get_image()[:, :, ::-1])


def _color(k: int) -> tuple[float, float, float]:
    # Steps of the golden ratio spread any number of hues. Lightness and saturation leave room for
    # the lighter text: Detectron2 0.6 does not clip it.
    return colorsys.hls_to_rgb(k * 0.618034 % 1.0, 0.5, 0.8)


class Runner:
    """Runs a predictor over sources and collects what it finds."""

    def __init__(
        self, predictor: DefaultPredictor, classes: Classes, overlay_dir: Path | None
    ) -> None:
        """
        Args:
            predictor: takes a BGR image.
            classes: of the model.
            overlay_dir: None = no overlays.
        """
        self.predictions = Predictions(classes)
        self.failures: list[str] = []
        self._predictor = predictor
        self._overlay_dir = overlay_dir

    def run(self, sources: list[Source]) -> None:
        """Predict; what goes wrong with one source is logged and kept in ``failures``."""
        frame_counts = [
            max(1, int(_video_property(s.path, cv2.CAP_PROP_FRAME_COUNT))) if s.is_video else 1
            for s in sources
        ]
        with (
            logging_redirect_tqdm(loggers=[logger]),
            tqdm(total=sum(frame_counts), unit="image") as progress,
        ):
            for source in sources:
                try:
                    if source.is_video:
                        self._run_video(source, progress)
                    else:
                        self._run_image(source, progress)
                except SourceError as error:
                    self.failures.append(str(error))
                    logger.error(f"Failed: {error}")

    def _run_image(self, source: Source, progress: tqdm) -> None:
        progress.update()
        image = load_image(source.path)
        instances = self._predict(source, image)
        if self._overlay_dir is not None:
            path = self._overlay_path(source)
            overlay = draw_overlay(image, instances, self.predictions.classes.names)
            if not cv2.imwrite(str(path), overlay):
                raise SourceError(f"{source.path}: cannot write its overlay {path}.")

    def _run_video(self, source: Source, progress: tqdm) -> None:
        writer = None
        names = self.predictions.classes.names
        try:
            for k, frame in enumerate(read_frames(source.path)):
                instances = self._predict(source, frame, frame=k)
                progress.update()
                if self._overlay_dir is None:
                    continue
                overlay = draw_overlay(frame, instances, names, color_by_class=True)
                if writer is None:
                    writer = self._open_writer(source, overlay)
                writer.write(overlay)
        finally:
            if writer is not None:
                writer.release()

    def _open_writer(self, source: Source, overlay: np.ndarray) -> cv2.VideoWriter:
        fps = _video_property(source.path, cv2.CAP_PROP_FPS)
        if fps == 0:
            fps = 25.0
            logger.warning(f"{source.path} does not say its frame rate; its overlay has {fps}.")
        path = self._overlay_path(source)
        height, width = overlay.shape[:2]
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(path), codec, fps, (width, height))
        if not writer.isOpened():
            raise SourceError(f"{source.path}: OpenCV cannot write its overlay {path} (mp4v).")
        return writer

    def _overlay_path(self, source: Source) -> Path:
        path = self._overlay_dir / source.overlay
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceError(f"{source.path}: cannot write its overlay {path}: {error}") from error
        return path

    def _predict(self, source: Source, image: np.ndarray, **fields) -> Instances:
        start = time.perf_counter()
        instances = self._predictor(image)["instances"].to("cpu")
        seconds = time.perf_counter() - start
        entry = {"file_name": str(source.path), **fields}
        if self._overlay_dir is not None:
            entry["overlay"] = (Path(self._overlay_dir.name) / source.overlay).as_posix()
        self.predictions.add(entry, instances, seconds)
        return instances


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    overlay_dir = args.output_dir / "overlays"
    try:
        sources = find_sources(args.inputs, overlay_dir)
        cfg = setup_cfg(args)
        check_output_dir(args.output_dir)
    except UsageError as error:
        parser.error(str(error))
    classes = find_classes(cfg)
    runner = Runner(DefaultPredictor(cfg), classes, None if args.no_overlays else overlay_dir)
    runner.run(sources)
    runner.predictions.write(args.output_dir)

    print(runner.predictions.table())
    print(f"Results: {args.output_dir}")
    if runner.failures:
        print(f"{len(runner.failures)} of {len(sources)} inputs failed:", file=sys.stderr)
        print("\n".join(f"  {failure}" for failure in runner.failures), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for logger_name in ("detectron2", "fvcore", "teacher_student_mask"):
        setup_logger(name=logger_name)
    sys.exit(main())
