"""The pages that show a partly annotated dataset, read as text and in a browser."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from headless_browser import open_page, wait_until
from PIL import Image

import view_dataset
from inference.annotated_images import AnnotatedImages
from pages.dataset_page import choose

HOSTILE = "<img src=x onerror=alert(1)>"


class Shapes(HTMLParser):
    """The objects and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.objects, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "data-tip" in attributes:
            kind = attributes["class"].removeprefix("object-shape ")
            self.objects.append((kind, attributes["data-tip"].split("\n"), []))
        elif tag in ("path", "rect") and self.objects:
            self.objects[-1][2].append((tag, attributes["class"]))
        elif tag == "img":
            self.sources.append(attributes["src"])


@pytest.fixture
def view(tmp_path, capsys):
    def _view(dataset, *options):
        arguments = [dataset.json_file, "--image-root", dataset.image_root]
        arguments += ["--output-dir", str(tmp_path / "out"), *map(str, options)]
        code = view_dataset.main(arguments)
        page = (tmp_path / "out/index.html").read_text()
        _view.text = capsys.readouterr()
        return code, Shapes(page), page

    return _view


def make_model_mask(data):
    data["annotations"][1]["mask_source"] = "model"


def test_objects_are_drawn_by_what_is_known_of_them(view, make_tiny_coco, tmp_path):
    code, page, text = view(
        make_tiny_coco(make_model_mask), "--seen-classes", "ant, ship", "--crops-per-class", 0
    )
    assert code == 0
    of_id = {int(tip[0].rsplit(" ", 1)[1]): (kind, tip) for kind, tip, _ in page.objects}
    kinds = {i: kind for i, (kind, _) in of_id.items()}
    assert kinds == {
        **{101: "human", 102: "model", 103: "human", 104: "box", 105: "box", 106: "box"},
        **{107: "crowd", 108: "unused", 109: "unused", 110: "unused", 111: "human", 112: "human"},
    }
    drawn = {kind: shapes for kind, _, shapes in page.objects}
    mask = [("path", "casing"), ("path", "fill stroke")]
    box = [("rect", "casing"), ("rect", "fill stroke")]
    assert drawn["human"] == drawn["model"] == mask
    assert drawn["box"] == drawn["crowd"] == box
    assert drawn["unused"] == [("rect", "casing"), ("rect", "stroke"), ("path", "fill faint")]
    assert of_id[101][1][1] == "mask" and of_id[102][1][1] == "mask made by a model"
    assert not any(x.startswith("overlap") for x in of_id[107][1])
    assert all((tmp_path / "out" / x).is_file() for x in page.sources)
    assert len(page.sources) == 4
    table = view.text.out.splitlines()
    assert ["ant", "4", "3", "0", "1", "1"] in [x.split() for x in table]
    assert ["all", "11", "8", "1", "3", "1"] in [x.split() for x in table]


def test_overlap_by_hand(make_tiny_coco, view):
    # Triangle (20, 74) (33 1/3, 34) (60, 74) in the box x 4..40, y 10..50 of the other: counted
    # below on a fine grid.
    x, y = np.meshgrid(np.arange(4, 40, 0.05) + 0.025, np.arange(10, 50, 0.05) + 0.025)
    height = 74 - y
    inside = (x >= 20 + height / 3) & (x <= 60 - height * 2 / 3) & (height >= 0)
    expected = inside.mean()
    _, page, _ = view(make_tiny_coco(), "--crops-per-class", 0)
    (tip,) = [tip for _, tip, _ in page.objects if tip[0].endswith(" 111")]
    assert float(re.fullmatch("overlap O = (.*)", tip[2])[1]) == pytest.approx(expected, abs=0.02)


def test_lower_bounds_are_said(view, make_tiny_coco):
    _, page, _ = view(make_tiny_coco(), "--crops-per-class", 0)
    tips = {tip[0].rsplit(" ", 1)[1]: tip for _, tip, _ in page.objects}
    # The box of 105, without a mask, reaches into that of 108, not into that of 101.
    assert tips["108"][2].startswith("overlap O ≥ ")
    assert tips["108"][3] == "an object without a mask reaches into this box"
    assert tips["101"][2].startswith("overlap O = ")


