"""tsmask analyze: from result files or a model to a report, and sentences about wrong input."""

import json
from pathlib import Path

import pytest
from bad_data import complete
from report_example import make_files
from saved_model import TEACHER_STUDENT, save_model

from teacher_student_mask.cli.main import main


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


def run(files, tmp_path, *more):
    arguments = ["--annotations", files["truth"], "--seen", "dog", "--resamples", 20]
    arguments += ["--output-dir", tmp_path / "out", "--results", f"a={files['exact']}", *more]
    return main(["analyze", *map(str, arguments)])


def summary_of(tmp_path):
    return json.loads((tmp_path / "out" / "analysis.json").read_text())


def test_writes_the_report_and_prints_sentences_and_path(files, tmp_path, capsys):
    assert run(files, tmp_path, f"b={files['swollen']}", "--images", tmp_path) == 0
    output = capsys.readouterr().out
    assert "a: box AP 100.0; mask AP of unseen classes 100.0." in output
    assert str(tmp_path / "out" / "report.html") in output
    summary = summary_of(tmp_path)
    assert list(summary["models"]) == ["a", "b"]
    assert summary["settings"]["num_resamples"] == 20
    assert len(summary["differences"]) == 1


def test_settings_reach_the_measurement(files, tmp_path):
    options = ["--bins", 0, 0.5, 1, "--threshold", 0.2, "--score-threshold", 0.95, "--seed", 3]
    options += ["--confidence", 0.9]
    options += ["--gt-box-results", f"a={files['exact']}"]
    assert run(files, tmp_path, *options) == 0
    settings = summary_of(tmp_path)["settings"]
    assert settings["overlap_bins"] == [0, 0.5, 1] and settings["overlap_threshold"] == 0.2
    assert settings["score_threshold"] == 0.95
    assert settings["seed"] == 3 and settings["confidence"] == 0.9
    model = summary_of(tmp_path)["models"]["a"]
    assert model["false_positives"]["num_objects"] == 0
    assert model["gt_boxes"]["false_positives"]["num_objects"] == 12


def test_more_objects_than_ap_counts_are_told_once(tmp_path, log):
    files = make_files(tmp_path)
    for name in ("truth", "exact"):
        content = json.loads(Path(files[name]).read_text())
        for x in content["annotations"] if name == "truth" else content:
            x["category_id"] = 1
        Path(files[name]).write_text(json.dumps(content))

    def segm_ap(limit):
        assert run(files, tmp_path, "--max-detections", limit) == 0
        return summary_of(tmp_path)["models"]["a"]["segm"]["AP"]

    assert segm_ap(2) < 80
    assert log.text.count("AP counts 2 detections") == 1 and "3 of category 1" in log.text
    assert segm_ap(3) == pytest.approx(100) and log.text.count("AP counts") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--bins", "0.5"], ["0.5", "from 0 to 1"]),
        (["--seen", "dgo"], ["dgo", "dog"]),
        (["--baseline", "c"], ["baseline", "'c'"]),
        (["--images", "no/such/folder"], ["no/such/folder"]),
        (["--results", "a=no.json"], ["no.json"]),
    ],
)
def test_wrong_input_is_one_sentence(files, tmp_path, capsys, options, words):
    assert run(files, tmp_path, *options) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words)
    assert not (tmp_path / "out" / "report.html").exists()


def test_objects_of_images_that_are_not_listed_are_left_out_with_a_warning(files, tmp_path):
    assert run(files, tmp_path) == 0
    before = summary_of(tmp_path)["models"]["a"]
    truth = json.loads(Path(files["truth"]).read_text())
    truth["annotations"].append({**truth["annotations"][0], "id": 999, "image_id": 999})
    Path(files["truth"]).write_text(json.dumps(truth))
    assert run(files, tmp_path) == 0
    assert summary_of(tmp_path)["models"]["a"] == before
    assert any("999" in x["message"] for x in summary_of(tmp_path)["warnings"])


def test_each_file_has_a_name_and_a_model_its_own_data(
    files, tmp_path, capsys, tiny_coco, tiny_cfg
):
    assert run(files, tmp_path, f"a={files['swollen']}") == 1
    assert "each file needs a NAME of its own" in capsys.readouterr().err
    save_model(tiny_cfg(dataset=tiny_coco), tmp_path / "model")
    words = [tmp_path / "model", "--annotations", files["truth"], "--output-dir", tmp_path / "x"]
    assert main(["analyze", *map(str, words)]) == 1
    assert "MODEL runs on its test data" in capsys.readouterr().err


def test_the_data_of_a_model_may_lack_classes(make_tiny_coco, tiny_coco, tiny_cfg, tmp_path):
    def change(data):  # and have the others under other ids
        complete(data)
        ids = {17: 1, 90: 2}
        data["categories"] = [
            {**x, "id": ids[x["id"]]} for x in data["categories"] if x["id"] in ids
        ]
        objects = [x for x in data["annotations"] if x["category_id"] in ids]
        data["annotations"] = [{**x, "category_id": ids[x["category_id"]]} for x in objects]

    save_model(tiny_cfg(opts=TEACHER_STUDENT, dataset=tiny_coco), tmp_path / "model")
    words = [tmp_path / "model", "--resamples", 0, "--output-dir", tmp_path / "out"]
    words += ["--opts", "DATASETS.TEST", repr((make_tiny_coco(change).name,))]
    assert main(["analyze", *map(str, words)]) == 0
    assert summary_of(tmp_path)["dataset"]["seen_classes"] == ["ship"]


def test_a_model_is_run_first(make_tiny_coco, tiny_cfg, tmp_path, capsys):
    """Student and teacher become two models, compared on detected and on the same given boxes."""

    dataset = make_tiny_coco(complete)
    cfg = tiny_cfg(opts=TEACHER_STUDENT, dataset=dataset)
    save_model(cfg, tmp_path / "model")
    options = [str(tmp_path / "model"), "--resamples", "5", "--output-dir", str(tmp_path / "out")]
    options += ["--opts", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    assert main(["analyze", *options]) == 0
    assert "\nteacher: " in capsys.readouterr().out
    summary = summary_of(tmp_path)
    assert list(summary["models"]) == ["student", "teacher"]
    assert summary["dataset"]["seen_classes"] == ["ant", "ship"]
    for model in summary["models"].values():
        assert model["num_detections"] > 0
        assert model["gt_boxes"]["num_masks"] == summary["dataset"]["num_unseen"] == 3
    assert "box_fit" in summary["models"]["teacher"]["pseudo_masks"]["methods"]
    assert {x["protocol"] for x in summary["differences"]} == {"detections", "gt_boxes"}
