"""What the figures of the report show."""

import pytest
from report_example import HOSTILE, example_analysis, make_files, run

from teacher_student_mask.analysis.figures import make_figures


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    return example_analysis(tmp_path_factory.mktemp("files"))


def test_curves_have_the_numbers_of_the_bins_and_hollow_markers_for_few_objects(analysis):
    figures = make_figures(analysis.summary)
    for name, protocol, metric in (
        ("overlap-detections", None, "AP"),
        ("overlap-mask_iou", "gt_boxes", "mask_iou"),
    ):
        for trace, (model, x) in zip(figures[name].data, analysis.summary["models"].items()):
            bins = (x[protocol] if protocol else x)["overlap_bins"]
            assert trace.name == model
            assert list(trace.y) == [one[metric] for one in bins]
            assert all(x.endswith("-open") for x in trace.marker.symbol)
    colors = {trace.line.color for trace in figures["overlap-AP"].data}
    assert len(colors) == 2


def test_intervals_are_distances_from_the_values(analysis):
    traces = make_figures(analysis.summary)["results-detections"].data
    model = analysis.summary["models"]["swollen"]
    low, high = model["intervals"]["segm_unseen"]["AP"]
    value = model["segm_unseen"]["AP"]
    assert traces[1].x[0] == value
    assert traces[1].error_x.arrayminus[0] == pytest.approx(value - low)
    assert traces[1].error_x.array[0] == pytest.approx(high - value)


def test_figures_without_data_are_left_out(tmp_path):
    files = make_files(tmp_path)
    figures = make_figures(run(files, results={"a": files["exact"]}, seen_classes="all").summary)
    assert list(figures) == ["results-detections"]


def test_names_are_escaped_and_shortened(tmp_path):
    figures = make_figures(example_analysis(tmp_path, names=("a", HOSTILE)).summary)
    for figure in figures.values():
        for trace in figure.data:
            assert "<script>" not in (trace.name or "") and len(trace.name or "") < 60
