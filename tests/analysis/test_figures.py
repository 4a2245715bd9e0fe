"""What the figures of the report show."""

import pytest
from report_example import example_analysis

from teacher_student_mask.analysis.report import make_figures


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    return example_analysis(tmp_path_factory.mktemp("files"))


def test_curves_have_the_numbers_of_the_bins_and_intervals_as_distances(analysis):
    figures = make_figures(analysis.summary)
    for name, protocol, metric in (
        ("overlap-detections", None, "AP"),
        ("overlap-mask_iou", "gt_boxes", "mask_iou"),
    ):
        for trace, (model, x) in zip(figures[name].data, analysis.summary["models"].items()):
            bins = (x[protocol] if protocol else x)["overlap_bins"]
            bins = [one for one in bins if one[metric] is not None]
            assert trace.name == model
            assert list(trace.y) == [one[metric] for one in bins]
            if metric == "AP":
                below = [one["AP"] - one["AP_interval"][0] for one in bins]
                assert list(trace.error_y.arrayminus) == pytest.approx(below)
    colors = {trace.name: trace.line.color for trace in figures["overlap-AP"].data}
    assert list(colors) == ["exact", "swollen", "filled box", "inscribed ellipse"]
    assert len(set(colors.values())) == 4


def test_shares_of_false_positives(analysis):
    figures = make_figures(analysis.summary)
    shares = {trace.name: list(trace.x) for trace in figures["false-positives"].data}
    assert shares["on seen objects"] == [100, 100]
