"""Texts of numbers, and the numbers of the tables and CSV files."""

import io

import pandas as pd
import pytest
from report_example import example_analysis

from teacher_student_mask.analysis import tables


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
