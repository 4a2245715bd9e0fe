"""The page of a report in a browser: it draws, sorts, copies, fits a phone, and runs no input."""

import pytest
from headless_browser import PATIENCE, launch_chromium, wait_until
from report_example import HOSTILE, SEEN, example_analysis, write_photos

from teacher_student_mask.analysis.report import write_report

pytestmark = pytest.mark.slow

# A name of JavaScript's own is no colour.
MODELS = (f"a {HOSTILE}", "constructor")
UNSEEN = (HOSTILE, "kite", "umbrella", "toaster")
TRACES = {
    "results-detections": 2,
    "results-gt_boxes": 2,
    "overlap-detections": 2,
    "overlap-gt_boxes-AP": 2,
    "overlap-gt_boxes-mask_iou": 2,
    "overlap-gt_boxes-boundary_iou": 2,
    "attribution": 3,
    "pseudo-masks": 3,
    "classes-0": 2,
    "objects": 4,
}


@pytest.fixture(scope="module")
def browser():
    with launch_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    analysis = example_analysis(num_images=10, models=MODELS, unseen=UNSEEN)
    write_photos(analysis, folder)
    return write_report(analysis, folder, image_root=str(folder)).as_uri()


class Events:
    """What happened on a page."""

    def __init__(self, page):
        self.problems, self.requests, self.dialogs = [], [], []
        page.on("console", self._on_console)
        page.on("pageerror", lambda x: self.problems.append(str(x)))
        page.on("request", lambda x: self.requests.append(x.url))
        page.on("dialog", self._on_dialog)

    def _on_console(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def _on_dialog(self, dialog):
        self.dialogs.append(dialog.message)
        dialog.dismiss()


def open_page(browser, report, **options):
    options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options}
    page = browser.new_context(**options).new_page()
    page.events = Events(page)
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(report)
    page.wait_for_selector("html[data-ready]")
    return page


@pytest.fixture(scope="module")
def shared_page(browser, report):
    page = open_page(browser, report)
    yield page
    # After all tests that used it.
    assert page.events.problems == []
    assert page.events.dialogs == []
    page.context.close()


@pytest.fixture
def page(shared_page):
    shared_page.evaluate("window.scrollTo({top: 0, behavior: 'instant'})")
    return shared_page


def column(page, table, index):
    return page.eval_on_selector_all(
        f"#{table} tbody tr", f"rows => rows.map(x => x.cells[{index}].innerText.split('\\n')[0])"
    )


def heading(page, table, index):
    return page.locator(f"#{table} thead th").nth(index)


def test_opens_without_errors_and_asks_nothing_of_a_network(page, report):
    assert page.events.problems == []
    # Pictures and the images that plotly makes are no network.
    assert [x for x in page.events.requests if not x.startswith(("data:", "blob:"))] == [report]


def test_every_figure_is_drawn(page):
    drawn = page.eval_on_selector_all(
        ".chart", "x => x.filter(c => c.querySelector('.main-svg')).map(c => c.dataset.figure)"
    )
    assert sorted(drawn) == sorted(TRACES)
    traces = page.eval_on_selector_all(
        ".chart.drawn", "x => Object.fromEntries(x.map(c => [c.dataset.figure, c.data.length]))"
    )
    assert traces == TRACES
    # All points of the overlap curve, and a bar for each class.
    assert page.locator("#chart-overlap-detections .point").count() == 2 * 11
    assert page.locator("#chart-classes-0 .bars .point").count() == len(SEEN + UNSEEN)


def test_figures_have_a_name(page):
    labels = page.eval_on_selector_all(
        ".chart", "x => x.map(c => [c.getAttribute('role'), c.getAttribute('aria-label')])"
    )
    assert all(role == "img" and len(label) > 20 for role, label in labels)


def test_hostile_names_are_text(page):
    # In the tables.
    assert HOSTILE in column(page, "per-class-detections-table", 0)
    assert page.evaluate("document.querySelectorAll('img[onerror]').length") == 0
    # In the figures: plotly would drop tags that it does not know.
    labels = page.locator("#chart-classes-0 .ytick text").all_text_contents()
    assert sum(x.startswith("<script>alert(1)</script>") for x in labels) == 1
    legend = page.locator("#chart-results-detections .legendtext").all_text_contents()
    assert legend[0].startswith("a <script>alert(1)")


