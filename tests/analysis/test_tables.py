"""The texts of the report's tables."""

from report_example import example_analysis

from teacher_student_mask.analysis import tables


def test_tables_of_the_report(tmp_path):
    summary = example_analysis(tmp_path).summary
    results = tables.results_table(summary, "detections")
    assert results.columns.tolist()[:4] == ["objects", "model", "AP", "AP50"]
    assert results["model"].tolist() == ["exact", "swollen"] * 4
    assert results["AP"][0] == "100.0 [100.0, 100.0]" and results["APl"][0] == "-"
    assert results["num_gt"].tolist() == ["12"] * 2 + ["6"] * 4 + ["18"] * 2
    differences = tables.differences_table(summary, summary["differences"][0])
    assert differences["AP"][2] == "+0.0 [0.0, 0.0] (contains 0)"
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
    assert classes["swollen − exact"][0] == "+0.0 [0.0, 0.0] (contains 0)"
