"""Texts of numbers, and the numbers of the tables and CSV files."""

import io

import pandas as pd
import pytest
from report_example import example_analysis

from teacher_student_mask.analysis import tables


@pytest.mark.parametrize(
    "value, kwargs, text",
    [
        (1.25, {}, "1.2"),
        (None, {}, "-"),
        (float("nan"), {"sign": True}, "-"),
        (0.5, {"sign": True}, "+0.5"),
        (-0.04, {"sign": True}, "0.0"),
        (0.12345, {"digits": 3}, "0.123"),
    ],
)
def test_numbers_as_text(value, kwargs, text):
    assert tables.format_number(value, **kwargs) == text


@pytest.mark.parametrize(
    "interval, text",
    [
        (None, "+1.0 (no interval)"),
        ([-1, 3], "+1.0 [-1.0, 3.0] (contains 0)"),
        ([1, 1], "+1.0 [1.0, 1.0] (too few images)"),
        ([0.5, 2], "+1.0 [0.5, 2.0]"),
    ],
)
def test_a_difference_says_why_it_is_not_established(interval, text):
    includes_zero = interval is None or interval[0] <= 0 <= interval[1]
    entry = {"difference": 1.0, "interval": interval, "includes_zero": includes_zero}
    assert tables.format_difference(entry) == text
    assert tables.format_difference({**entry, "difference": None}) == "-"


def test_overlap_bins_in_words():
    assert tables.bin_label({"low": 0, "high": 0}) == "O = 0"
    assert tables.bin_label({"low": 0.1, "high": 0.2}) == "0.1 < O ≤ 0.2"


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    return example_analysis(tmp_path_factory.mktemp("files"))


def test_tables_of_the_report(analysis):
    summary = analysis.summary
    results = tables.results_table(summary, "detections")
    assert results.columns.tolist()[:4] == ["objects", "model", "AP", "AP50"]
    assert results["model"].tolist() == ["exact", "swollen"] * 4
    assert results["AP"][0] == "100.0 [100.0, 100.0]" and results["APl"][0] == "-"
    assert results["num_gt"].tolist() == ["12"] * 2 + ["6"] * 4 + ["18"] * 2
    differences = tables.differences_table(summary, summary["differences"][0])
    assert differences["AP"][2] == "0.0 [0.0, 0.0] (contains 0)"
    bins = tables.bins_table(tables.results_by_protocol(summary)["gt_boxes"], "mask_iou", 3)
    assert bins["objects"][0] == "6 (few)" and bins["swollen"][5] == "0.833"
    quality = tables.pseudo_mask_results(summary)
    assert list(tables.bins_table(quality, "mask_iou")) == [
        "overlap",
        "objects",
        "swollen: threshold",
        "swollen: interact",
    ]
    pixels = tables.false_positives_table(summary)
    assert pixels["on seen objects"].tolist() == ["-", "100.0 % (600 px)"] * 2
    classes = tables.class_table(summary, "gt_boxes")
    assert classes["class"].tolist() == ["dog", "pole", "kite"]
    assert classes["swollen − exact"][0] == "0.0 [0.0, 0.0] (contains 0)"


def test_csv_files_hold_the_numbers_of_the_summary(analysis):
    summary = analysis.summary
    read = {
        name: pd.read_csv(io.StringIO(frame.to_csv(index=False)))
        for name, frame in tables.csv_tables(analysis).items()
    }
    models = read["models.csv"].set_index(["model", "protocol", "task", "metric"])
    expected = summary["models"]["swollen"]["gt_boxes"]
    row = models.loc["swollen", "gt_boxes", "segm_unseen", "AP"]
    assert row["value"] == expected["segm_unseen"]["AP"]
    assert [row["low"], row["high"]] == expected["intervals"]["segm_unseen"]["AP"]
    assert len(models) == 2 * 2 * 4 * 7
    classes = read["per_class.csv"]
    assert len(classes) == 4 * 3 and classes["class"].tolist()[:3] == ["dog", "pole", "kite"]
    objects = read["objects.csv"]
    assert len(objects) == 2 * 18
    kite = objects[(objects["model"] == "swollen") & (objects["annotation_id"] == 3)].iloc[0]
    assert (kite["class"], kite["overlap"], kite["false_positives_seen"]) == ("kite", 0.5, 200)
    assert kite["iou"] == pytest.approx(2 / 3, abs=1e-6)
