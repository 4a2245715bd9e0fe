"""
The whole path on a small drawn dataset: write it, train three models, evaluate, analyse.

The models, on the same data, schedule and seed, half of the classes without masks in training:

  mask_rcnn                the baseline, one class-agnostic mask head
  teacher_student          the paper's method ("interact")
  teacher_student_box_fit  ours: pseudo masks that fit their boxes

DIR then holds summary.md, report/report.html with pictures, the dataset in datasets/shapes, and a
folder per model with config.yaml, log.txt, metrics.json and model_final.pth. What is there is used
again, and an interrupted call goes on where it stopped.

  tsmask demo                                the whole demo: ten minutes on two CPU cores
  tsmask demo --short --output-dir output/a  a few steps, to see that everything runs
  tsmask demo --data-only --output-dir .     the dataset alone, in ./datasets/shapes
"""

import argparse
import json
from pathlib import Path

__all__ = ["add_arguments", "run"]

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "shapes"
# Names in the report, where long ones leave no room for the charts.
MODELS = {
    "mask_rcnn": "baseline",
    "teacher_student_box_fit": "box_fit",
    "teacher_student": "interact",
}
DATASET = {"num_train": 800, "num_val": 200, "image_size": 96, "seed": 0}
SHORT_DATASET = {**DATASET, "num_train": 40, "num_val": 12}
SHORT_OPTIONS = ("SOLVER.MAX_ITER", "24", "MODEL.PSEUDO_MASK.WARMUP_ITERS", "12")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``tsmask demo``."""
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("output/demo"), metavar="DIR", help="%(default)s")
    add("--short", action="store_true", help="a few steps only, to see that everything runs")
    add("--data-only", action="store_true", help="write the dataset and stop")


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, and print the results."""
    output = args.output_dir
    data = output / "datasets" / "shapes"
    settings = SHORT_DATASET if args.short else DATASET
    if args.data_only:
        _write_dataset(data, settings)
        return 0
    import dataclasses
    import shlex

    from ..sweep import (
        plan_sweep,
        refuse_other_changes,
        run_sweep,
        write_summary,
        write_sweep_report,
    )

    opts = list(SHORT_OPTIONS) if args.short else []
    for key, split in ("TRAIN", "train"), ("TEST", "val"):
        json_file = (data / "annotations" / f"instances_{split}.json").resolve()
        opts += [f"DATASETS.{key}", repr((str(json_file),))]
        opts += [f"DATASETS.{key}_IMAGE_ROOT", str((data / split).resolve())]
    configs = [shlex.quote(f"{name}={CONFIGS / name}.yaml") for name in MODELS]
    runs = {
        run.config: dataclasses.replace(run, folder=(output / run.config).resolve())
        for run in plan_sweep(configs, output, opts=opts, report=True)
    }
    for run in runs.values():  # --short is a change
        refuse_other_changes(run)
    _write_dataset(data, settings)
    if run_sweep(list(runs.values()), output / "jobs", jobs=len(runs)):
        return 1
    named = {label: runs[name] for name, label in MODELS.items()}
    report = write_sweep_report(named, output / "report")
    print(write_summary(output))
    print("\nOne seed and no intervals: no difference here is established.")
    print(f"Report, to be opened in a browser: {report}")
    return 0


def _write_dataset(root: Path, settings: dict) -> None:
    """Write the dataset unless one with these arguments of ``generate_shapes`` is there."""
    marker = root / "settings.json"
    if marker.is_file() and json.loads(marker.read_text()) == settings:
        print(f"Using the dataset in {root}")
        return
    from ..data.shapes import generate_shapes

    print(f"Drawing {settings['num_train'] + settings['num_val']} images into {root}", flush=True)
    generate_shapes(str(root), **settings)
    # Last, so that an interrupted dataset is written again.
    marker.write_text(json.dumps(settings))
