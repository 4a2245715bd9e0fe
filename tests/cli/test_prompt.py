"""tsmask prompt with stand-ins for Segment Anything, whose weights are not at hand."""

import json
import sys
import types

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from teacher_student_mask.cli.main import main
from teacher_student_mask.coco_json import has_mask


class LeftHalf:
    """Segments the left half of each box; remembers what it was given."""

    share = 0.5

    def __init__(self, *made_of):
        self.made_of, self.boxes = made_of, []

    def set_image(self, image):
        assert image.dtype == np.uint8 and image.flags["C_CONTIGUOUS"]
        self.image = image

    def predict(self, *, box, multimask_output):
        assert not multimask_output
        self.boxes.append(box)
        x0, y0, x1, y1 = box
        ys, xs = np.mgrid[: self.image.shape[0], : self.image.shape[1]] + 0.5
        mask = (xs >= x0) & (xs <= x0 + self.share * (x1 - x0)) & (ys >= y0) & (ys <= y1)
        return mask[None], np.array([0.75]), None


@pytest.fixture
def prompt(tiny_coco, tmp_path, monkeypatch, capsys):
    """Return ``prompt(model, make)``: the status, what was printed, {id: annotation}."""
    (tmp_path / "weights.pth").write_bytes(b"")

    def _prompt(model="stand_in:make", make=LeftHalf, weights="weights.pth"):
        monkeypatch.setitem(sys.modules, "stand_in", types.SimpleNamespace(make=make))
        options = {
            "--weights": tmp_path / weights,
            "--annotations": tiny_coco.json_file,
            "--image-root": tiny_coco.image_root,
            "--output": tmp_path / "out.json",
        }
        status = main(["prompt", model, *(str(x) for pair in options.items() for x in pair)])
        written = tmp_path / "out.json"
        rows = json.loads(written.read_text())["annotations"] if status == 0 else []
        return status, "".join(capsys.readouterr()), {x["id"]: x for x in rows}

    return _prompt


def test_objects_without_a_mask_get_the_models(prompt, tiny_coco):
    made = []
    status, printed, rows = prompt(make=lambda *args: made.append(LeftHalf(*args)) or made[-1])
    assert status == 0 and made[0].made_of[0].endswith("weights.pth")
    before = {x["id"]: x for x in tiny_coco.data["annotations"]}
    missing = {i for i, x in before.items() if not has_mask(x) and not x.get("iscrowd")}
    assert {i for i in rows if rows[i] != before[i]} == missing and missing
    assert len(made[0].boxes) == len(missing)
    # Every object without a mask is in one image; the model gets it in RGB.
    (name,) = {
        x["file_name"]
        for x in tiny_coco.data["images"]
        for i in missing
        if x["id"] == before[i]["image_id"]
    }
    image = np.array(Image.open(f"{tiny_coco.image_root}/{name}").convert("RGB"))
    assert np.array_equal(made[0].image, image)
    for i in missing:
        x, y, w, h = before[i]["bbox"]
        assert rows[i]["mask_source"] == "model" and rows[i]["score"] == 0.75
        left, top, width, height = mask_util.toBbox(rows[i]["segmentation"])
        assert (left, top, height) == pytest.approx((x, y, h), abs=1)
        assert width == pytest.approx(w / 2, abs=1)
    assert "no more than" not in printed


def test_masks_that_are_no_more_than_their_boxes_are_counted(prompt):
    status, printed, rows = prompt(make=type("Box", (LeftHalf,), {"share": 1.0}))
    number = sum(x.get("mask_source") == "model" for x in rows.values())
    assert f"{number} of {number} new masks are no more than their filled box" in printed


def test_segment_anything_is_found_by_its_registry(prompt, monkeypatch):
    class Network(str):
        def to(self, device):
            return self

        def eval(self):
            return self

    registry = {"vit_b": lambda checkpoint: Network(checkpoint)}
    package = types.SimpleNamespace(sam_model_registry=registry, SamPredictor=LeftHalf)
    monkeypatch.setitem(sys.modules, "segment_anything", package)
    assert prompt("sam:vit_b")[0] == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"model": "sam"}, "allowed: sam:..., mobile_sam:..., sam2:..., or MODULE:FUNCTION"),
        ({"model": "mobile_sam:vit_t"}, "needs mobile_sam: install mobile-sam"),
        ({"model": "stand_in:build"}, "stand_in has no function 'build'"),
        ({"weights": "none.pth"}, "none.pth do not exist"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(prompt, arguments, sentence):
    status, printed, _ = prompt(**arguments)
    assert status == 1 and sentence in printed.splitlines()[-1]