def test_hostile_names_are_text_in_hover_labels(page):
    for name in ("classes-0", "objects", "overlap-detections"):
        # As if the mouse stood on the first point whose text has the name.
        page.evaluate(
            """name => {
                const chart = document.getElementById(`chart-${name}`);
                const texts = chart.data.map(trace => trace.hovertext || []);
                const curveNumber = texts.findIndex(x => x.some(y => y.includes("script")));
                const pointNumber = texts[curveNumber].findIndex(y => y.includes("script"));
                Plotly.Fx.hover(chart, [{ curveNumber, pointNumber }]);
            }""",
            name,
        )
        assert HOSTILE in page.locator(f"#chart-{name} .hoverlayer .hovertext").text_content()


def test_sorting_with_the_mouse(page):
    table = "results-detections-table"
    ap = heading(page, table, 2)
    assert ap.get_attribute("aria-sort") == "none"
    ap.locator("button").click()
    values = [float(x) for x in column(page, table, 2)]
    assert values == sorted(values, reverse=True) and len(set(values)) > 4
    assert ap.get_attribute("aria-sort") == "descending"
    ap.locator("button").click()
    assert [float(x) for x in column(page, table, 2)] == values[::-1]
    assert ap.get_attribute("aria-sort") == "ascending"


def test_sorting_with_the_keyboard(page):
    table = "per-class-detections-table"
    name = heading(page, table, 0)
    name.locator("button").focus()
    page.keyboard.press("Enter")
    assert name.get_attribute("aria-sort") == "ascending"
    names = column(page, table, 0)
    assert names.index("car") < names.index("chair") < names.index("kite")
    # The next column takes over.
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert name.get_attribute("aria-sort") == "none"
    assert heading(page, table, 2).get_attribute("aria-sort") == "descending"
    counts = [int(x) for x in column(page, table, 2)]
    assert counts == sorted(counts, reverse=True)


def test_undefined_values_come_last_in_both_directions(page):
    table = "results-gt_boxes-table"
    button = heading(page, table, 7).locator("button")
    for _ in range(2):
        button.click()
        assert column(page, table, 7)[-2:] == ["-", "-"]


def test_overlap_sorts_by_number(page):
    table = "overlap-detections-table"
    button = heading(page, table, 0).locator("button")
    before = column(page, table, 0)
    button.click()
    assert column(page, table, 0) == before[::-1]
    button.click()
    assert column(page, table, 0) == before


@pytest.mark.parametrize("clipboard", ["granted", "refused", "absent"])
def test_copying_a_table_gives_a_notice(page, clipboard):
    page.evaluate("window.copied = ''; document.getElementById('notice').className = 'notice'")
    if clipboard == "absent":
        page.evaluate(
            "Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true})"
        )
    else:
        page.evaluate(
            """ok => Object.defineProperty(navigator, "clipboard", {configurable: true, value: {
                writeText: x => ok ? (window.copied = x, Promise.resolve()) : Promise.reject()
            }})""",
            clipboard == "granted",
        )
    page.evaluate("document.oncopy = () => { window.copied = document.activeElement.value; }")
    page.locator('[data-table="difference-0-table"]').click()
    page.wait_for_selector("#notice.shown")
    assert page.locator("#notice").text_content() == "Copied 4 rows"
    lines = page.evaluate("window.copied").split("\n")
    assert lines[0].split("\t") == "objects AP AP50 AP75 APs APm APl".split()
    assert lines[1].split("\t")[:2] == ["unseen classes", "+1.5 [0.6, 2.4]"]
    assert lines[2].split("\t")[1] == "+1.5 [-0.5, 3.5] contains 0"
    assert [len(x.split("\t")) for x in lines] == [7] * 5
    assert page.locator(".copy-text").count() == 0


def shows(page, theme):
    """Whether the page and its last figure are in the colours of a theme."""
    expected = {
        "light": ["rgb(244, 246, 248)", "#ffffff"],
        "dark": ["rgb(18, 21, 26)", "#1a1e25"],
    }
    colours = "[getComputedStyle(document.body).backgroundColor, "
    colours += "document.querySelector('#chart-objects').layout.paper_bgcolor]"
    return page.evaluate(f"JSON.stringify({colours}) === JSON.stringify({expected[theme]})")


