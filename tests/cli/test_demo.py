"""The parts of ``tsmask demo``; the demo itself is run, shortened, by .ci/run."""

import json
import os

import pytest

from teacher_student_mask import sweep
from teacher_student_mask.cli import demo
from teacher_student_mask.cli.main import main

METRICS = {"AP": 10.0, "AP50": 20.0, "num_gt": 3}
TASKS = ("bbox", "segm_seen", "segm_unseen", "segm_unseen_overlap")


@pytest.fixture
def small(monkeypatch):
    settings = {"num_train": 1, "num_val": 2, "image_size": 64, "seed": 0}
    monkeypatch.setattr(demo, "DATASET", settings)
    return settings


def test_the_dataset_is_written_once(tmp_path, small, monkeypatch, capsys):
    command = ["demo", "--data-only", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    image = tmp_path / "datasets/shapes/val/000000.png"
    os.utime(image, ns=(0, 0))
    assert main(command) == 0
    assert image.stat().st_mtime_ns == 0
    assert "Using the dataset" in capsys.readouterr().out
    monkeypatch.setattr(demo, "DATASET", {**small, "seed": 1})
    assert main(command) == 0
    assert image.stat().st_mtime_ns > 0


def test_the_demo_trains_its_configs_on_its_data_and_does_nothing_twice(
    tmp_path, small, monkeypatch, capsys
):
    trained = []

    def run_sweep(runs, log_dir, jobs):
        for run in (x for x in runs if not x.is_done):
            trained.append(run)
            results = dict.fromkeys(TASKS, METRICS)
            run.folder.mkdir()
            record = {"config": run.config, "seen_set": None, "seed": 1, "opts": run.opts}
            record["results"] = dict.fromkeys(["detections", *run.evaluations], results)
            (run.folder / "run.json").write_text(json.dumps(record))
        return []

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    monkeypatch.setattr(sweep, "write_sweep_report", lambda runs, folder: folder / "report.html")
    tmp_path = tmp_path / "it's a demo"
    command = ["demo", "--output-dir", str(tmp_path)]
    assert main(command) == 0 and main(command) == 0
    assert [run.config for run in trained] == list(demo.MODELS)
    run = trained[1]
    assert run.folder == tmp_path / "teacher_student_box_fit"
    assert list(run.evaluations) == ["gt_boxes_student", "gt_boxes_teacher"]
    assert str(tmp_path / "datasets/shapes/train") in run.arguments
    assert "Report, to be opened" in capsys.readouterr().out
    # Of another length: neither the data nor the models are touched.
    assert main([*command, "--short"]) == 1
    assert "has a run with other changes, DATASETS.TRAIN" in capsys.readouterr().err
    assert json.loads((tmp_path / "datasets/shapes/settings.json").read_text()) == small
    text = (tmp_path / "summary.md").read_text()
    assert "gt_boxes_teacher" in text and "teacher_student_box_fit" in text
