"""The demo's bookkeeping; the demo itself is run, shortened, by .ci/run."""

import json

import numpy as np
from PIL import Image

import demo
from demo_pictures import save_grid


def test_a_dataset_is_written_once(tmp_path, capsys):
    settings = {"num_train": 1, "num_val": 1, "image_size": 64, "seed": 0}
    demo.make_dataset(tmp_path, settings)
    image = tmp_path / "val" / "000000.png"
    written = image.stat().st_mtime_ns
    demo.make_dataset(tmp_path, settings)
    assert image.stat().st_mtime_ns == written
    assert "Using the dataset" in capsys.readouterr().out
    demo.make_dataset(tmp_path, {**settings, "seed": 1})
    assert image.stat().st_mtime_ns > written


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


def test_iterations_and_foreground_share_come_from_the_metrics(tmp_path):
    job = demo.Job("a", tmp_path, [], num_iters=40)
    assert job.iters_done() == 0
    lines = [
        {"iteration": 19, "pseudo_mask/fg_ratio": 0.3},
        {"iteration": 39, "pseudo_mask/fg_ratio": 0.25},
        {"iteration": 39, "segm/AP": 1.0},
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    assert job.iters_done() == 40
    assert demo.fg_ratio(tmp_path) == "25 %"


def test_a_failing_job_is_reported_with_the_end_of_its_output(tmp_path, capsys):
    done = demo.Job("done", tmp_path / "done", ["--no-such-flag"])
    done.folder.mkdir()
    (done.folder / "results.json").write_text("{}")
    assert demo.run_jobs("Training", [done])
    broken = demo.Job("broken", tmp_path / "broken", ["--no-such-flag"])
    assert not demo.run_jobs("Training", [done, broken])
    output = capsys.readouterr().out
    assert "Training failed for broken" in output and "unrecognized arguments" in output


def test_a_grid_has_a_column_per_title_and_a_row_per_image(tmp_path):
    red, blue = (
        np.full((64, 64, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255))
    )
    save_grid({"image": [red, blue], "model": [blue, red]}, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    centres = [[grid[18 + 34 + 68 * row, 34 + 68 * column] for column in (0, 1)] for row in (0, 1)]
    assert np.array_equal(centres, [[red[0, 0], blue[0, 0]], [blue[0, 0], red[0, 0]]])
