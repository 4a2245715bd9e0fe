"""The contact sheet: which frame stands for a video, and sorting and filtering in a browser."""

import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from headless_browser import open_page, wait_until

from pages.contact_sheet import ContactSheet

HOSTILE = "</script><img src=x onerror=alert(1)>"


def found(*objects):
    instances = Instances((40, 60))
    instances.pred_classes = torch.tensor([c for c, _ in objects], dtype=torch.long)
    instances.scores = torch.tensor([s for _, s in objects])
    return instances


def picture(shade, width=60):
    return np.full((40, width, 3), shade, np.uint8)


def tiles_of(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="gallery-data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_video_is_shown_by_its_frame_with_most_objects(tmp_path):
    sheet = ContactSheet(tmp_path, ["ant", "cat"])
    for shade, objects in ((10, []), (90, [(0, 0.5), (1, 0.6)]), (200, [(1, 0.9)])):
        sheet.add("v.avi", "overlays/v.mp4", picture(shade), found(*objects), True)
    sheet.add("v.png", "overlays/v.png", picture(50, width=800), found(), False)
    page = sheet.write(["broken.png: no image"], 0.5)
    assert tiles_of(page) == [
        {"name": "v.avi", "items": [[0, "", 0.5], [1, "", 0.6]]},
        {"name": "v.png", "items": []},
    ]
    thumbnail = cv2.imread(str(tmp_path / "thumbnails/v.mp4.jpg"))
    assert thumbnail.shape == (40, 60, 3) and abs(int(thumbnail.mean()) - 90) < 3
    text = page.read_text()
    assert "in one of 3 frames" in text and "broken.png: no image" in text
    assert [x.name for x in (tmp_path / "thumbnails").iterdir() if "png" in x.name] == ["v.png.jpg"]


def test_nothing_found_is_a_page_too(tmp_path):
    page = ContactSheet(tmp_path, ["ant"]).write([], 0.5)
    assert tiles_of(page) == []


@pytest.mark.slow
def test_sorting_and_filtering(tmp_path):
    sheet = ContactSheet(tmp_path, ["ant", HOSTILE])
    rows = {
        "b.png": [(0, 0.9), (0, 0.3)],
        "a.png": [(1, 0.5)],
        "c#.png": [(0, 0.4), (1, 0.6), (1, 0.8)],
        f"d{HOSTILE}.png".replace("/", "_"): [],
    }
    for k, (name, objects) in enumerate(rows.items()):
        sheet.add(name, f"overlays/{name}", picture(50 * k), found(*objects), False)
    b, a, c, d = rows
    with open_page(sheet.write([], 0.3)) as page:

        def shown():
            tiles = "x => x.filter(f => !f.hidden).map(f => f.querySelector('.path').textContent)"
            return page.eval_on_selector_all("#gallery .tile", tiles)

        def counts():
            return page.locator(".tile:not([hidden]) .tile-count").all_text_contents()

        assert shown() == [b, a, c, d]
        for order, expected in (
            ("name", [a, b, c, d]),
            ("count", [c, b, a, d]),
            ("high", [b, c, a, d]),
            ("low", [b, c, a, d]),
            ("", [b, a, c, d]),
        ):
            page.select_option("#order", order)
            assert shown() == expected, order
        assert counts() == ["2 objects", "1 object", "3 objects", "0 objects"]
        page.uncheck("#empty")
        assert shown() == [b, a, c]
        page.select_option("#class", "1")
        assert shown() == [a, c] and counts() == ["1 object", "2 objects"]
        assert page.locator("#count").text_content().startswith("2 of 2 pictures shown, with 3 obj")
        page.fill("#minimum", "0.7")
        assert shown() == [c] and counts() == ["1 object"]
        page.select_option("#class", "0")
        assert shown() == [b]
        assert page.locator(".tile:not([hidden]) .tile-values").text_content() == "score 0.90"
        # Pictures are there, whatever their names; names are text.
        page.fill("#minimum", "0")
        page.select_option("#class", "")
        page.check("#empty")
        wait_until(page, "[...document.images].every(x => x.naturalWidth > 0)")
        sizes = page.eval_on_selector_all("#gallery img", "x => x.map(i => i.naturalWidth)")
        assert sizes == [60] * 4
        assert page.locator("img[onerror]").count() == 0
        page.locator("#theme").click()
        assert page.locator("html").get_attribute("data-theme") == "dark"
