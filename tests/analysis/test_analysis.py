"""The measurements of an analysis, on a few hand-made images."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest

from teacher_student_mask.analysis import Bootstrap, InputError, Settings, analyze, write_report
from teacher_student_mask.analysis.analysis import without_nan

TASKS = ["segm", "segm_seen", "segm_unseen", "segm_unseen_overlap"]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
FEW = Settings(bootstrap=Bootstrap(num_resamples=40))


def rectangle(x, y, w, h):
    mask = np.zeros((60, 80), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = mask_util.encode(mask)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def make_files(folder, num_images=6):
    """Images with a seen dog, an unseen pole beside it and an unseen kite on top of the dog."""
    annotations = []
    boxes = {1: (5, 5, 20, 20), 2: (50, 5, 6, 40), 3: (15, 5, 20, 20)}
    for image_id in range(1, num_images + 1):
        for category_id, box in boxes.items():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": rectangle(*box),
                }
            )
    truth = {
        "images": [
            {"id": i, "height": 60, "width": 80, "file_name": f"{i}.jpg"}
            for i in range(1, num_images + 1)
        ],
        "categories": [{"id": i, "name": n} for i, n in ((1, "dog"), (2, "pole"), (3, "kite"))],
        "annotations": annotations,
    }
    exact = [
        {k: x[k] for k in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9}
        for x in annotations
    ]
    # Every second kite swallows the dog.
    swollen = [dict(x) for x in exact]
    for x in swollen:
        if x["category_id"] == 3 and x["image_id"] % 2:
            x["segmentation"] = rectangle(5, 5, 30, 20)
    paths = {}
    for name, content in (("truth", truth), ("exact", exact), ("swollen", swollen)):
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


def run(files, settings=FEW, **kwargs):
    results = {name: files[name] for name in ("exact", "swollen")}
    return analyze(
        files["truth"],
        results,
        seen_classes="dog",
        settings=settings,
        show_progress=False,
        **kwargs,
    )


def test_three_lines_of_python_write_a_report(files, tmp_path):
    analysis = run(files)
    report = write_report(analysis, tmp_path / "out")
    assert report.is_file()
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == analysis.summary


def test_metrics_by_hand(files):
    models = run(files).summary["models"]
    for task, num_gt in zip(TASKS, (18, 6, 12, 6)):
        assert models["exact"][task] == {
            "AP": pytest.approx(100),
            "AP50": pytest.approx(100),
            "AP75": pytest.approx(100),
            "APs": pytest.approx(100),
            "APm": None,
            "APl": None,
            "num_gt": num_gt,
        }
    # IoU of a swollen kite 400 / 600: right up to 0.65, that is at 4 of 10 thresholds. Above, with
    # equal scores, wrong and right take turns: 1/2, 2/4, 3/6 are right, three of six are found.
    above = 0.5 * 51 / 101
    kite = 100 * (4 + 6 * above) / 10
    assert models["swollen"]["segm_unseen_overlap"]["AP"] == pytest.approx(kite)
    assert models["swollen"]["segm_unseen"]["AP"] == pytest.approx((100 + kite) / 2)
    assert models["swollen"]["segm_unseen"]["AP50"] == pytest.approx(100)
    assert models["swollen"]["segm_seen"]["AP"] == pytest.approx(100)
    per_class = {x["name"]: x for x in models["swollen"]["per_class"]}
    assert per_class["kite"]["AP"] == pytest.approx(kite)
    assert [x["seen"] for x in models["swollen"]["per_class"]] == [True, False, False]


def test_overlap_bins_by_hand(files):
    bins = run(files).summary["models"]["swollen"]["overlap_bins"]
    assert len(bins) == 11
    assert [x["num_gt"] for x in bins] == [6, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0]
    assert (bins[0]["low"], bins[0]["high"]) == (0, 0)
    assert (bins[5]["low"], bins[5]["high"]) == (0.4, 0.5)
    assert bins[0]["AP"] == pytest.approx(100) and bins[1]["AP"] is None
    assert bins[5]["AP"] < 70 and bins[5]["AP50"] == pytest.approx(100)
    assert all(x["few"] for x in bins)
    few = Settings(min_objects_per_bin=6, bootstrap=Bootstrap(0), overlap_bins=(0, 0.5, 1))
    bins = run(files, few).summary["models"]["swollen"]["overlap_bins"]
    assert [x["few"] for x in bins] == [False, False, True]


def test_false_positives_by_hand(files):
    models = run(files).summary["models"]
    assert models["exact"]["false_positives"]["total"] == 0
    counts = models["swollen"]["false_positives"]
    # Three kites, each with the 10 x 20 pixels of the dog that it does not cover itself.
    expected = {"background": 0, "seen": 600, "unseen": 0, "total": 600, "crowd": 0}
    assert {kind: counts[kind] for kind in expected} == expected
    assert counts["num_objects"] == 12 and counts["num_unmatched_objects"] == 0
    assert counts["protocol"] == "detections" and counts["score_threshold"] == 0.5
    strict = run(files, Settings(score_threshold=0.95, bootstrap=Bootstrap(0)))
    assert strict.summary["models"]["swollen"]["false_positives"]["num_unmatched_objects"] == 12


def test_masks_on_ground_truth_boxes(files):
    analysis = analyze(
        files["truth"],
        gt_box_results={"swollen": files["swollen"]},
        seen_classes=["dog"],
        settings=FEW,
        show_progress=False,
    )
    model = analysis.summary["models"]["swollen"]
    assert "segm" not in model
    gt_boxes = model["gt_boxes"]
    assert gt_boxes["mask_iou"] == pytest.approx((9 + 3 * 2 / 3) / 12)
    assert 0 < gt_boxes["boundary_iou"] < 1
    assert gt_boxes["overlap_bins"][5]["mask_iou"] == pytest.approx((3 + 3 * 2 / 3) / 6)
    assert gt_boxes["overlap_bins"][1]["mask_iou"] is None
    assert gt_boxes["num_masks"] == 12
    assert gt_boxes["false_positives"]["seen"] == 600


def test_objects_are_those_on_the_boxes_that_all_models_share(files):
    both = {name: files[name] for name in ("exact", "swollen")}
    for gt_box_results, protocols in (
        (both, ["gt_boxes", "gt_boxes"]),
        ({"swollen": files["swollen"]}, ["detections", "detections"]),
        ({}, ["detections", "detections"]),
    ):
        analysis = run(files, gt_box_results=gt_box_results)
        assert [analysis.objects[name].protocol for name in both] == protocols


def test_an_object_left_out_of_ground_truth_box_results_counts_as_0(files, tmp_path):
    entries = json.loads(open(files["exact"]).read())
    path = tmp_path / "fewer.json"
    path.write_text(json.dumps([x for x in entries if x["category_id"] != 2]))
    analysis = analyze(
        files["truth"],
        gt_box_results={"fewer": str(path)},
        seen_classes="dog",
        settings=FEW,
        show_progress=False,
    )
    gt_boxes = analysis.summary["models"]["fewer"]["gt_boxes"]
    assert gt_boxes["mask_iou"] == 0.5 and gt_boxes["num_masks"] == 6


def test_differences_and_their_intervals(files):
    analysis = run(files)
    (difference,) = analysis.summary["differences"]
    assert (difference["baseline"], difference["model"]) == ("exact", "swollen")
    for task in TASKS:
        assert list(difference["tasks"][task]) == METRICS
    entry = difference["tasks"]["segm_unseen_overlap"]["AP"]
    models = analysis.summary["models"]
    value = models["swollen"]["segm_unseen_overlap"]["AP"] - 100
    assert entry["difference"] == pytest.approx(value)
    assert entry["interval"][0] < value < entry["interval"][1] < 0
    assert entry["includes_zero"] is False
    same = difference["tasks"]["segm_seen"]["AP"]
    assert same == {"difference": 0, "interval": [0, 0], "includes_zero": True}
    undefined = difference["tasks"]["segm_seen"]["APl"]
    assert undefined == {"difference": None, "interval": None, "includes_zero": True}
    classes = {x["name"]: x for x in difference["per_class"]}
    assert classes["kite"]["difference"] == pytest.approx(value)
    assert classes["pole"]["includes_zero"] is True


def test_with_a_baseline_only_it_is_compared(files):
    three = {name: files["exact"] for name in ("a", "b", "c")}
    settings = Settings(bootstrap=Bootstrap(num_resamples=0))

    def pairs(**kwargs):
        found = analyze(files["truth"], three, seen_classes="dog", settings=settings, **kwargs)
        return [(x["baseline"], x["model"]) for x in found.summary["differences"]]

    assert pairs() == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(baseline="b") == [("b", "a"), ("b", "c")]
    # No pair has masks of the baseline on ground-truth boxes.
    boxes = {"a": files["exact"], "c": files["exact"]}
    found = pairs(baseline="b", gt_box_results=boxes)
    assert found == [("b", "a"), ("b", "c")]
    with pytest.raises(ValueError, match="baseline is 'd'; it must be one of the models: a, b, c"):
        pairs(baseline="d")


def test_intervals_contain_the_value_and_are_seeded(files):
    first, again = run(files).summary, run(files).summary
    assert first["models"] == again["models"] and first["differences"] == again["differences"]
    other = Settings(bootstrap=Bootstrap(num_resamples=40, seed=1))
    assert run(files, other).summary["models"] != first["models"]
    intervals = first["models"]["swollen"]["intervals"]
    low, high = intervals["segm_unseen_overlap"]["AP"]
    assert low < first["models"]["swollen"]["segm_unseen_overlap"]["AP"] < high
    assert intervals["segm_unseen_overlap"]["APl"] is None


def test_without_resamples_nothing_is_established(files):
    summary = run(files, Settings(bootstrap=Bootstrap(num_resamples=0))).summary
    assert summary["models"]["swollen"]["intervals"]["segm"]["AP"] is None
    entry = summary["differences"][0]["tasks"]["segm_unseen"]["AP"]
    assert entry["interval"] is None and entry["includes_zero"] is True


def test_header_says_what_was_measured(files):
    summary = run(files, command="the command").summary
    assert summary["schema_version"] == 1 and summary["command"] == "the command"
    assert summary["dataset"] == {
        "annotations": files["truth"],
        "num_images": 6,
        "num_objects": 18,
        "num_crowd": 0,
        "num_seen": 6,
        "num_unseen": 12,
        "seen_classes": ["dog"],
        "unseen_classes": ["pole", "kite"],
    }
    assert summary["settings"]["num_resamples"] == 40 and summary["settings"]["seed"] == 0
    assert {"python", "numpy", "pycocotools"} <= set(summary["versions"])
    assert summary["warnings"] == []


@pytest.mark.parametrize("seen", ["all", "dog, pole, kite"])
def test_no_unseen_class(files, seen):
    analysis = analyze(
        files["truth"],
        {"exact": files["exact"]},
        seen_classes=seen,
        settings=FEW,
        show_progress=False,
    )
    model = analysis.summary["models"]["exact"]
    assert model["segm_unseen"]["AP"] is None and model["segm_unseen"]["num_gt"] == 0
    assert model["false_positives"]["total"] == model["false_positives"]["num_objects"] == 0
    json.dumps(analysis.summary, allow_nan=False)


def test_no_results_is_an_error(files):
    with pytest.raises(ValueError, match="nothing to analyse"):
        analyze(files["truth"], seen_classes="dog")


def test_unknown_seen_class_is_an_error(files):
    with pytest.raises(ValueError, match="cat"):
        analyze(files["truth"], {"a": files["exact"]}, seen_classes=["dog", "cat"])


def test_wrong_result_file_is_an_input_error(files):
    with pytest.raises(InputError, match="truth.json"):
        analyze(files["truth"], {"a": files["truth"]}, seen_classes="dog", show_progress=False)


@pytest.mark.parametrize(
    "setting", [{"overlap_threshold": 2}, {"score_threshold": -1}, {"overlap_bins": (0.1, 1)}]
)
def test_settings_out_of_range_fail(setting):
    with pytest.raises(ValueError, match=next(iter(setting)).split("_")[0]):
        Settings(**setting)


def test_nan_becomes_null():
    assert without_nan({"a": [float("nan"), (1.0, "x")], "b": {}}) == {
        "a": [None, [1.0, "x"]],
        "b": {},
    }
