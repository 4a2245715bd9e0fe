"""The files of a report: what they hold, and that nothing from the input is code in the page."""

import base64
import copy
import csv
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_example import HOSTILE, METRICS, MODELS, SEEN, UNSEEN, example_analysis, write_photos

from teacher_student_mask.analysis import chart_style, charts, report_tables
from teacher_student_mask.analysis.object_scatter import scatter_of_objects
from teacher_student_mask.analysis.report import write_report
from teacher_student_mask.analysis.report_files import to_strict_json
from teacher_student_mask.analysis.report_text import glance_sentences

MAX_MEGABYTES = 15


@pytest.fixture(scope="module")
def analysis():
    return example_analysis()


@pytest.fixture(scope="module")
def folder(analysis, tmp_path_factory):
    path = write_report(analysis, tmp_path_factory.mktemp("report"))
    assert path.name == "report.html"
    return path.parent


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


class Page(HTMLParser):
    """Tags with attributes, text outside of scripts and styles, and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self._open = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))

    def handle_endtag(self, tag):
        if self._open and tag == self._open[0]:
            self._open = None

    def handle_data(self, data):
        if self._open is None:
            self.text.append(data)
        elif self._open[0] == "script":
            self.scripts.append((self._open[1], data))


# ---- files ----


def test_files_are_written_and_an_old_report_is_replaced(analysis, tmp_path):
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        write_report(analysis, folder, num_objects=1)
    assert sorted(x.name for x in folder.iterdir()) == [
        "analysis.json",
        "differences.csv",
        "false_positives.csv",
        "models.csv",
        "objects.csv",
        "overlap_bins.csv",
        "per_class.csv",
        "report.html",
    ]


def test_analysis_is_not_changed(analysis, tmp_path):
    before = copy.deepcopy((analysis.summary, analysis.coco.dataset, analysis.objects))
    write_report(analysis, tmp_path, num_objects=3)
    assert (analysis.summary, analysis.coco.dataset) == before[:2]
    for name, table in before[2].items():
        np.testing.assert_array_equal(analysis.objects[name].ious, table.ious)
        np.testing.assert_array_equal(analysis.objects[name].false_positives, table.false_positives)


def test_analysis_json_is_the_summary_as_strict_json(tmp_path):
    analysis = example_analysis(num_images=2)
    analysis.summary["models"][MODELS[0]]["segm"]["AP"] = math.nan
    analysis.summary["dataset"]["num_images"] = np.int64(2)
    write_report(analysis, tmp_path, num_objects=0)
    text = (tmp_path / "analysis.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=refuse_constant)
    expected = copy.deepcopy(analysis.summary)
    expected["models"][MODELS[0]]["segm"]["AP"] = None
    expected["dataset"]["num_images"] = 2
    assert read == expected
    assert text.startswith('{\n  "schema_version": 1,\n')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50)
@given(json_values)
def test_strict_json_keeps_all_but_nan_and_infinity(value):
    def expected(x):
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, list):
            return [expected(y) for y in x]
        return {k: expected(y) for k, y in x.items()} if isinstance(x, dict) else x

    assert json.loads(to_strict_json(value), parse_constant=refuse_constant) == expected(value)


def test_models_csv(folder, analysis):
    rows = read_csv(folder / "models.csv")
    # Models, protocols, tasks, metrics and num_gt.
    assert len(rows) == 2 * 2 * 4 * 7
    by_key = {(x["model"], x["protocol"], x["task"], x["metric"]): x for x in rows}
    assert len(by_key) == len(rows)
    row = by_key[MODELS[1], "gt_boxes", "segm_unseen", "AP"]
    assert [float(row[x]) for x in ("value", "low", "high")] == pytest.approx([29.5, 27.9, 31.2])
    row = by_key[MODELS[0], "detections", "segm_unseen_overlap", "APl"]
    assert (row["value"], row["low"], row["high"]) == ("", "", "")
    assert by_key[MODELS[0], "detections", "segm", "num_gt"]["value"] == "321"


def test_differences_csv(folder):
    rows = read_csv(folder / "differences.csv")
    assert len(rows) == 2 * (4 * 6 + len(SEEN + UNSEEN))
    unseen, overlap = (
        next(x for x in rows if x["task"] == task and x["metric"] == "AP")
        for task in ("segm_unseen", "segm_unseen_overlap")
    )
    assert (unseen["baseline"], unseen["model"]) == MODELS
    assert float(unseen["difference"]) == pytest.approx(1.5)
    assert (unseen["includes_zero"], overlap["includes_zero"]) == ("false", "true")
    assert sum(x["class"] == "kite" and x["task"] == "" for x in rows) == 2


def test_overlap_bins_csv(folder):
    rows = read_csv(folder / "overlap_bins.csv")
    # Two models with two protocols, and three methods of pseudo masks.
    assert len(rows) == (2 * 2 + 3) * 11
    first = rows[0]
    assert (first["low"], first["high"], first["few"]) == ("0.0", "0.0", "false")
    assert float(first["AP_low"]) == pytest.approx(28.0)
    assert first["mask_iou"] == ""
    methods = {x["method"] for x in rows if x["protocol"] == "pseudo_masks"}
    assert methods == {"threshold", "interact", "box_fit"}


def test_per_class_and_false_positives_csv(folder, analysis):
    rows = read_csv(folder / "per_class.csv")
    assert len(rows) == 2 * 2 * len(SEEN + UNSEEN)
    assert {x["class"] for x in rows if x["seen"] == "true"} == set(SEEN)
    rows = read_csv(folder / "false_positives.csv")
    assert [(x["model"], x["protocol"]) for x in rows] == [
        (name, protocol) for protocol in ("detections", "gt_boxes") for name in MODELS
    ]
    counts = analysis.summary["models"][MODELS[0]]["false_positives"]
    assert rows[0]["seen"] == str(counts["seen"]) and rows[0]["total"] == str(counts["total"])


def test_objects_csv_has_every_object_of_every_model(folder, analysis):
    rows = read_csv(folder / "objects.csv")
    table = analysis.objects[MODELS[0]]
    assert len(rows) == 2 * len(table.annotation_ids)
    unmatched = [x for x in rows if x["iou"] == ""]
    assert len(unmatched) == sum(int(np.isnan(x.ious).sum()) for x in analysis.objects.values())
    k = int(np.flatnonzero(table.false_positives.sum(axis=1))[0])
    annotation = analysis.coco.anns[int(table.annotation_ids[k])]
    assert rows[k] == {
        "model": MODELS[0],
        "protocol": "detections",
        "annotation_id": str(annotation["id"]),
        "image_id": str(annotation["image_id"]),
        "class": (SEEN + UNSEEN)[annotation["category_id"] - 1],
        "seen": "true" if annotation["category_id"] <= len(SEEN) else "false",
        "overlap": str(round(table.overlaps[k], 6)),
        "score": str(table.scores[k]),
        "iou": str(round(table.ious[k], 6)),
        "boundary_iou": str(round(table.boundary_ious[k], 6)),
        "false_positives_background": str(table.false_positives[k, 0]),
        "false_positives_seen": str(table.false_positives[k, 1]),
        "false_positives_unseen": str(table.false_positives[k, 2]),
    }


# ---- bad input ----


def test_missing_package_is_named_before_anything_is_written(analysis, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"needs jinja2 and plotly: pip install .*\[report\]"):
        write_report(analysis, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"image_root": "no/such"},
            r"image_root is 'no/such'; it must be the folder of the images",
        ),
        ({"num_objects": -1}, r"num_objects is -1; it must be 0 or more"),
    ],
)
def test_wrong_option_is_named_before_anything_is_written(analysis, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_report(analysis, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_in_a_name_is_written(tmp_path):
    # A json may have it; UTF-8 cannot.
    analysis = example_analysis(num_images=1, unseen=("kite\ud83e",))
    write_report(analysis, tmp_path, num_objects=1)
    read = json.loads((tmp_path / "analysis.json").read_text(encoding="utf-8"))
    assert read["dataset"]["unseen_classes"] == ["kite\ud83e"]
    assert "kite\\ud83e" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- the page ----


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    analysis = example_analysis(models=(f"m {HOSTILE}", "b"), unseen=(HOSTILE, "kite"))
    analysis.summary["command"] = f"python tools/analyze.py {HOSTILE}"
    analysis.summary["dataset"]["annotations"] = f"{HOSTILE}.json"
    analysis.summary["warnings"][0].update(file=HOSTILE, message=HOSTILE)
    for info in analysis.coco.imgs.values():
        info["file_name"] = HOSTILE
    path = write_report(analysis, tmp_path_factory.mktemp("hostile"))
    return path.read_text(encoding="utf-8")


def test_names_from_the_input_are_text_in_the_page(hostile_page):
    page = Page(hostile_page)
    # Class, model, command, annotations, warning, image: as they are.
    assert "".join(page.text).count(HOSTILE) > 20
    assert not [attrs for tag, attrs in page.tags if "onerror" in attrs]
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert "<script>alert" not in hostile_page and "</script>%" not in hostile_page


def test_names_from_the_input_are_text_in_the_figures(hostile_page):
    data = next(json.loads(x) for attrs, x in Page(hostile_page).scripts if "id" in attrs)
    texts = []

    def collect(value):
        if isinstance(value, str):
            texts.append(value)
        for x in value.values() if isinstance(value, dict) else []:
            collect(x)
        for x in value if isinstance(value, list) else []:
            collect(x)

    collect(data["figures"])
    hostile = [x for x in texts if "script" in x]
    assert len(hostile) > 20
    # plotly reads tags; ours are <b> and <br>.
    assert not [x for x in hostile if re.search(r"<(?!/?b>|br>)", x)]
    # And it would fill in %{x} in a template.
    assert '"hovertemplate"' not in hostile_page.split("plotly.js v")[0]


def test_page_needs_nothing_from_outside(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    targets = [attrs.get(x) for _, attrs in page.tags for x in ("src", "href") if attrs.get(x)]
    assert targets and all(x.startswith("#") for x in targets)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "base")]
    assert text.count("* plotly.js v") == 1


def test_only_the_scripts_of_the_report_may_run(folder):
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    policy = next(
        attrs["content"]
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(x.strip().split(" ", 1) for x in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    scripts = [x for attrs, x in page.scripts if attrs.get("type") != "application/json"]
    digests = [hashlib.sha256(x.encode()).digest() for x in scripts]
    hashes = [f"'sha256-{base64.b64encode(x).decode()}'" for x in digests]
    assert rules["script-src"].split() == hashes


def test_page_names_the_settings_that_were_used(tmp_path):
    analysis = example_analysis(num_images=2)
    analysis.summary["settings"] |= {
        "confidence": 0.9,
        "overlap_threshold": 0.25,
        "score_threshold": 0.7,
        "min_objects_per_bin": 55,
        "num_resamples": 123,
        "ties": "smaller",
    }
    path = write_report(analysis, tmp_path, num_objects=0)
    text = " ".join("".join(Page(path.read_text(encoding="utf-8")).text).split())
    for part in (
        "its 90 % bootstrap interval",
        "unseen, overlap ≥ 0.25",
        "a score of at least 0.7",
        "fewer than 55 objects",
        "Percentiles of 123 bootstrap resamples",
        "by the smallest other object",
        "about 10 in 100",
    ):
        assert part in text


def test_sections_without_data_are_left_out(tmp_path):
    analysis = example_analysis(num_images=2, models=("only",), gt_boxes=False, pseudo_masks=False)
    analysis.summary["warnings"] = []
    path = write_report(analysis, tmp_path, num_objects=0)
    page = Page(path.read_text(encoding="utf-8"))
    sections = [attrs.get("id") for tag, attrs in page.tags if tag == "section"]
    assert sections == [
        None,
        "results",
        "overlap",
        "false-positives",
        "classes",
        "objects",
        "method",
    ]
    linked = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "class" not in attrs]
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {x[1:] for x in linked if x != "#differences"} <= ids


def test_model_with_ground_truth_boxes_alone(tmp_path):
    analysis = example_analysis(num_images=2, pseudo_masks=False)
    for name, model in analysis.summary["models"].items():
        analysis.summary["models"][name] = {
            key: model[key] for key in ("results", "gt_box_results", "gt_boxes")
        }
    analysis.summary["differences"] = analysis.summary["differences"][1:]
    path = write_report(analysis, tmp_path, num_objects=2)
    text = path.read_text(encoding="utf-8")
    assert 'data-figure="results-gt_boxes"' in text
    assert 'data-figure="results-detections"' not in text
    assert 'data-figure="overlap-gt_boxes-boundary_iou"' in text
    assert "On unseen classes (ground-truth boxes)" in text


def test_200_objects_stay_small(tmp_path):
    analysis = example_analysis(num_images=4, image_size=(427, 640))
    write_photos(analysis, tmp_path)
    num_objects = 16
    sizes = [
        write_report(analysis, tmp_path / "out", image_root=str(tmp_path), num_objects=n).stat()
        for n in (0, num_objects)
    ]
    per_object = (sizes[1].st_size - sizes[0].st_size) / num_objects
    # Less would mean that nothing was drawn.
    assert per_object > 5_000
    assert sizes[0].st_size + 200 * per_object < MAX_MEGABYTES * 1e6


# ---- sentences ----


def test_sentences_name_values_intervals_and_differences(analysis):
    sentences = glance_sentences(analysis.summary)
    assert sentences[:3] == [
        "On unseen classes, class-agnostic has 22.0 AP [20.4, 23.7] and teacher-student has "
        "23.5 AP [21.9, 25.2]; teacher-student minus class-agnostic is +1.5 [0.6, 2.4].",
        "On unseen objects with overlap of 0.3 or more, class-agnostic has 15.0 AP [13.4, 16.7] "
        "and teacher-student has 16.5 AP [14.9, 18.2]; teacher-student minus class-agnostic is "
        "+1.5 [-0.5, 3.5], not distinguishable from 0.",
        "From objects with O = 0 to those with 0.2 < O ≤ 0.3, AP goes from 30.0 to 22.8 for "
        "class-agnostic and from 31.5 to 24.3 for teacher-student.",
    ]
    assert len(sentences) == 4


def test_share_of_false_positives_on_objects_in_words():
    summary = example_analysis(num_images=1).summary
    counts = {"background": 500, "seen": 300, "unseen": 200, "total": 1000}
    summary["models"][MODELS[0]]["false_positives"] = counts
    summary["models"][MODELS[1]]["false_positives"] = dict.fromkeys(counts, 0)
    sentence = glance_sentences(summary)[-1]
    assert "lie on other objects: 50 % for class-agnostic; the rest" in sentence


@pytest.mark.parametrize(
    "interval, includes_zero, end",
    [
        (None, True, "is -0.4, no interval."),
        ([-0.9, -0.1], False, "is -0.4 [-0.9, -0.1]."),
        ([-0.4, -0.4], False, "is -0.4 [-0.4, -0.4], too few images."),
        ([-0.9, 0.0], True, "is -0.4 [-0.9, 0.0], not distinguishable from 0."),
    ],
)
def test_doubt_about_a_difference_is_said_in_words(interval, includes_zero, end):
    summary = example_analysis(num_images=1).summary
    entry = {"difference": -0.4, "interval": interval, "includes_zero": includes_zero}
    summary["differences"][0]["tasks"]["segm_unseen"]["AP"] = entry
    assert glance_sentences(summary)[0].endswith(end)
    tasks = report_tables.task_labels(summary)
    cell = report_tables.differences_table(summary["differences"][0], tasks, "x").rows[0][1]
    assert cell.text == "-0.4" and bool(cell.note) == (cell.style != "strong")
    assert bool(cell.note) == (end != "is -0.4 [-0.9, -0.1].")


def test_nothing_is_said_of_undefined_numbers():
    summary = example_analysis(num_images=1, models=("only",), gt_boxes=False).summary
    model = summary["models"]["only"]
    for task in ("segm_unseen", "segm_unseen_overlap"):
        model[task]["AP"] = None
    for one in model["overlap_bins"]:
        one["AP"] = None
    model["false_positives"]["total"] = 0
    assert glance_sentences(summary) == []


@pytest.mark.parametrize(
    "value, digits, sign, text",
    [
        (None, 1, False, "-"),
        (math.nan, 1, True, "-"),
        (2.25, 1, True, "+2.2"),
        (-0.04, 1, True, "0.0"),
        (-0.06, 1, True, "-0.1"),
        (0.5, 3, False, "0.500"),
        (100.0, 1, False, "100.0"),
    ],
)
def test_numbers(value, digits, sign, text):
    assert report_tables.format_number(value, digits, sign) == text


# ---- tables ----


def cells_of(row):
    return [(x.text, x.detail, x.note) for x in row]


def test_headline_table(analysis):
    sets = [x for x in report_tables.result_sets(analysis.summary) if x.protocol == "detections"]
    tasks = report_tables.task_labels(analysis.summary)
    table = report_tables.headline_table(sets, tasks, "x")
    assert [x.label for x in table.columns] == ["objects", "model", *METRICS, "num_gt"]
    assert [x[0].text for x in table.rows[::2]] == [
        "unseen classes",
        "unseen, overlap ≥ 0.3",
        "seen classes",
        "all classes",
    ]
    assert cells_of(table.rows[1])[1:3] == [(MODELS[1], "", ""), ("23.5", "[21.9, 25.2]", "")]
    # Undefined: no number to sort by.
    assert (table.rows[2][7].text, table.rows[2][7].value) == ("-", None)


def test_bins_with_few_objects_are_said_in_words(analysis):
    sets = [x for x in report_tables.result_sets(analysis.summary) if x.protocol == "detections"]
    rows = report_tables.bins_table(sets, "AP", "", "x").rows
    assert [x[0].text for x in rows[:2] + rows[-1:]] == ["O = 0", "0 < O ≤ 0.1", "0.9 < O ≤ 1"]
    # 480 // (k + 1) objects: fewer than 100 from the fifth bin on.
    assert [bool(x[1].note) for x in rows] == [False] * 4 + [True] * 7
    assert cells_of(rows[0])[2:] == [("30.0", "[28.0, 32.0]", ""), ("31.5", "[29.5, 33.5]", "")]


def test_false_positive_shares_sum_to_100(analysis):
    sets = report_tables.result_sets(analysis.summary)
    for row in report_tables.false_positives_table(sets, "x").rows:
        assert sum(x.value for x in row[2:5]) == pytest.approx(100)


def test_class_differences_are_sorted_and_undefined_ones_last(analysis):
    difference = copy.deepcopy(analysis.summary["differences"][0])
    difference["per_class"][0].update(difference=None, interval=None)
    rows = report_tables.class_differences_table(difference, "x").rows
    values = [x[3].value for x in rows]
    assert values[-1] is None
    assert values[:-1] == sorted(values[:-1], reverse=True)


# ---- figures ----


def test_overlap_curve_marks_bins_with_few_objects(analysis):
    sets = [x for x in report_tables.result_sets(analysis.summary) if x.protocol == "detections"]
    figure = charts.overlap_curve(sets)
    assert len(figure.data) == len(MODELS)
    for trace, x in zip(figure.data, sets):
        bins = x.data["overlap_bins"]
        assert [s.endswith("-open") for s in trace.marker.symbol] == [b["few"] for b in bins]
        assert list(trace.y) == [b["AP"] for b in bins]
        assert list(trace.error_y.array) == pytest.approx([2.0] * 11)
    assert list(figure.layout.xaxis.ticktext) == "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1".split()
    assert "AP50 54.0 [51.0, 57.0]" in figure.data[0].hovertext[0]
    assert "480 objects" in figure.data[0].hovertext[0]


def test_models_differ_in_more_than_colour():
    styles = [chart_style.trace_style(k, "x") for k in range(5)]
    for read in (lambda x: x["marker"]["symbol"], lambda x: x["line"]["dash"]):
        assert len({read(x) for x in styles}) == 5


def test_interval_beside_its_value_has_no_negative_bar():
    intervals = [[1.5, 2.0], None, [0.0, 1.0], [1.0, 2.0]]
    bars = chart_style.error_bars([1.0, 2.0, None, 3.0], intervals)
    assert bars["array"] == [1.0, 0.0, 0.0, 0.0]
    assert bars["arrayminus"] == [0.0, 0.0, 0.0, 2.0]


def test_attribution_bars_have_three_kinds(analysis):
    sets = report_tables.result_sets(analysis.summary)
    figure = charts.attribution_bars(sets)
    assert [x.name for x in figure.data] == [
        "on the background",
        "on seen objects",
        "on unseen objects",
    ]
    for k, x in enumerate(sets):
        assert sum(trace.x[k] for trace in figure.data) == pytest.approx(100)
        counts = x.data["false_positives"]
        assert f"{counts['seen']:,} of {counts['total']:,} pixels" in figure.data[1].hovertext[k]


def test_no_false_positives_at_all_is_no_division_by_zero(analysis):
    sets = copy.deepcopy(report_tables.result_sets(analysis.summary)[:1])
    sets[0].data["false_positives"].update(background=0, seen=0, unseen=0, total=0)
    assert [x.x for x in charts.attribution_bars(sets).data] == [(0.0,)] * 3
    assert report_tables.false_positives_table(sets, "x").rows[0][2].text == "-"


def test_class_bars_are_sorted_and_split_by_what_is_established(analysis):
    difference = copy.deepcopy(analysis.summary["differences"][0])
    difference["per_class"][2].update(difference=None, interval=None)
    figure = charts.per_class_differences(difference)
    rows = [x for x in difference["per_class"] if x["difference"] is not None]
    by_position = {y: x for trace in figure.data for x, y in zip(trace.x, trace.y)}
    assert [by_position[k] for k in range(len(rows))] == sorted(x["difference"] for x in rows)
    assert len(figure.data[1].x) == sum(x["includes_zero"] for x in rows) > 0


def test_scatter_draws_the_same_sample_every_time(analysis):
    figures = [scatter_of_objects(analysis, max_objects=7) for _ in range(2)]
    assert figures[0].to_dict() == figures[1].to_dict()
    assert figures[0].layout.meta["num_shown"] == 7
    tables = analysis.objects.values()
    matched = np.any([x.is_unseen & ~np.isnan(x.ious) for x in tables], axis=0)
    assert figures[0].layout.meta["num_objects"] == matched.sum() > 7
    assert len(figures[0].data) == 2 * len(MODELS)


def test_means_of_the_scatter_are_over_all_objects_of_a_bin(analysis):
    figure = scatter_of_objects(analysis, max_objects=1)
    table = analysis.objects[MODELS[0]]
    used = table.is_unseen & ~np.isnan(table.ious)
    # Overlaps of exactly 0 are the first bin, (0, 0.1] the second.
    expected = [
        table.ious[used & (table.overlaps == 0)].mean(),
        table.ious[used & (table.overlaps > 0) & (table.overlaps <= 0.1)].mean(),
    ]
    assert list(figure.data[2].x[:2]) == [0.0, 0.05]
    assert list(figure.data[2].y[:2]) == pytest.approx(expected)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("is_dark", [False, True])
def test_colours_stand_out_from_the_page(is_dark):
    def themed(colour):
        return chart_style.DARK_COLOURS.get(colour, colour) if is_dark else colour

    surface = themed(chart_style.SURFACE)
    models = [themed(chart_style.model_colour(k)) for k in range(6)]
    assert len(set(models)) == 6
    # WCAG: 3:1 for graphics, 4.5:1 for text.
    assert min(contrast(x, surface) for x in models) >= 3
    assert min(contrast(themed(x), surface) for x in (chart_style.TEXT, chart_style.MUTED)) >= 4.5
    # The bars have an outline in the colour of the text.
    fills = list(chart_style.FALSE_POSITIVE_COLOURS.values())
    assert len(set(fills)) == 3
