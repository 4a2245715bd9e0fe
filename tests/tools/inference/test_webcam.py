"""Cameras, pacing and windows, with cameras and clocks that are only played."""

import types

import cv2
import numpy as np
import pytest

from inference import webcam
from inference.media import SourceError
from inference.webcam import Camera, LiveView


class PlayedCapture:
    """A cv2.VideoCapture of so many frames; the clock goes on by 0.25 s with each."""

    def __init__(self, device, num_frames=5, fps=8.0):
        self.device, self.left, self.fps, self.is_open = device, num_frames, fps, True
        self.time = 100.0

    def __call__(self, device):
        self.device = device
        return self

    def set(self, *_):
        return False

    def get(self, which):
        return self.fps if which == cv2.CAP_PROP_FPS else 0.0

    def read(self):
        if self.left == 0:
            return False, None
        self.left -= 1
        self.time += 0.25
        return True, np.full((4, 6, 3), self.left, np.uint8)

    def release(self):
        self.is_open = False


@pytest.fixture
def play(monkeypatch):
    def _play(**options):
        capture = PlayedCapture(None, **options)
        monkeypatch.setattr(webcam.cv2, "VideoCapture", capture)
        return capture

    return _play


def test_reads_a_device_until_it_ends(play, log):
    capture = play(num_frames=3)
    camera = Camera("2", clock=lambda: capture.time)
    frames = list(camera.read())
    assert [x[0, 0, 0] for x in frames] == [2, 1, 0]
    assert capture.device == 2 and not capture.is_open
    assert camera.overlay.name == "webcam_2.mp4" and camera.is_video
    assert "no more frames after 3" in log.text


def test_pictures_keep_their_time(play):
    # Eight frames a second, and a picture every quarter of one: two frames each after the first.
    capture = play(num_frames=4, fps=8.0)
    camera = Camera("0", clock=lambda: capture.time)
    repeats = [(camera.repeats(), camera.image_fields(k)) for k, _ in enumerate(camera.read())]
    assert [n for n, _ in repeats] == [1, 2, 2, 2]
    assert [x for _, x in repeats] == [{"frame": k, "seconds": 0.25 * k} for k in range(4)]
    assert camera.fps() == 8.0


def test_a_camera_that_does_not_say_its_rate(play):
    capture = play(num_frames=2, fps=float("nan"))
    camera = Camera("0", clock=lambda: capture.time)
    assert [camera.repeats() for _ in camera.read()] == [1, 6]  # 25 a second
    assert camera.fps() == 0


@pytest.mark.parametrize("max_frames, expected", [(None, 5), (2, 2), (5, 5), (9, 5)])
def test_max_frames(play, max_frames, expected):
    capture = play(num_frames=5)
    camera = Camera("0", max_frames)
    assert len(list(camera.read())) == expected
    assert camera.announced_images() == (max_frames or 0)
    assert not capture.is_open


def test_no_camera_is_one_sentence(play):
    play(num_frames=0)
    with pytest.raises(SourceError, match="webcam 3: OpenCV reads no frame"):
        list(Camera("3").read())


def test_live_view_ends_with_its_window(play):
    capture = play(num_frames=5)
    camera, shown = Camera("0"), []
    window = types.SimpleNamespace(is_closed=False)

    def show(picture):
        shown.append(picture)
        window.is_closed = len(shown) == 2

    window.show, window.close = show, lambda: setattr(window, "is_closed", True)
    with LiveView(camera, window, lambda source, image, outputs: image + outputs["more"]) as view:
        for image in camera.read():
            view.write(image, {"more": 100})
    assert [x[0, 0, 0] for x in shown] == [104, 103]
    assert not capture.is_open


def test_no_display_means_no_window(monkeypatch, log):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert webcam.open_window("a title") is None
    assert "No window" in log.text and "A video is written instead" in log.text


def test_window_shows_pictures_and_q_closes_it():
    window = webcam.open_window("a title")
    if window is None:
        pytest.skip("no display")
    window.show(np.full((30, 40, 3), (0, 0, 255), np.uint8))  # BGR
    assert window._picture.get(5, 5) == (255, 0, 0)
    assert (window._picture.width(), window._picture.height()) == (40, 30)
    assert not window.is_closed
    window._root.focus_force()
    window._root.update()
    window._root.event_generate("q")
    assert window.is_closed
    window.show(np.zeros((30, 40, 3), np.uint8))
    window.close()
