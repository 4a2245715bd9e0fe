"""The files of a report: complete, self-contained, and safe whatever the names in the input are."""

import html.parser
import json
import re

import pytest
from report_example import HOSTILE, example_analysis, make_files, run

from teacher_student_mask.analysis import write_report
from teacher_student_mask.analysis.report import make_figures


class Page(html.parser.HTMLParser):
    """Tags with their attributes, ids, and text, without that of styles and scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.rows, self._skipped = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._skipped = tag in ("script", "style")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._skipped = False

    def handle_data(self, data):
        if not self._skipped:
            self.text.append(data)
        if self.lasttag in ("th", "td") and data.strip():
            self.rows[-1][-1] += data

    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def write(analysis, folder, **kwargs):
    path = write_report(analysis, folder / "out", **kwargs)
    return Page(path.read_text(encoding="utf-8"))


def test_all_files_are_written_and_json_is_the_summary(tmp_path):
    analysis = example_analysis(tmp_path)
    page = write(analysis, tmp_path, image_root=str(tmp_path))
    files = {x.name for x in (tmp_path / "out").iterdir()}
    assert files == {"report.html", "analysis.json"}
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == analysis.summary
    ids = [x["id"] for _, x in page.tags if "id" in x]
    assert len(ids) == len(set(ids))
    assert len(page.all("img")) == 18 + 4 + 4  # the worst and the best
    for name in ("detections", "AP", "mask_iou", "boundary_iou"):
        assert f"figure-overlap-{name}" in ids
    for name in ("pseudo-masks", "false-positives"):
        assert f"figure-{name}" in ids


def test_page_asks_nothing_of_a_network(tmp_path):
    page = write(example_analysis(tmp_path), tmp_path)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert not page.all("link")


def test_names_of_the_input_are_text_wherever_they_stand(tmp_path):
    analysis = example_analysis(tmp_path, names=("a", HOSTILE), classes=("dog", HOSTILE, "kite"))
    analysis.summary["command"] = HOSTILE
    analysis.summary["warnings"] = [{"file": HOSTILE, "message": HOSTILE, "count": 1}]
    path = write_report(analysis, tmp_path / "out", image_root=str(tmp_path))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert HOSTILE in page.words()
    assert {x["src"][:5] for x in page.all("img")} == {"data:"}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "<script>alert" not in text and "<img src=x" not in text
    # Plotly reads some HTML in its texts, so names are escaped there once more.
    assert "\\u003cscript\\u003ealert(1)" not in text


def test_tables_of_the_report(tmp_path):
    rows = write(example_analysis(tmp_path), tmp_path).rows

    def table(*header):
        """Its rows by their first cells; of equal ones, the last table's."""
        start, *_ = [i for i, x in enumerate(rows) if x[: len(header)] == list(header)]
        end = next((i for i in range(start + 1, len(rows)) if rows[i][0] == header[0]), None)
        return rows[start + 1 : end]

    results = table("objects", "model", "AP", "AP50")[:10]
    assert [x[1] for x in results] == ["exact", "swollen"] * 5
    assert results[0][:3] == ["boxes, all classes", "exact", "100.0"]
    assert results[2][2] == "100.0 [100.0, 100.0]" and results[2][7] == "-"
    assert [x[-1] for x in results] == ["18"] * 2 + ["12"] * 2 + ["6"] * 4 + ["18"] * 2
    assert table("objects", "AP")[2][:2] == ["seen classes", "+0.0 [0.0, 0.0] (contains 0)"]
    bins = [x for x in rows if x[0] == "0.4 < O ≤ 0.5"]
    assert ["0.4 < O ≤ 0.5", "6 (few)", "1.000", "0.833", "1.000"] in [x[:5] for x in bins]
    assert ["overlap", "objects", "swollen: threshold", "swollen: interact"] in rows
    pixels = table("model", "boxes")[:4]
    assert [x[3] for x in pixels] == ["-", "100.0 % (600 px)"] * 2
    assert ["unseen classes", "filled box", "100.0 [100.0, 100.0]"] in [x[:3] for x in rows]
    classes = table("class", "masks", "objects", "exact", "swollen", "swollen − exact")
    assert [x[0] for x in classes[:3]] == ["dog", "pole", "kite"]
    assert classes[0][-1] == "+0.0 [0.0, 0.0] (contains 0)"


def test_where_nothing_is_unseen_the_report_is_about_all_classes(tmp_path):
    files = make_files(tmp_path)
    elsewhere = [{**x, "bbox": [70, 50, 3, 3]} for x in json.loads(open(files["exact"]).read())]
    (tmp_path / "elsewhere.json").write_text(json.dumps(elsewhere))
    results = {"results": {"m": str(tmp_path / "elsewhere.json")}}
    analysis = run(files, seen_classes="all", gt_box_results={"m": files["swollen"]}, **results)
    page = write(analysis, tmp_path, image_root=str(tmp_path))
    ap = f"{analysis.summary['models']['m']['gt_boxes']['segm']['AP']:.1f}"
    boxes = "m: detection fails: box AP 0.0; mask AP of all classes 100.0; the masks on your boxes"
    masks = f"have {ap} (all classes). Mask AP no better than a yardstick: all classes ({ap}, "
    assert f"{boxes} {masks}filled box 100.0)." in page.words()
    sections = [x["id"] for x in page.all("section") if "id" in x]
    assert sections == ["extremes", "results", "classes", "pictures", "method", "files"]
    assert not {"seen classes", "unseen classes"} & {x[0] for x in page.rows}


def test_figures_have_the_numbers_and_intervals_as_distances(tmp_path):
    analysis = example_analysis(tmp_path)
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
    shares = {trace.name: list(trace.x) for trace in figures["false-positives"].data}
    assert shares["on seen objects"] == [100, 100]
