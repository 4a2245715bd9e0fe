"""The command line of tools/analyze.py; what it measures is tested in tests/analysis."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from saved_model import save_model

import analyze as program


def rectangle(x, y, w, h):
    mask = np.zeros((40, 40), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture
def files(tmp_path):
    """Two images with one object each, and a result file that finds both."""
    objects = [(1, 1, (2, 2, 20, 20)), (2, 2, (10, 10, 20, 20))]
    annotations = [
        {
            "id": k + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": list(box),
            "area": 400,
            "iscrowd": 0,
            "segmentation": rectangle(*box),
        }
        for k, (image_id, category_id, box) in enumerate(objects)
    ]
    truth = {
        "images": [{"id": i, "height": 40, "width": 40, "file_name": f"{i}.png"} for i in (1, 2)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "pole"}],
        "annotations": annotations,
    }
    keys = ("image_id", "category_id", "bbox", "segmentation")
    results = [{k: x[k] for k in keys} | {"score": 0.9} for x in annotations]
    for name, content in (("truth", truth), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def arguments(files, *more):
    required = ["--annotations", files / "truth.json", "--seen", "dog", "--resamples", 20]
    required += ["--output-dir", files / "out", "--results", f"a={files / 'results.json'}"]
    return [str(x) for x in [*required, *more]]


def test_writes_the_report_and_prints_table_and_path(files, capsys):
    assert program.main(arguments(files, f"b={files / 'results.json'}")) == 0
    output = capsys.readouterr().out
    assert "segm_unseen AP" in output and "100.00" in output
    assert str(files / "out" / "report.html") in output
    summary = json.loads((files / "out" / "analysis.json").read_text())
    assert list(summary["models"]) == ["a", "b"]
    assert summary["settings"]["num_resamples"] == 20
    assert len(summary["differences"]) == 1


def test_settings_reach_the_measurement(files):
    options = ["--bins", 0, 0.5, 1, "--threshold", 0.2, "--score-threshold", 0.95, "--seed", 3]
    options += ["--confidence", 0.9, "--ties", "smaller"]
    options += ["--gt-box-results", f"a={files / 'results.json'}"]
    assert program.main(arguments(files, *options)) == 0
    summary = json.loads((files / "out" / "analysis.json").read_text())
    settings = summary["settings"]
    assert settings["overlap_bins"] == [0, 0.5, 1] and settings["overlap_threshold"] == 0.2
    assert settings["score_threshold"] == 0.95 and settings["ties"] == "smaller"
    assert settings["seed"] == 3 and settings["confidence"] == 0.9
    model = summary["models"]["a"]
    assert len(model["overlap_bins"]) == 3
    assert model["false_positives"]["num_objects"] == 0
    assert model["gt_boxes"]["false_positives"]["num_objects"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x[1].update(image_id=77), ["results.json", "entry 1", "image_id", "77"]),
        (lambda x: x[0].pop("score"), ["results.json", "entry 0", "score"]),
        (lambda x: x[0].update(score=float("nan")), ["results.json", "entry 0", "score", "nan"]),
    ],
)
def test_bad_input_ends_with_one_sentence(files, capsys, change, words):
    path = files / "results.json"
    entries = json.loads(path.read_text())
    change(entries)
    path.write_text(json.dumps(entries))
    assert program.main(arguments(files)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error.lower() or word in error
    assert not (files / "out" / "report.html").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--annotations, --seen and --results"),
        (["--results", "no-equals-sign"], "NAME=FILE"),
        (["--config-file", "x", "--results", "a=x", "a=y"], "stands twice"),
        (["--config-file", "x", "--images", "no/such/folder"], "no/such/folder"),
        (["--config-file", "x", "--num-pictures", "-1"], "0 or more"),
    ],
)
def test_wrong_command_lines_are_explained(files, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        program.main(["--output-dir", str(files / "out"), *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option, value", [("--bins", "0.5"), ("--threshold", "7")])
def test_settings_out_of_range_are_explained(files, capsys, option, value):
    assert program.main(arguments(files, option, value)) == 2
    assert value in capsys.readouterr().err


def test_help_shows_examples_that_parse(capsys, monkeypatch):
    # The folder of the example's images.
    monkeypatch.setattr(program.os.path, "isdir", lambda path: True)
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text = capsys.readouterr().out
    examples = text.split("examples:")[1].split("in Python:")[0]
    assert examples.count("--output-dir") == 3
    command = examples.split("\n\n")[0].replace("\\\n", " ").split(":", 1)[1].split()[1:]
    _, args = program.parse_args(command)
    assert [name for name, _ in args.results] == ["baseline", "ours"]


def give_all_objects_a_mask(data):
    for x in data["annotations"]:
        left, top, width, height = x["bbox"]
        if not x.get("segmentation"):
            x["segmentation"] = [[left, top, left + width, top, left, top + height]]


def test_a_model_is_run_first(make_tiny_coco, tiny_cfg, tmp_path, capsys):
    """Student and teacher become two models, compared on detected and on the same given boxes."""
    dataset = make_tiny_coco(give_all_objects_a_mask)
    opts = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads"]
    config, weights = save_model(tiny_cfg(opts=opts, dataset=dataset), tmp_path / "model")
    options = ["--config-file", config, "--weights", weights, "--resamples", 5]
    options += [
        "--output-dir",
        tmp_path / "out",
        "--opts",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.0,
    ]
    assert program.main([str(x) for x in options]) == 0
    assert "Ground-truth boxes:" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(summary["models"]) == ["student", "teacher"]
    assert summary["dataset"]["seen_classes"] == ["ant", "ship"]
    for model in summary["models"].values():
        assert model["num_detections"] > 0
        assert model["gt_boxes"]["num_masks"] == summary["dataset"]["num_unseen"] == 3
    assert "box_fit" in summary["models"]["teacher"]["pseudo_masks"]["methods"]
    assert {x["protocol"] for x in summary["differences"]} == {"detections", "gt_boxes"}
