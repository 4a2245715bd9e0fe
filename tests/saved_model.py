"""A model with random weights as train_net.py would have left it: a config and a checkpoint."""

import torch
from detectron2.modeling import build_model

TEACHER_STUDENT = ["MODEL.ROI_HEADS.NAME", "TeacherStudentROIHeads"]


def save_model(cfg, folder, change=None):
    """
    Write config.yaml and model.pth to ``folder``; return their paths as strings.

    ``change(state_dict)`` may edit the weights before they are written.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    # The predictors start at almost 0: with larger weights the heads have opinions.
    for name, parameter in model.named_parameters():
        if name.endswith("mask_head.predictor.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    state = model.state_dict()
    if change is not None:
        change(state)
    folder.mkdir(exist_ok=True)
    torch.save({"model": state}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml"), str(folder / "model.pth")
