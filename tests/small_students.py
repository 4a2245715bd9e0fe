"""Students with random weights, small and with opinions: a config and a checkpoint."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image
from tiny_model import TINY_MODEL

from teacher_student_mask import add_teacher_student_mask_config

_FORBID = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is forbidden here")

sys.meta_path.insert(0, Forbid())
"""
SHAPES = Path(__file__).resolve().parents[1] / "configs/shapes"


def small_config(config, *opts):
    """The config of a tiny model; at most 5 objects on an image, without a threshold."""
    cfg = get_cfg()
    add_teacher_student_mask_config(cfg)
    cfg.merge_from_file(str(SHAPES / config))
    cfg.merge_from_list(
        TINY_MODEL
        + ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
        + ["INPUT.MIN_SIZE_TEST", 64, "TEST.DETECTIONS_PER_IMAGE", 5]
        + ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *opts]
    )
    return cfg


def small_model(cfg):
    """The model of a config, in evaluation mode; its scores and masks differ from ROI to ROI."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mask_head.predictor.weight"):
            torch.nn.init.normal_(parameter, std=1.0)
        if name.endswith("cls_score.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def write_small_student(folder, config, *opts):
    """Write config.yaml and weights.pth to ``folder``; return the config, which names them."""
    cfg = small_config(config, *opts)
    torch.save({"model": small_model(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


def write_noise(path, height=64, width=80):
    """
    Write a picture of coarse noise; return it, uint8 (height, width, 3), RGB.

    Of fine noise nothing would be left where the picture is scaled down.
    """
    cells = -(-height // 4), -(-width // 4), 3
    noise = np.random.default_rng(0).integers(0, 256, cells, dtype=np.uint8)
    image = noise.repeat(4, 0).repeat(4, 1)[:height, :width]
    Image.fromarray(image).save(path)
    return image


def run_without(names, code, folder):
    """Run code in a new process, in ``folder``, in which some packages cannot be imported."""
    command = [sys.executable, "-c", _FORBID.format(names=names) + code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
