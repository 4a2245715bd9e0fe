"""The measurements of an analysis, on a few hand-made images."""

import json

import numpy as np
import pytest
from report_example import make_files, run

from teacher_student_mask.analysis import Settings
from teacher_student_mask.analysis.measure import percentile_interval, resample_images

TASKS = ["segm", "segm_seen", "segm_unseen", "segm_unseen_overlap"]
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]


@pytest.fixture
def files(tmp_path):
    return make_files(tmp_path)


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
    few = Settings(min_objects_per_bin=6, num_resamples=0, overlap_bins=(0, 0.5, 1))
    bins = run(files, settings=few).summary["models"]["swollen"]["overlap_bins"]
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
    strict = run(files, settings=Settings(score_threshold=0.95, num_resamples=0))
    assert strict.summary["models"]["swollen"]["false_positives"]["num_unmatched_objects"] == 12


def test_masks_on_ground_truth_boxes(files):
    boxes = {"swollen": files["swollen"]}
    analysis = run(files, results=None, gt_box_results=boxes, seen_classes=["dog"])
    model = analysis.summary["models"]["swollen"]
    assert "segm" not in model
    gt_boxes = model["gt_boxes"]
    assert gt_boxes["mask_iou"] == pytest.approx((9 + 3 * 2 / 3) / 12)
    assert 0 < gt_boxes["boundary_iou"] < 1
    assert gt_boxes["overlap_bins"][5]["mask_iou"] == pytest.approx((3 + 3 * 2 / 3) / 6)
    assert gt_boxes["overlap_bins"][1]["mask_iou"] is None
    assert gt_boxes["num_masks"] == 12
    assert gt_boxes["false_positives"]["seen"] == 600
    # Every object is a rectangle.
    box, ellipse = analysis.summary["yardsticks"].values()
    assert box["segm"]["AP"] == pytest.approx(100) and box["mask_iou"] == 1
    assert ellipse["mask_iou"] == pytest.approx(3.14 / 4, rel=0.05)
    assert list(analysis.objects) == ["swollen"] and not analysis.summary["differences"]


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


@pytest.mark.parametrize("seen", ["all", "dog, pole, kite"])
def test_no_unseen_class(files, seen):
    analysis = run(files, seen_classes=seen)
    model = analysis.summary["models"]["exact"]
    assert model["segm_unseen"]["AP"] is None and model["segm_unseen"]["num_gt"] == 0
    assert model["false_positives"]["total"] == model["false_positives"]["num_objects"] == 0
    json.dumps(analysis.summary, allow_nan=False)


def test_what_is_odd_in_the_input_is_in_the_summary(files, tmp_path):
    entries = json.loads(open(files["exact"]).read())
    (tmp_path / "odd.json").write_text(json.dumps(entries + entries[:2]))
    (warning,) = run(files, results={"odd": str(tmp_path / "odd.json")}).summary["warnings"]
    assert warning["file"].endswith("odd.json") and warning["count"] == 2
    assert "earlier entry" in warning["message"]


def test_interval_leaves_out_the_same_share_on_either_side_and_what_is_undefined():
    samples = np.random.default_rng(0).permutation(np.arange(101.0))
    assert percentile_interval(samples, 0.9) == pytest.approx([5, 95])
    assert percentile_interval(np.array([1.0, np.nan, 3.0]), 0.5) == pytest.approx([1.5, 2.5])
    assert percentile_interval(np.array([np.nan]), 0.5) is None
    assert percentile_interval(np.zeros(0), 0.95) is None


def test_interval_of_a_mean_is_the_one_of_statistics():
    """The bootstrap interval of a mean over many images is near mean +- 1.96 standard errors."""
    values = np.random.default_rng(1).normal(10, 3, size=900)
    weights = np.concatenate(list(resample_images(900, 2000, seed=2, batch_size=100)))
    low, high = percentile_interval((weights * values).sum(axis=1) / 900, 0.95)
    error = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)


def test_resamples_are_seeded_and_keep_the_number_of_images():
    first = np.concatenate(list(resample_images(50, 20, 4)))
    in_batches = list(resample_images(50, 20, 4, batch_size=7))
    assert [len(x) for x in in_batches] == [7, 7, 6]
    np.testing.assert_array_equal(first, np.concatenate(in_batches))
    assert first.shape == (20, 50) and (first.sum(axis=1) == 50).all()
    assert not np.array_equal(first, np.concatenate(list(resample_images(50, 20, 5))))