def test_theme_is_the_systems_until_the_button_is_pressed(browser, report):
    page = open_page(browser, report, color_scheme="dark")
    assert shows(page, "dark")
    page.emulate_media(color_scheme="light")
    wait_until(page, "document.querySelector('#chart-objects').layout.paper_bgcolor === '#ffffff'")
    assert shows(page, "light")
    button = page.locator("#theme")
    assert button.text_content() == "Dark theme"
    button.click()
    assert shows(page, "dark")
    assert button.text_content() == "Light theme"
    # Names that are no colours stay what they are.
    legend = page.locator("#chart-results-detections .legendtext").all_text_contents()
    assert legend[1] == "constructor"
    # The choice is kept.
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert shows(page, "dark")
    page.locator("#theme").click()
    assert shows(page, "light")
    assert page.events.problems == []
    page.context.close()


@pytest.fixture(scope="module")
def phone(browser, report):
    page = open_page(browser, report, viewport={"width": 360, "height": 740})
    yield page
    assert page.events.problems == []
    page.context.close()


def test_fits_a_phone(phone):
    # Nothing is cut off either: what is wider scrolls in its own box.
    wide = phone.evaluate("""[...document.querySelectorAll("main *, header *")].filter(x =>
            !x.closest(".table-scroll, .chart, .hidden-text, [hidden]")
            && x.getBoundingClientRect().right > 360.5).map(x => x.outerHTML.slice(0, 80))""")
    assert wide == []
    assert phone.evaluate("document.scrollingElement.scrollWidth") <= 360
    scrolls = "x => x.filter(e => e.scrollWidth > e.clientWidth).length"
    assert phone.eval_on_selector_all(".table-scroll", scrolls) > 0


def test_first_tab_leads_past_the_header(phone):
    phone.keyboard.press("Tab")
    assert phone.evaluate("document.activeElement.className") == "skip"
    phone.keyboard.press("Enter")
    assert phone.evaluate("document.activeElement.id") == "main"


def loaded(page):
    return page.eval_on_selector_all(
        "#pictures img", "x => x.filter(i => i.src && i.complete && i.naturalWidth > 100).length"
    )


def shown(page, key):
    return page.eval_on_selector_all(
        "#pictures figure:not([hidden])", f"x => x.map(f => f.dataset.{key})"
    )


def test_pictures_are_loaded_when_they_come_into_view(phone):
    assert loaded(phone) == 0
    assert len(shown(phone, "gain")) == 12
    phone.locator("#pictures-title").scroll_into_view_if_needed()
    wait_until(phone, "document.querySelector('#pictures img').naturalWidth > 100")
    assert 0 < loaded(phone) < 12
    for picture in phone.locator("#pictures figure:not([hidden])").all():
        picture.scroll_into_view_if_needed()
    wait_until(
        phone,
        "[...document.querySelectorAll('#pictures figure:not([hidden]) img')]"
        ".every(x => x.naturalWidth > 100)",
    )
    phone.locator("#picture-more").click()
    assert len(shown(phone, "gain")) > 12


def test_pictures_are_ordered_and_chosen(page):
    gains = [abs(float(x)) for x in shown(page, "gain")]
    assert gains == sorted(gains, reverse=True)
    page.select_option("#picture-order", "loss")
    gains = [float(x) for x in shown(page, "gain")]
    assert gains == sorted(gains)
    page.select_option("#picture-order", "overlap")
    overlaps = [float(x) for x in shown(page, "overlap")]
    assert overlaps == sorted(overlaps, reverse=True)
    assert set(shown(page, "unseen")) == {"0", "1"}
    page.check("#picture-unseen")
    assert set(shown(page, "unseen")) == {"1"}
    page.select_option("#picture-class", HOSTILE)
    assert set(shown(page, "class")) == {HOSTILE}
    count = page.locator("#picture-count").text_content()
    assert count == f"{len(shown(page, 'class'))} of {len(shown(page, 'class'))} shown"


def test_another_pair_can_be_chosen(page):
    page.select_option("#pair", "pair-1")
    assert page.locator("#chart-classes-1 .main-svg").count() > 0
    assert not page.locator("#pair-0").is_visible()
    width = page.locator("#chart-classes-1 .main-svg").first.bounding_box()["width"]
    assert width > 400
    page.select_option("#pair", "pair-0")
    assert page.locator("#pair-0").is_visible()
