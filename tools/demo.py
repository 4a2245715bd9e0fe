#!/usr/bin/env python
"""
The whole path on the demo dataset: write it, train three models, evaluate, analyse, draw.

The models, on the same data, schedule and seed, half of the classes without masks in training:

  mask_rcnn                the baseline, one class-agnostic mask head
  teacher_student          the paper's method ("interact")
  teacher_student_box_fit  ours: pseudo masks that fit their boxes
  oracle                   with --oracle: masks of all classes, the upper bound

OUTPUT_DIR then holds results.md, report/report.html, demo.png, a picture per model, and a folder
per model with config.yaml, log.txt, metrics.json and model_final.pth. What is there is used again:
a second call only prints the results, and an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from detectron2.config import get_cfg
from tqdm import tqdm

from demo_pictures import draw_columns, save_grid
from demo_report import write_analysis
from environment.description import describe
from sweeps.training_jobs import REPOSITORY, Job, gt_boxes_folder, gt_boxes_job, run_jobs
from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.config_file import merge_config_file
from teacher_student_mask.data.shapes import SHAPES_SEEN_CLASSES, generate_shapes
from teacher_student_mask.evaluation import comparison_table

CONFIGS = {
    "mask_rcnn": "configs/shapes/mask_rcnn.yaml",
    "teacher_student": "configs/shapes/teacher_student.yaml",
    "teacher_student_box_fit": "configs/shapes/teacher_student_box_fit.yaml",
    "oracle": "configs/shapes/oracle.yaml",
}
# In the report, where long names leave no room for the charts.
LABELS = {
    "mask_rcnn": "baseline",
    "teacher_student": "interact",
    "teacher_student_box_fit": "box_fit",
    "oracle": "oracle",
}
DATASET = {"num_train": 800, "num_val": 200, "image_size": 96, "seed": 0}
SHORT_DATASET = {**DATASET, "num_train": 40, "num_val": 12}
SHORT_OPTIONS = ["SOLVER.MAX_ITER", "24", "MODEL.PSEUDO_MASK.WARMUP_ITERS", "12"]
NUM_PICTURES = 6


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start = time.perf_counter()
    output = args.output_dir
    names = [name for name in CONFIGS if args.oracle or name != "oracle"]
    options = SHORT_OPTIONS if args.short else []
    # The children, and the registered dataset here, look for it in this folder.
    os.environ["DETECTRON2_DATASETS"] = str((output / "datasets").resolve())

    if is_done(output, names):
        print((output / "results.md").read_text())
        print(f"Report, to be opened in a browser: {output / 'report' / 'report.html'}")
        print(f"All of this was there already; remove {output} to do it again.")
        return 0
    make_dataset(output / "datasets" / "shapes", SHORT_DATASET if args.short else DATASET)
    if not train(output, names, options) or not evaluate_on_gt_boxes(output, names):
        return 1
    draw(output, names)
    report = analyse(output, names)
    print(write_results(output, names, args.short, time.perf_counter() - start))
    print(f"Results, pictures, logs and checkpoints are in {output}: see {output}/demo.png")
    print(f"Report, to be opened in a browser: {report}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("output/demo"))
    parser.add_argument(
        "--short", action="store_true", help="a few steps only, to see that everything runs"
    )
    parser.add_argument("--oracle", action="store_true", help="train the oracle as well")
    return parser.parse_args(argv)


def is_done(output: Path, names: list[str]) -> bool:
    """Whether an earlier call went to its end with all these models."""
    folders = [gt_boxes_folder(output / name, head) for name in names for head in heads_of(name)]
    return (output / "results.md").is_file() and all(
        (folder / "results.json").is_file() for folder in folders
    )


def make_dataset(root: Path, settings: dict) -> None:
    """Write the dataset unless one with these settings is there."""
    marker = root / "settings.json"
    if marker.is_file() and json.loads(marker.read_text()) == settings:
        print(f"Using the dataset in {root}")
        return
    num_images = settings["num_train"] + settings["num_val"]
    with tqdm(total=num_images, desc="Drawing images", unit="image") as bar:
        generate_shapes(str(root), progress=lambda done, total: bar.update(), **settings)
    # Last, so that an interrupted dataset is written again.
    marker.write_text(json.dumps(settings))


def train(output: Path, names: list[str], options: list[str]) -> bool:
    """Train all models at the same time, a share of the cores each."""
    jobs = []
    for name in names:
        cfg = get_cfg()
        add_teacher_student_mask_config(cfg)
        merge_config_file(cfg, str(REPOSITORY / CONFIGS[name]))
        cfg.merge_from_list(options)
        arguments = ["--resume", "--config-file", CONFIGS[name], *options]
        arguments += ["OUTPUT_DIR", (output / name).resolve()]
        jobs.append(Job(name, output / name, arguments, cfg.SOLVER.MAX_ITER))
    return run_jobs("Training", jobs)


def evaluate_on_gt_boxes(output: Path, names: list[str]) -> bool:
    """Evaluate the masks on ground-truth boxes, of students and teachers."""
    jobs = [gt_boxes_job(name, output / name, head) for name in names for head in heads_of(name)]
    return run_jobs("Evaluating masks on ground-truth boxes", jobs)


def heads_of(name: str) -> list[str]:
    return ["student", "teacher"] if name.startswith("teacher_student") else ["student"]


def load_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def write_results(output: Path, names: list[str], short: bool, seconds: float) -> str:
    """Put the models side by side, whatever the outcome is; write and return results.md."""
    on_detections = {name: load_results(output / name) for name in names}
    on_gt_boxes = {
        f"{name}: {head}" if len(heads_of(name)) > 1 else name: load_results(
            gt_boxes_folder(output / name, head)
        )
        for name in names
        for head in heads_of(name)
    }
    coco = load_annotations(output)
    classes = [c["name"] for c in coco["categories"]]
    unseen = [name for name in classes if name not in SHAPES_SEEN_CLASSES]
    rows = ("segm_seen", "segm_unseen", "segm_unseen_overlap")
    num_gt = {row: on_detections[names[0]][row]["num_gt"] for row in rows}
    command = "python tools/demo.py" + (" --short" if short else "")
    lines = [
        "# Results of the demo",
        "",
        f"Classes with masks in training: {', '.join(SHAPES_SEEN_CLASSES)}; with boxes only: "
        f"{', '.join(unseen)}. COCO AP in percent on {len(coco['images'])} validation images with "
        f"{num_gt['segm_seen']} objects of seen and {num_gt['segm_unseen']} of unseen classes, "
        f"{num_gt['segm_unseen_overlap']} of these overlapped (O >= 0.3).",
        "",
        "Masks and boxes detected by the model:",
        "",
        comparison_table(on_detections, rows=("bbox",) + rows),
        "",
        "Masks alone, on the ground-truth boxes and classes:",
        "",
        comparison_table(on_gt_boxes, rows=rows),
        "",
        "One seed and no intervals: no difference here is established. Foreground in the pseudo "
        "masks at the end of training (near 0 or 100 % tells of a collapse): "
        + ", ".join(f"{n} {fg_ratio(output / n)}" for n in names if len(heads_of(n)) > 1)
        + ".",
        "",
        f"Command: `{command}`. Seed 1 (training), {DATASET['seed']} (data). This call took "
        f"{seconds:.0f} s on {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.cuda.device_count()} GPUs. " + ". ".join(str(line) for line in describe()) + ".",
    ]
    report = "\n".join(lines) + "\n"
    (output / "results.md").write_text(report)
    return report


def analyse(output: Path, names: list[str]) -> Path:
    """Write the report of baseline, students and teachers, and return its path."""
    # The models to look at come first: the report's pictures compare the first two.
    names = sorted(names, key=lambda name: name == "teacher_student")
    labels = {
        (name, head): f"{LABELS[name]} {head}" if len(heads_of(name)) > 1 else LABELS[name]
        for name in names
        for head in heads_of(name)
    }
    return write_analysis(
        output,
        {labels[name, "student"]: output / name for name in names},
        {label: gt_boxes_folder(output / key[0], key[1]) for key, label in labels.items()},
        {labels["teacher_student_box_fit", "teacher"]: output / "teacher_student_box_fit"},
    )


def fg_ratio(folder: Path) -> str:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    values = [x["pseudo_mask/fg_ratio"] for x in lines if "pseudo_mask/fg_ratio" in x]
    return f"{100 * values[-1]:.0f} %" if values else "unknown"


def load_annotations(output: Path) -> dict:
    path = output / "datasets" / "shapes" / "annotations" / "instances_val.json"
    return json.loads(path.read_text())


def draw(output: Path, names: list[str]) -> None:
    """Write one picture per model of the same validation images, and all side by side."""
    columns = draw_columns(output, names, NUM_PICTURES)
    save_grid(columns, output / "demo.png")
    for name in names:
        save_grid({k: columns[k] for k in ("image", "ground truth", name)}, output / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
