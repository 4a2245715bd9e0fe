"""The page of a partly annotated dataset, read as text and in a browser."""

import re

import numpy as np
import pytest
from headless_browser import launch_chromium

from teacher_student_mask import drawing
from teacher_student_mask.cli.main import main
from teacher_student_mask.drawing import (
    BOX_COLOR,
    CROWD_COLOR,
    MODEL_COLOR,
    SEEN_COLOR,
    UNSEEN_COLOR,
)

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def view(tmp_path, capsys):
    """Return ``view(dataset, *options)``: the exit status, the page and what was printed."""

    def run(dataset, *options):
        arguments = [dataset.json_file, "--image-root", dataset.image_root]
        arguments += ["--output-dir", tmp_path / "out", *options]
        status = main(["view", *map(str, arguments)])
        page = tmp_path / "out/index.html"
        return status, page.read_text() if page.exists() else "", "".join(capsys.readouterr())

    return run


def make_model_mask(data):
    data["annotations"][1]["mask_source"] = "model"


def lines(page):
    """{annotation id: what the page says of it below the picture}."""
    return dict(re.findall(r"<li>annotation (\d+): (.*?)</li>", page))


def test_objects_are_told_apart_by_what_is_known_of_them(
    view, make_tiny_coco, tmp_path, monkeypatch
):
    drawn = {}

    def draw(image, detections, labels, *, colors):
        drawn["mixed.png" if len(colors) == 8 else "unseen.png" if "cat" in labels else ""] = colors
        return image

    monkeypatch.setattr(drawing, "draw_instances", draw)
    dataset = make_tiny_coco(make_model_mask)
    status, page, printed = view(dataset, "--seen-classes", "ant, ship", "--crops-per-class", 0)
    assert status == 0 and "4 of 4 images" in printed
    kinds = {int(i): text.split(", ")[1] for i, text in lines(page).items()}
    unread = "mask that training does not read (unseen class)"
    assert kinds == {
        **{101: "mask", 102: "mask made by a model", 103: "mask"},
        **{104: "box only", 105: "box only", 106: "box only", 107: "crowd: left out of training"},
        **{108: unread, 109: unread, 110: unread, 111: "mask", 112: "mask"},
    }
    assert "<tr><td>ant<td>seen<td>4<td>3<td>0<td>1<td>1" in page
    assert "<tr><td>ship<td>seen<td>4<td>1<td>1<td>2<td>0" in page
    colors = [BOX_COLOR] * 3 + [CROWD_COLOR]
    assert drawn["mixed.png"] == [SEEN_COLOR, MODEL_COLOR, SEEN_COLOR, *colors, UNSEEN_COLOR]
    assert drawn["unseen.png"] == [UNSEEN_COLOR] * 2
    assert (tmp_path / "out/pictures/7.jpg").is_file()


def test_overlap_by_hand(tiny_coco, view):
    # Triangle (20, 74) (33 1/3, 34) (60, 74) in the box x 4..40, y 10..50 of the other: counted
    # below on a fine grid.
    x, y = np.meshgrid(np.arange(4, 40, 0.05) + 0.025, np.arange(10, 50, 0.05) + 0.025)
    height = 74 - y
    inside = (x >= 20 + height / 3) & (x <= 60 - height * 2 / 3) & (height >= 0)
    _, page, _ = view(tiny_coco, "--crops-per-class", 0)
    found = float(re.search("O = (.*)", lines(page)["111"])[1])
    assert found == pytest.approx(inside.mean(), abs=0.02)
    assert "O =" not in lines(page)["107"]  # a crowd


def test_crops_of_every_class(tiny_coco, view, tmp_path):
    status, page, _ = view(tiny_coco, "--max-images", 0, "--crops-per-class", 4)
    assert status == 0 and "<h2>Pictures" not in page
    sections = re.findall(r"<h3>(.*?)</h3>(.*)", page)
    kinds = {name: sorted(re.findall(r": \w+, (mask|box only)", x)) for name, x in sections}
    # Of the four ants, a crowd aside, three have a mask.
    assert kinds == {
        "ant": ["box only"] + ["mask"] * 3,
        "cat": ["mask"] * 3,
        "ship": ["box only"] * 2 + ["mask"] * 2,
    }
    sources = re.findall(r'src="(crops/.*?)"', page)
    assert len(sources) == 11 and all((tmp_path / "out" / x).is_file() for x in sources)


def test_the_choice_is_that_of_the_seed(tiny_coco, view):
    def choose(seed):
        _, page, _ = view(tiny_coco, "--max-images", 2, "--crops-per-class", 1, "--seed", seed)
        return re.findall(r'src="(.*?)"', page)

    assert choose(3) == choose(3) and len(choose(3)) == 5
    assert len({tuple(choose(seed)) for seed in range(5)}) > 1


def test_images_that_cannot_be_shown_are_listed(view, make_tiny_coco):
    def change(data):
        data["images"][0]["file_name"] = "../somewhere.png"
        data["images"][1]["file_name"] = "no.png"
        data["images"][2]["width"] = 90

    status, page, printed = view(make_tiny_coco(change))
    assert status == 1
    for problem in ("is outside of", "no.png", "the json says (80, 90)"):
        assert problem in printed and problem in page
    assert re.findall(r'src="(pictures/.*?)"', page) == ["pictures/5.jpg"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image-root", "none"], "--image-root none: no such folder"),
        (["--max-images", "-1"], "must be 0 or more"),
        (["--seen-classes", "aunt"], "aunt"),
    ],
)
def test_what_the_user_has_to_mend(tiny_coco, view, options, message):
    status, page, printed = view(tiny_coco, *options)
    assert status == 1 and message in printed and page == ""


def test_a_json_with_errors_is_not_drawn(make_tiny_coco, view):
    dataset = make_tiny_coco(lambda data: data["annotations"][0].update(category_id=4))
    status, page, printed = view(dataset)
    assert status == 1 and "annotation 101" in printed and page == ""


@pytest.mark.slow
def test_in_a_browser(make_tiny_coco, view, tmp_path):
    def change(data):
        data["categories"][2]["name"] = HOSTILE

    view(make_tiny_coco(change))
    with launch_chromium() as browser:
        page = browser.new_page(viewport={"width": 400, "height": 900})
        problems = []
        page.on("pageerror", lambda x: problems.append(str(x)))
        page.on("dialog", lambda x: problems.append(x.message) or x.dismiss())
        page.goto((tmp_path / "out/index.html").as_uri())
        for picture in page.locator("img").all():
            picture.scroll_into_view_if_needed()
        page.wait_for_function("[...document.images].every(x => x.naturalWidth > 0)")
        assert page.locator("img").count() > 8 and page.locator("img[onerror]").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert problems == []
