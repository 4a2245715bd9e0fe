"""Evaluation over several processes, by train_net.py's trainer, against one process."""

import math

import pytest
from distributed_evaluation import TEST_SETS, evaluate

pytestmark = pytest.mark.slow
TASKS = {"bbox", "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap"}


@pytest.fixture(scope="module")
def one_process(shapes_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    return {name: evaluate(str(shapes_root), name, folder / name)[0] for name in TEST_SETS}


@pytest.mark.parametrize("name, shards", [("eight", [4, 4]), ("one", [1, 0])])
def test_every_task_has_the_ap_of_one_process(results_of, one_process, name, shards):
    ranks = results_of(f"evaluation {name}")
    assert [x["num_images"] for x in ranks] == shards
    assert all(x["results"] == {} for x in ranks[1:])
    actual, expected = ranks[0]["results"], one_process[name]
    assert TASKS | {"segm_unseen_overlap_bins"} == actual.keys() == expected.keys()
    for task, metrics in expected.items():
        assert actual[task] == pytest.approx(metrics, abs=0, rel=0, nan_ok=True), task


def test_the_compared_ap_says_something(one_process):
    for task in TASKS:
        metrics = one_process["eight"][task]
        assert metrics["num_gt"] > 0 if "num_gt" in metrics else math.isfinite(metrics["AP"])
        assert 0 < metrics["AP"] < 100, task
