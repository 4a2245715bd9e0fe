"""The report in Chromium: it draws its figures, runs nothing of the input, and fits a phone."""

from headless_browser import launch_chromium
from report_example import HOSTILE, example_analysis

from teacher_student_mask.analysis import write_report


def test_page_in_a_browser(tmp_path):
    analysis = example_analysis(tmp_path, names=("a", HOSTILE), classes=("dog", HOSTILE, "kite"))
    path = write_report(analysis, tmp_path / "out", image_root=str(tmp_path))
    problems, requests = [], []
    with launch_chromium() as browser:
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda x: problems.append(x.text) if x.type != "log" else None)
            page.on("pageerror", lambda x: problems.append(str(x)))
            page.on("dialog", lambda x: problems.append(x.message) or x.dismiss())
            page.on("request", lambda x: requests.append(x.url))
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            # The page does not scroll sideways; wide tables do so by themselves.
            assert page.evaluate("document.documentElement.scrollWidth") == width
            figures = page.locator(".plotly-graph-div")
            assert figures.count() == 8
            for i in range(figures.count()):
                if figures.nth(i).is_visible():
                    assert figures.nth(i).locator(".main-svg").first.is_visible()
                    assert figures.nth(i).bounding_box()["width"] <= width
            assert HOSTILE in page.locator("h1").inner_text()
            table = page.locator("#results .table").first
            assert width > 400 or table.evaluate("x => x.scrollWidth > x.clientWidth")
            # What is closed gets its size when it opens.
            page.locator("#classes details:not([open]) summary").click()
            page.wait_for_function(
                "() => document.querySelector('#figure-classes-1 .main-svg').clientWidth > 100"
            )
            picture = page.locator(".pictures img").first
            picture.scroll_into_view_if_needed()
            assert picture.evaluate("x => x.decode().then(() => x.naturalWidth)") > 100
            page.close()
    assert not problems
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob"}
    assert sum(url.startswith("file") for url in requests) == 2
