import pytest

from teacher_student_mask.evaluation import comparison_table, results_table

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def make_results(ap, num_gt=7):
    tasks = ("segm_unseen_overlap", "segm_unseen", "segm_seen", "segm", "bbox")
    return {
        task: {**{m: ap + 10 * k for k, m in enumerate(METRICS)}, "AP-cat": 99.0, "num_gt": num_gt}
        for task in tasks
    }


def cells(table):
    """The rows of a Markdown table without the rule below the header."""
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_one_row_per_task_in_fixed_order_with_unseen_rows_bold():
    header, *rows = cells(results_table(make_results(1.234)))
    assert header == ["task", *METRICS, "num_gt"]
    assert [row[0] for row in rows] == [
        "bbox",
        "segm",
        "segm_seen",
        "**segm_unseen**",
        "**segm_unseen_overlap**",
    ]
    assert rows[1] == ["segm", "1.23", "11.23", "21.23", "31.23", "41.23", "51.23", "7"]
    assert rows[3][1:3] == ["**1.23**", "**11.23**"]


@pytest.mark.parametrize("results", [{}, {"sem_seg": {"mIoU": 3.0}}, {"coco_val": {}}])
def test_without_rows(results):
    assert results_table(results) == "no results"


def test_several_datasets_give_one_table_each():
    results = {"shapes_val": make_results(1.0), "other": {"bbox": {"AP": 5.0}}}
    first, second = results_table(results).split("\n\n")
    assert first == "shapes_val:\n" + results_table(results["shapes_val"])
    assert second == "other:\n" + results_table(results["other"])


def test_comparison_has_one_column_per_model():
    results = {"baseline": make_results(1.0), "teacher-student": make_results(2.0)}
    header, *rows = cells(comparison_table(results, rows=("segm_seen", "segm_unseen")))
    assert header == ["", "baseline", "teacher-student"]
    assert rows == [
        ["segm_seen AP", "1.00", "2.00"],
        ["segm_seen AP50", "11.00", "12.00"],
        ["**segm_unseen AP**", "**1.00**", "**2.00**"],
        ["**segm_unseen AP50**", "**11.00**", "**12.00**"],
    ]
