"""The demo's bookkeeping; the demo itself is run, shortened, by .ci/run."""

import json
import os

import numpy as np
from PIL import Image

import demo
from demo_pictures import save_grid


def test_a_dataset_is_written_once(tmp_path, capsys):
    settings = {"num_train": 1, "num_val": 1, "image_size": 64, "seed": 0}
    demo.make_dataset(tmp_path, settings)
    image = tmp_path / "val" / "000000.png"
    os.utime(image, ns=(0, 0))
    demo.make_dataset(tmp_path, settings)
    assert image.stat().st_mtime_ns == 0
    assert "Using the dataset" in capsys.readouterr().out
    demo.make_dataset(tmp_path, {**settings, "seed": 1})
    assert image.stat().st_mtime_ns > 0


def test_a_demo_is_done_when_all_its_results_are_there(tmp_path):
    names = ["mask_rcnn", "teacher_student"]
    (tmp_path / "results.md").write_text("results")
    folders = ["mask_rcnn/gt_boxes_student", "teacher_student/gt_boxes_student"]
    for folder in [*folders, "teacher_student/gt_boxes_teacher"]:
        assert not demo.is_done(tmp_path, names)
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "results.json").write_text("{}")
    assert demo.is_done(tmp_path, names)
    assert not demo.is_done(tmp_path, [*names, "oracle"])


def test_the_foreground_share_comes_from_the_metrics(tmp_path):
    lines = [
        {"iteration": 19, "pseudo_mask/fg_ratio": 0.3},
        {"iteration": 39, "pseudo_mask/fg_ratio": 0.25},
        {"iteration": 39, "segm/AP": 1.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert demo.fg_ratio(tmp_path) == "25 %"


def test_what_the_demo_trains_are_jobs_of_its_configs(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run_jobs", lambda title, jobs: calls.append((title, jobs)) or True)
    assert demo.train(tmp_path, ["mask_rcnn", "teacher_student"], ["SOLVER.MAX_ITER", "24"])
    assert demo.evaluate_on_gt_boxes(tmp_path, ["mask_rcnn", "teacher_student"])
    (_, trainings), (_, evaluations) = calls
    assert [job.name for job in trainings] == ["mask_rcnn", "teacher_student"]
    assert all(job.num_iters == 24 and job.arguments[0] == "--resume" for job in trainings)
    folders = [job.folder.relative_to(tmp_path) for job in evaluations]
    assert [str(x) for x in folders] == [
        "mask_rcnn/gt_boxes_student",
        "teacher_student/gt_boxes_student",
        "teacher_student/gt_boxes_teacher",
    ]
    assert all(job.num_iters == 0 for job in evaluations)


def test_a_grid_has_a_column_per_title_and_a_row_per_image(tmp_path):
    red, blue = (
        np.full((64, 64, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255))
    )
    save_grid({"image": [red, blue], "model": [blue, red]}, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    centres = [[grid[18 + 34 + 68 * row, 34 + 68 * column] for column in (0, 1)] for row in (0, 1)]
    assert np.array_equal(centres, [[red[0, 0], blue[0, 0]], [blue[0, 0], red[0, 0]]])