def test_crops_of_every_class(tiny_coco, view, tmp_path):
    code, page, text = view(tiny_coco, "--max-images", 0, "--crops-per-class", 4)
    assert code == 0 and not (tmp_path / "out/pictures").exists()
    sections = text.split("<h3")[1:]
    names = [re.search(r">(.*?)</h3>", x)[1] for x in sections]
    assert names == ["ant", "cat", "ship"]
    kinds = [[x[0] for x in Shapes(section).objects] for section in sections]
    # Of the four ants, a crowd aside, three have a mask.
    assert kinds[0] == ["human"] * 3 + ["box"]
    assert kinds[1] == ["human"] * 3
    assert kinds[2] == ["human"] * 2 + ["box"] * 2
    assert "4 objects: 3 with a mask, 1 with a box only; crowd annotations: 1" in text
    assert len(list((tmp_path / "out/crops").iterdir())) == 11


def test_choice_is_that_of_the_seed(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(40)]
    rows = [
        {"id": i, "image_id": i % 40, "category_id": 1 + i % 2, "bbox": [0, 0, 5, 5], "iscrowd": 0}
        for i in range(200)
    ]
    for row in rows[:60]:
        row["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    path = tmp_path / "many.json"
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    annotated = AnnotatedImages(str(path))
    first = choose(annotated, 10, 6, seed=3)
    assert choose(annotated, 10, 6, seed=3) == first
    assert choose(annotated, 10, 6, seed=4).image_ids != first.image_ids
    assert choose(annotated, 10, 6, seed=4).crops != first.crops
    assert len(set(first.image_ids)) == 10 and first.image_ids == sorted(first.image_ids)
    for class_index, crops in enumerate(first.crops[:2]):
        assert len(set(crops)) == 6
        rows_shown = [annotated.annotations[i][k] for i, k in crops]
        assert {x["category_id"] for x in rows_shown} == {class_index + 1}
        assert ["segmentation" in x for x in rows_shown] == [True] * 3 + [False] * 3
    assert first.crops[2] == []
    assert choose(annotated, 99, 0, seed=0).image_ids == list(range(40))


def test_images_that_cannot_be_shown_are_listed(view, make_tiny_coco):
    def change(data):
        data["images"][0]["file_name"] = "../somewhere.png"
        data["images"][1]["file_name"] = "no.png"
        data["images"][2]["width"] = 90

    code, page, text = view(make_tiny_coco(change))
    assert code == 1
    for problem in ("outside of", "no.png", "the json says (80, 90)"):
        assert problem in view.text.err and problem in text
    assert "3 images are not shown" in view.text.err
    assert page.sources == ["./pictures/5.jpg"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-root", "none"], "--image-root none: no such folder"),
        (["--max-images", "-1"], "--max-images is -1"),
        (["--config-file", "no.yaml"], "--config-file no.yaml: no such file"),
        (["--seen-classes", "aunt"], "has no class 'aunt' (nearest: ant, cat)"),
    ],
)
def test_usage_errors(tiny_coco, tmp_path, capsys, options, message):
    arguments = [tiny_coco.json_file, "--image-root", tiny_coco.image_root]
    with pytest.raises(SystemExit) as error:
        view_dataset.main([*arguments, "--output-dir", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_errors_of_the_json_and_missing_jinja2(make_tiny_coco, tmp_path, capsys, monkeypatch):
    def change(data):
        data["annotations"][0]["category_id"] = 4

    dataset = make_tiny_coco(change)
    arguments = [dataset.json_file, "--image-root", dataset.image_root, "--output-dir"]
    for expected in ("annotation 101: 'category_id' is 4", "pip install 'teacher-student-mask["):
        with pytest.raises(SystemExit) as error:
            view_dataset.main([*arguments, str(tmp_path / "out")])
        assert error.value.code == 2 and expected in capsys.readouterr().err
        monkeypatch.setitem(sys.modules, "jinja2", None)


def test_config_says_which_classes_are_seen(tiny_coco, tiny_cfg, view, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(tiny_cfg(dataset=tiny_coco).dump())
    _, page, _ = view(tiny_coco, "--config-file", config, "--crops-per-class", 0)
    assert "unused" in {kind for kind, *_ in page.objects}
    _, page, _ = view(
        tiny_coco, "--config-file", config, "--seen-classes", "all", "--crops-per-class", 0
    )
    assert "unused" not in {kind for kind, *_ in page.objects}


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as error:
        view_dataset.main(["--help"])
    assert error.value.code == 0 and "examples:" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_browser(make_tiny_coco, view, tmp_path):
    def change(data):
        make_model_mask(data)
        data["categories"][2]["name"] = HOSTILE
        data["annotations"][7]["bbox"] = [30.0, 20.0, 26.0, 34.0]

    view(make_tiny_coco(change), "--crops-per-class", 2)
    with open_page(tmp_path / "out/index.html") as page:
        tooltip = page.locator("#tooltip")
        assert not tooltip.is_visible()
        # The middle of the lower edge of a triangle is inside of it.
        shape = page.locator('#gallery [data-tip*="annotation 112"] .fill')
        shape.scroll_into_view_if_needed()
        # The page hears of scrolling with its next frame, and hides the tooltip then.
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => done()))")
        box = shape.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 0.9 * box["height"])
        assert tooltip.is_visible()
        assert "annotation 112" in tooltip.text_content()
        assert re.search(r"overlap O = 0\.\d\d", tooltip.text_content())
        page.mouse.move(2, 2)
        assert not tooltip.is_visible()
        # A box without a mask is found in its middle.
        shape = page.locator('#gallery [data-tip*="annotation 106"] .fill')
        shape.scroll_into_view_if_needed()
        shape.hover()
        assert "box only" in tooltip.text_content()
        # The keyboard does as well.
        page.locator('#gallery [data-tip*="annotation 102"]').focus()
        assert "mask made by a model" in tooltip.text_content()

        def shown():
            tiles = "x => x.filter(f => !f.hidden).map(f => f.querySelector('.path').textContent)"
            return page.eval_on_selector_all("#gallery .tile", tiles)

        assert shown() == ["empty.png", "mixed.png", "seen.png", "unseen.png"]
        page.select_option("#kind", "model")
        assert shown() == ["mixed.png"]
        assert "1 object" == page.locator(".tile:not([hidden]) .tile-count").text_content()
        assert page.locator(".tile:not([hidden]) .object-shape:not(.dim)").count() == 1
        page.select_option("#kind", "")
        page.select_option("#class", "1")
        assert shown() == ["mixed.png", "unseen.png"]
        page.select_option("#class", "")
        page.fill("#minimum", "0.1")
        page.select_option("#order", "high")
        tiles = json.loads(page.locator("#gallery-data").text_content())
        highest = {x["name"]: max((v or 0 for *_, v in x["items"]), default=0) for x in tiles}
        expected = sorted((x for x in highest if highest[x] >= 0.1), key=lambda x: -highest[x])
        assert shown() == expected and len(expected) > 1
        page.uncheck("#names")
        assert page.locator(".tile:not([hidden]) .object-name").first.is_hidden()
        # All pictures are there, once they come into view.
        page.fill("#minimum", "0")
        for picture in page.locator("img").all():
            picture.scroll_into_view_if_needed()
        wait_until(page, "[...document.images].every(x => x.naturalWidth > 0)")
        assert page.locator("img").count() > 4
        assert page.locator("img[onerror]").count() == 0


@pytest.mark.slow
def test_opens_an_image_as_large_as_it_is(make_tiny_coco, view, tmp_path):
    _, page, _ = view(make_tiny_coco(), "--crops-per-class", 0)
    with Image.open(tmp_path / "out/pictures/2.jpg") as picture:
        assert picture.size == (80, 64)
    with open_page(tmp_path / "out/index.html") as page:
        # Shape and picture lie upon each other.
        scenes = page.locator("#gallery .tile .scene").all()
        for scene in scenes:
            boxes = [scene.locator(x).first.bounding_box() for x in ("img", "svg")]
            assert boxes[0] == pytest.approx(boxes[1], abs=1)
