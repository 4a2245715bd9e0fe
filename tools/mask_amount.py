#!/usr/bin/env python
"""How the masks of a model get better with the number of masks it was trained with. See --help."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import get_cfg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from tabulate import tabulate

import hide_masks
from environment.description import describe
from sweeps.configs import folder_name
from sweeps.training_jobs import (
    Job,
    even_slots,
    gt_boxes_job,
    path_for_child,
    run_jobs,
)
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.checks.mask_measures import has_mask
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.engine import open_atomically

DESCRIPTION = """
Hides the masks of all but a share of the objects of a COCO json that has them all (as
tools/hide_masks.py does), trains each config on it, evaluates it on the config's DATASETS.TEST, and
does so for each share. All boxes stay, and training may use every mask that is left
(DATASETS.SEEN_CLASSES "all"). OUTPUT_DIR then holds
  mask_amount.md   a table of AP, masks alone on the ground-truth boxes, and on detected boxes
  mask_amount.png  mask AP on ground-truth boxes over the number of masks
  data/            the jsons
  <config>/...     config.yaml, log.txt, metrics.json and checkpoints of each training
What is there is used again: an interrupted call goes on where it stopped.
"""

EXAMPLES = """
examples:
  %(prog)s                                   on the demo dataset; tools/make_shapes.py writes it
  %(prog)s --shares 0.1 0.3 1 --seeds 1 2 3  other shares, several choices of the masks
  %(prog)s --annotations data/train.json --image-root data/images --output-dir output/amount \\
      --configs my_teacher_student.yaml my_mask_rcnn.yaml    data and configs of yours

