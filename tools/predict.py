#!/usr/bin/env python
"""
Run a trained model on images, folders, globs and videos.

Writes pictures with the detected objects, and their masks as COCO results. The model runs in
Detectron2's DefaultPredictor. See --help.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.logger import setup_logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from coco_results import Classes, Predictions
from media import Source, SourceError, find_sources
from overlays import OverlayWriter
from teacher_student_mask import add_teacher_student_mask_config

logger = logging.getLogger("teacher_student_mask")

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
        counts = [source.announced_images() for source in sources]
        with (
            logging_redirect_tqdm(loggers=[logger]),
            tqdm(total=sum(counts), unit="image") as progress,
        ):
            for source, count in zip(sources, counts):
                end = progress.n + count
                try:
                    self._run(source, progress)
                except SourceError as error:
                    self.failures.append(str(error))
                    logger.error(f"Failed: {error}")
                # What could not be read is done, too.
                progress.update(max(0, end - progress.n))

    def _run(self, source: Source, progress: tqdm) -> None:
        entry = {"file_name": str(source.path)}
        if self._overlay_dir is None:
            writer = contextlib.nullcontext()
        else:
            writer = OverlayWriter(source, self._overlay_dir, self.predictions.classes.names)
            entry["overlay"] = (Path(self._overlay_dir.name) / source.overlay).as_posix()
        with writer as overlay:
            for k, image in enumerate(source.read()):
                start = time.perf_counter()
                instances = self._predictor(image)["instances"].to("cpu")
                seconds = time.perf_counter() - start
                frame = {"frame": k} if source.is_video else {}
                self.predictions.add({**entry, **frame}, instances, seconds)
                progress.update()
                if overlay is not None:
                    overlay.write(image, instances)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser, args = parse_args(argv)
    overlay_dir = args.output_dir / "overlays"
    try:
        sources = find_sources(args.inputs, overlay_dir)
        cfg = setup_cfg(args)
        check_output_dir(args.output_dir)
    except (SourceError, UsageError) as error:
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
