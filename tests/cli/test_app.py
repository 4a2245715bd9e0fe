"""What a session of tsmask app computes."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from small_students import write_noise, write_small_student

from teacher_student_mask.cli import app
from teacher_student_mask.cli.main import main
from teacher_student_mask.trained_model import load_model

IMAGE = np.full((20, 30, 3), (1, 2, 3), np.uint8)


class TwoObjects:
    """A trained model that finds two objects; the mask of the first tells which head ran."""

    heads, class_names = ("student", "teacher"), ["cat", "dog"]

    def __init__(self):
        self.model = SimpleNamespace(roi_heads=SimpleNamespace(test_mask_head="student"))
        self.images = []

    def predict(self, image):
        self.images.append(image)
        masks = torch.zeros(2, *image.shape[:2], dtype=torch.bool)
        masks[0, :2, : 3 if self.model.roi_heads.test_mask_head == "student" else 5] = True
        found = Instances(image.shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 5.26, 2.0], [10.0, 5.0, 20.0, 15.0]]))
        found.scores = torch.tensor([0.9, 0.4])
        found.pred_classes = torch.tensor([1, 0])
        found.pred_masks = masks
        return found


@pytest.fixture
def session():
    return app.AppSession(TwoObjects())


def test_objects_above_the_score_are_listed(session):
    picture, text = session.show(IMAGE, 0.5, "student")
    assert text == "1 of 2 objects have a score of 0.50 or more."
    # Enlarged until labels are legible.
    assert picture.dtype == np.uint8 and picture.shape[:2] == (280, 420)
    assert session.show(IMAGE, 0.4, "student")[1].startswith("2 of 2 objects")
    large = np.full((400, 410, 3), (10, 100, 200), np.uint8)
    picture, _ = session.show(large, 1.0, "student")
    assert np.array_equal(picture, large)


def test_the_model_gets_bgr_and_runs_only_for_another_image_or_head(session):
    for score in (0.2, 0.5, 0.8):
        session.show(IMAGE, score, "student")
    (image,) = session.trained.images
    assert image[0, 0].tolist() == [3, 2, 1]
    pictures = [session.show(IMAGE, 0.5, head)[0] for head in ("teacher", "student")]
    assert not np.array_equal(*pictures)
    session.show(IMAGE.reshape(30, 20, 3), 0.5, "student")  # the same bytes
    assert len(session.trained.images) == 4


def test_of_a_real_model_both_heads_run(tmp_path):
    write_small_student(tmp_path, "teacher_student.yaml")
    session = app.AppSession(load_model(str(tmp_path / "config.yaml"), score_threshold=0.0))
    image = write_noise(tmp_path / "photo.png")
    student, teacher = (session.show(image, 0.0, x) for x in session.trained.heads)
    assert student[1] == teacher[1] and student[1].startswith("5 of 5")
    assert not np.array_equal(student[0], teacher[0])


def test_without_gradio_the_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--config-file", "none.yaml"]) == 1
    assert "pip install -c constraints.txt gradio" in capsys.readouterr().err
