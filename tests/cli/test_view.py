"""The page of a partly annotated dataset."""

import re
from pathlib import Path

import pytest

from teacher_student_mask import drawing
from teacher_student_mask.cli.main import main

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
    return dict(re.findall(r"</span> annotation (\d+): (.*?)</li>", page))


def test_objects_are_told_apart_by_what_is_known_of_them(
    view, make_tiny_coco, tmp_path, monkeypatch
):
    drawn = {}

    def draw(image, detections, labels, *, colors):
        drawn["mixed.png" if len(colors) == 8 else "unseen.png" if "cat" in labels else ""] = colors
        return image

    monkeypatch.setattr(drawing, "draw_instances", draw)
    dataset = make_tiny_coco(make_model_mask)
    status, page, printed = view(dataset, "--seen-classes", "ant, ship")
    assert status == 0 and "4 of 4 images" in printed
    kinds = {int(i): text.split(", ")[1] for i, text in lines(page).items()}
    unread = "mask that training does not read (unseen class)"
    assert kinds == {
        **{101: "mask", 102: "mask made by a model", 103: "mask"},
        **{104: "box only", 105: "box only", 106: "box only", 107: "crowd: left out of training"},
        **{108: unread, 109: unread, 110: unread, 111: "mask", 112: "mask"},
    }
    assert re.search(r"\nant +seen +4 +3 +0 +1 +1 ", page)
    assert re.search(r"\nship +seen +4 +1 +1 +2 +0 ", page)
    mask, model, box, crowd, unread = "#009e73", "#e69f00", "#d55e00", "#999999", "#56b4e9"
    assert drawn["mixed.png"] == [mask, model, mask, box, box, box, crowd, unread]
    assert drawn["unseen.png"] == [unread] * 2
    assert (tmp_path / "out/pictures/7.jpg").is_file()


def test_the_ranking_of_complete_gives_the_order(tiny_coco, view, tmp_path):
    ids = {x["file_name"]: x["id"] for x in tiny_coco.data["images"]}
    order = ["seen.png", "mixed.png", "seen.png", "unseen.png"]
    rows = "".join(f"0.5,{ids[x]}\n" for x in order)
    (tmp_path / "rank.csv").write_text(f"need,image_id\n{rows}")
    picture = Path(tiny_coco.image_root, "seen.png")
    picture.rename(tmp_path / "far.png")
    picture.symlink_to(tmp_path / "far.png")
    _, page, _ = view(tiny_coco, "--rank", tmp_path / "rank.csv", "--max-images", 2)
    assert re.findall(r"<figcaption>(\w+\.png)", page) == ["seen.png", "mixed.png"]
    (tmp_path / "rank.csv").write_text("need,image\n0.5,7\n")
    assert (
        "rank.csv: no csv of tsmask complete" in view(tiny_coco, "--rank", tmp_path / "rank.csv")[2]
    )


def test_a_part_of_the_images_is_from_all_parts_of_the_json(tiny_coco, view):
    _, page, _ = view(tiny_coco, "--max-images", 2)
    ids = [x["id"] for x in tiny_coco.data["images"]]
    assert re.findall(r'src="pictures/(.*?).jpg"', page) == [str(ids[0]), str(ids[2])]


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


def test_names_are_escaped(make_tiny_coco, view):
    def change(data):
        data["categories"][2]["name"] = HOSTILE
        data["annotations"][0]["id"] = HOSTILE
        data["images"][0]["width"] = float(data["images"][0]["width"])  # as some exports have it

    _, page, _ = view(make_tiny_coco(change))
    assert HOSTILE not in page and "&lt;img src=x onerror" in page


def test_a_json_with_errors_is_not_drawn(make_tiny_coco, view):
    dataset = make_tiny_coco(lambda data: data["annotations"][0].update(category_id=4))
    status, page, printed = view(dataset)
    assert status == 1 and "annotation 101" in printed and page == ""
    status, page, printed = view(make_tiny_coco(), "--seen-classes", "aunt")
    assert status == 1 and "aunt" in printed and page == ""
