"""The page of tools/app.py: what a session computes, and the page itself in a browser."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, Instances
from headless_browser import launch_chromium
from small_students import write_noise, write_small_student

import app

ROOT = Path(__file__).resolve().parents[2]
IMAGE = np.zeros((20, 30, 3), np.uint8)


class Predictor:
    """Finds two objects; the mask of the first tells which head ran."""

    def __init__(self, heads=("student", "teacher")):
        roi_heads = SimpleNamespace(test_mask_head="student")
        if "teacher" in heads:
            roi_heads.teacher_mask_head = None
        self.model = SimpleNamespace(roi_heads=roi_heads)
        self.images = []

    def __call__(self, image):
        self.images.append(image)
        masks = torch.zeros(2, *image.shape[:2], dtype=torch.bool)
        masks[0, :2, : 3 if self.model.roi_heads.test_mask_head == "student" else 5] = True
        found = Instances(image.shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 5.26, 2.0], [10.0, 5.0, 20.0, 15.0]]))
        found.scores = torch.tensor([0.9, 0.4])
        found.pred_classes = torch.tensor([1, 0])
        found.pred_masks = masks
        return {"instances": found}


@pytest.fixture
def session():
    return app.Session(Predictor(), ["cat", "dog"])


def test_objects_above_the_score_are_listed(session):
    picture, rows, text = session.show(IMAGE, 0.5, "student")
    assert rows == [[1, "dog", 0.9, 0.0, 0.0, 5.3, 2.0, 6]]
    assert len(rows[0]) == len(app.COLUMNS)
    assert text == "1 of 2 objects have a score of 0.50 or more; the next has 0.400."
    assert picture.dtype == np.uint8 and picture.shape[:2] == (280, 420)
    _, rows, text = session.show(IMAGE, 0.4, "student")
    assert [row[1] for row in rows] == ["dog", "cat"] and text.startswith("2 of 2")


def test_without_an_object_the_picture_is_the_image(session):
    image = np.full((400, 410, 3), (10, 100, 200), np.uint8)
    picture, rows, _ = session.show(image, 1.0, "student")
    assert rows == [] and picture.shape == image.shape
    assert np.abs(picture.astype(int) - image).max() <= 1


def test_the_model_gets_bgr(session):
    session.show(np.full((20, 30, 3), (1, 2, 3), np.uint8), 0.5, "student")
    assert session._predictor.images[0][0, 0].tolist() == [3, 2, 1]


def test_moving_the_slider_does_not_run_the_model(session):
    for score in (0.2, 0.5, 0.8):
        session.show(IMAGE, score, "student")
    assert len(session._predictor.images) == 1
    # Same bytes, another shape.
    session.show(IMAGE.reshape(30, 20, 3), 0.5, "student")
    session.show(IMAGE + 1, 0.5, "student")
    assert len(session._predictor.images) == 3


def test_each_head_has_its_masks(session):
    areas = [session.show(IMAGE, 0.5, x)[1][0][-1] for x in ("student", "teacher", "student")]
    assert areas == [6, 10, 6] and len(session._predictor.images) == 2


def test_few_results_are_kept(session):
    for i in range(10):
        session.show(IMAGE + i, 0.5, "student")
    assert len(session._found) == app.NUM_KEPT
    session.show(IMAGE + 9, 0.5, "student")
    assert len(session._predictor.images) == 10


def test_a_model_without_a_teacher_has_one_head():
    session = app.Session(Predictor(heads=("student",)), ["cat", "dog"])
    assert session.heads == ("student",)
    with pytest.raises(ValueError, match="'teacher'; this model has: student"):
        session.find(IMAGE, "teacher")


def test_errors_say_what_is_wrong(session, monkeypatch):
    with pytest.raises(ValueError, match="no image yet"):
        session.find(None, "student")
    monkeypatch.setattr(app, "MAX_PIXELS", 599)
    with pytest.raises(ValueError, match="30 x 20 pixels"):
        session.find(IMAGE, "student")
    assert session._predictor.images == []


def test_of_a_real_model_both_heads_run(tmp_path):
    predictor = DefaultPredictor(write_small_student(tmp_path, "teacher_student.yaml"))
    session = app.Session(predictor, [f"class {i}" for i in range(20)])
    image = write_noise(tmp_path / "photo.png")
    student, teacher = (session.find(image, head) for head in session.heads)
    assert len(student) == len(teacher) == 5
    assert torch.equal(student.pred_boxes.tensor, teacher.pred_boxes.tensor)
    assert (student.pred_masks != teacher.pred_masks).any()


def test_without_gradio_the_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as error:
        app.main(["--config-file", "none.yaml"])
    assert error.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "pip install -c constraints.txt gradio" in message


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip(
        "gradio",
        reason="gradio is not installed: make test TEST_PARTS='crf browser export app'",
    )
    with launch_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """The program in a process with its own home, working and temporary folder."""
    folder = tmp_path_factory.mktemp("app")
    write_small_student(folder, "teacher_student.yaml")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = dict(os.environ, HOME=str(folder / "home"), TMPDIR=str(folder / "temp"))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)
    environment["MPLCONFIGDIR"] = str(folder / "matplotlib")
    for name in ("home", "temp", "work", "matplotlib"):
        (folder / name).mkdir()
    command = [sys.executable, str(ROOT / "tools/app.py"), "--port", str(port)]
    command += ["--config-file", str(folder / "config.yaml")]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder / "work", env=environment, stdout=log, stderr=log
        )
    end = time.monotonic() + 300
    while "The page: " not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.2)
    yield SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{port}", process=process)
    process.kill()
    process.wait()


@pytest.mark.slow
def test_the_page_in_a_browser(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    requests, problems = [], []
    page.on("request", lambda x: requests.append(x.url))
    page.on("pageerror", lambda x: problems.append(str(x)))
    page.set_default_timeout(120_000)
    page.goto(server.url)
    summary, picture = page.locator("#summary"), page.locator("#picture img")

    def wait_for(text):
        page.wait_for_function(
            "text => document.querySelector('#summary')?.innerText.includes(text)", arg=text
        )

    wait_for("Drop an image")
    write_noise(server.folder / "photo.png")
    page.locator("input[type=file]").first.set_input_files(server.folder / "photo.png")
    wait_for("5 objects")
    picture.wait_for()

    # All objects, with the keyboard; the table follows.
    page.locator("#score input[type=range]").focus()
    page.keyboard.press("Home")
    wait_for("5 of 5 objects have a score of 0.05")
    page.wait_for_function(
        "document.querySelector('#objects').innerText.split('\\n').includes('5')"
    )
    before = picture.get_attribute("src")

    # The other head has other masks.
    page.locator("#head input[value=teacher]").check()
    page.wait_for_function(
        "before => document.querySelector('#picture img').src !== before", arg=before
    )
    assert "5 of 5" in summary.inner_text()

    page.locator("#score input[type=range]").focus()
    page.keyboard.press("End")
    wait_for("score of 1.00")

    # What is no image is refused in words.
    (server.folder / "broken.png").write_text("no image")
    page.locator("button[aria-label='Remove Image']").click()
    wait_for("Drop an image")
    page.locator("input[type=file]").first.set_input_files(server.folder / "broken.png")
    toast = page.locator(".toast-body").first
    toast.wait_for()
    assert "This file cannot be read as an image; try a PNG or JPEG." in toast.inner_text()
    assert "temp" not in toast.inner_text()
    page.close()

    assert problems == []
    assert [x for x in requests if not x.startswith((server.url, "data:", "blob:"))] == []
    # Nothing outside the temporary folder, and that is empty afterwards.
    assert list((server.folder / "work").iterdir()) == []
    assert [x for x in (server.folder / "home").rglob("*") if x.is_file()] == []
    assert len(list((server.folder / "temp").glob("teacher-student-app-*"))) == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert list((server.folder / "temp").glob("teacher-student-app-*")) == []