exit code: 0; 1 if a training failed; 2 for a wrong command line.
"""

CONFIGS = (
    "configs/shapes/teacher_student_box_fit.yaml",
    "configs/shapes/mask_rcnn.yaml",
)
ANNOTATIONS = "datasets/shapes/annotations/instances_train.json"
IMAGES = "datasets/shapes/train"
# Okabe and Ito's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
MARKERS = ("o", "s", "D", "^", "v")


@dataclass(frozen=True)
class Point:
    """A training: a config on a share of the masks, in a seed."""

    config: str
    share: str  # as it was given
    seed: int
    num_masks: int
    training: Job
    evaluation: Job

    def ap(self, is_on_gt_boxes: bool, task: str, metric: str = "AP") -> float:
        """A metric, 0 to 100, of masks on the ground-truth boxes, or of what was detected."""
        folder = self.evaluation.folder if is_on_gt_boxes else self.training.folder
        results = json.loads((folder / "results.json").read_text())
        return results[task][metric]


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    data = args.output_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    points = []
    for seed, share in itertools.product(args.seeds, args.shares):
        path = data / f"keep_{folder_name(share)}_seed_{seed}.json"
        options = ["--keep", share, "--seed", str(seed), "--force"]
        if hide_masks.main([args.annotations, str(path), *options]) != 0:
            return 1
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["annotations"]
        num_masks = sum(has_mask(x) and not x.get("iscrowd") for x in rows)
        points += [make_point(args, x, share, seed, num_masks, path) for x in args.configs]
    points.sort(key=lambda x: (x.seed, x.num_masks))
    jobs = [job for point in points for job in (point.training, point.evaluation)]
    if not run_jobs("Training and evaluating", jobs, even_slots(args.jobs)):
        return 1
    table = write_table(args, argv, points)
    draw(args.output_dir / "mask_amount.png", points)
    print(table)
    print(f"Written to {args.output_dir}: mask_amount.md, mask_amount.png")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=CONFIGS, metavar="YAML", help="(default: %(default)s)")
    add("--annotations", default=ANNOTATIONS, metavar="JSON", help="(default: %(default)s)")
    add("--image-root", default=IMAGES, metavar="DIR", help="(default: %(default)s)")
    add(
        "--shares",
        nargs="+",
        default=["0.01", "0.05", "0.1", "0.2", "1"],
        metavar="SHARE",
        help="of the masks of each class that stay (default: %(default)s)",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="of the training and of the choice of the masks (default: %(default)s)",
    )
    add("--output-dir", type=Path, default=Path("output/mask_amount"), metavar="DIR")
    add("--jobs", type=int, default=1, metavar="N", help="at the same time (default: %(default)s)")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes to all configs")
    args = parser.parse_args(argv)
    args.configs = [os.path.normpath(x) for x in args.configs]
    for path in (*args.configs, args.annotations):
        if not os.path.isfile(path):
            parser.error(f"{path}: no such file.")
    try:
        for path in args.configs:
            num_iters(path, args.opts)
    except ValueError as error:
        parser.error(str(error))
    if not os.path.isdir(args.image_root):
        parser.error(f"--image-root {args.image_root}: no such folder.")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}.")
    try:
        # 0.5 and 1/2 are the same.
        if len({hide_masks.share(x) for x in args.shares}) < len(args.shares):
            parser.error(f"--shares: one is given twice: {' '.join(args.shares)}.")
    except argparse.ArgumentTypeError as error:
        parser.error(f"--shares: {error}")
    if len({Path(x).stem for x in args.configs}) < len(args.configs):
        parser.error("--configs: two files have the same name, and would share a folder.")
    return args


def make_point(
    args: argparse.Namespace, config: str, share: str, seed: int, num_masks: int, path: Path
) -> Point:
    """Plan a training and its evaluation on the ground-truth boxes; starts nothing."""
    name = folder_name(Path(config).stem)
    folder = args.output_dir / name / f"keep_{folder_name(share)}_seed_{seed}"
    options = ["DATASETS.TRAIN", repr((path_for_child(path),)), "DATASETS.SEEN_CLASSES", "all"]
    options += ["DATASETS.TRAIN_IMAGE_ROOT", path_for_child(args.image_root), "SEED", seed]
    arguments = ["--resume", "--config-file", path_for_child(config), *args.opts, *options]
    arguments += ["OUTPUT_DIR", path_for_child(folder)]
    name = f"{name}, {share} of the masks, seed {seed}"
    training = Job(name, folder, arguments, num_iters(config, args.opts))
    evaluation = gt_boxes_job(name, folder, "student", after=training)
    return Point(config, share, seed, num_masks, training, evaluation)


def num_iters(config: str, opts: list[str]) -> int:
    """
    How long the training of a config is.

    Raises:
        ValueError: the file or the changes have a key or a value that cannot be.
    """
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    try:
        merge_config_file(cfg, config)
        cfg.merge_from_list(list(opts))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"{config} with --opts {' '.join(opts)}: {error}") from error
    return cfg.SOLVER.MAX_ITER


def write_table(args: argparse.Namespace, argv: list[str] | None, points: Sequence[Point]) -> str:
    """Write mask_amount.md, a line for each share and config; returns its text."""
    rows = []
    for share in dict.fromkeys(x.share for x in points):
        for config in dict.fromkeys(x.config for x in points):
            group = [x for x in points if (x.share, x.config) == (share, config)]
            masks = [f"{x.num_masks}" for x in group]
            cells = [percent(share), " ".join(dict.fromkeys(masks))]
            cells.append(f"`{Path(config).stem}`")
            for where in ((True, "segm"), (True, "segm", "AP50"), (False, "segm"), (False, "bbox")):
                cells.append(_mean_and_spread([x.ap(*where) for x in group]))
            rows.append(cells)
    headers = ["share", "masks", "config", "mask AP, ground-truth boxes", "AP50, the same"]
    headers += ["mask AP, detected boxes", "box AP"]
    command = shlex.join(
        ["python", "tools/mask_amount.py", *(sys.argv[1:] if argv is None else argv)]
    )
    text = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True) + "\n\n"
    text += f"Command: `{command}`. Seeds: {', '.join(map(str, args.seeds))}"
    text += "; mean ± standard deviation of the sample" if len(args.seeds) > 1 else ""
    text += f". {os.cpu_count()} CPU cores. "
    text += ". ".join(describe()) + ".\n"
    with open_atomically(args.output_dir / "mask_amount.md") as f:
        f.write(text)
    return text


def percent(share: str) -> str:
    """A share as it was given, as 12.5 %."""
    return f"{100 * float(hide_masks.share(share)):g} %"


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def draw(path: Path, points: Sequence[Point]) -> None:
    """Draw mask AP on ground-truth boxes over the number of masks: points, lines of their means."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for k, config in enumerate(dict.fromkeys(x.config for x in points)):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        values: dict[str, list[tuple[int, float]]] = {}
        for x in (x for x in points if x.config == config):
            value = x.ap(True, "segm")
            if not math.isnan(value):
                values.setdefault(x.share, []).append((max(x.num_masks, 1), value))
        for rows in values.values():
            ax.plot(*zip(*rows), linestyle="", alpha=0.35, ms=4, **style)
        means = [tuple(map(statistics.mean, zip(*rows))) for rows in values.values()]
        ax.plot(*zip(*means), label=Path(config).stem, linewidth=1.8, **style)
    ticks = {x.num_masks: x.share for x in points}
    ax.set_xscale("log")
    labels = [f"{n}\n{percent(x)}" for n, x in ticks.items()]
    ax.set_xticks([max(n, 1) for n in ticks], labels)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("masks in the training data, and their share of the objects")
    ax.set_ylabel("mask AP on ground-truth boxes")
    ax.set_ylim(bottom=0)
    ax.grid(axis="both", color="#e3e7ec")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
