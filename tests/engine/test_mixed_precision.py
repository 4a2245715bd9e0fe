"""Half precision gives the losses of float32 up to rounding."""

import json

import pytest
import test_train_net
import torch
from test_base_methods import EVERY_METHOD, METHODS, OPMASK, OURS, batch_of, build, step

from teacher_student_mask.modeling import TeacherStudentROIHeads

run_tiny = test_train_net.run  # the fixture

DEEPEST = "hourglass-52, narrow"
ALL = {
    **METHODS,
    "opmask + crf": [*OURS, *OPMASK, "MODEL.PSEUDO_MASK.METHOD", "crf"],
    DEEPEST: EVERY_METHOD[DEEPEST],
}
QUICK = ("opmask + crf", "opmask + boxinst + ours", "condinst + boxinst + ours")
every_method = pytest.mark.parametrize(
    "method", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in ALL]
)
# bfloat16 has 8 bits: one rounding is up to 0.4 %. Measured: losses up to 0.9 %, masks up to 2.8 %.
LOSS_TOLERANCE = 0.02
# The class activation map stretches what few channels say to [0, 1], their rounding with it; and
# 52 layers round 52 times. Measured: losses up to 2.4 % and 2.2 %.
LARGE_LOSS_TOLERANCE = 0.04
MASK_TOLERANCE = 0.04
LOW = {"cpu": torch.bfloat16, "cuda": torch.float16}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a CUDA GPU")


class SameTargets:
    """
    Makes the pseudo masks of both precisions, but both train on those of float32.

    A cell where teacher and student are sure of opposite sides turns with the last bit of their
    mean, and its loss changes a lot.
    """

    def __init__(self, pseudo_masks):
        self.pseudo_masks = pseudo_masks
        self.crf = pseudo_masks.crf
        self.masks = []

    def __call__(self, *args):
        self.masks.append(self.pseudo_masks(*args).float())
        return self.masks[0]


def model_with_opinions(cfg):
    """Mask heads that are not at 0.5 almost exactly, where rounding alone makes the pseudo mask."""
    model = build(cfg).train()
    heads = [model.roi_heads.mask_head]
    if isinstance(model.roi_heads, TeacherStudentROIHeads):
        heads.append(model.roi_heads.teacher_mask_head)
        model.roi_heads.pseudo_masks = SameTargets(model.roi_heads.pseudo_masks)
    for head in heads:
        if hasattr(head, "predictor"):  # Mask^X R-CNN predicts its last layer
            torch.nn.init.normal_(head.predictor.weight, std=1.0)
    return model


def check_agreement(cfg, dataset):
    model = model_with_opinions(cfg)
    batch = batch_of(cfg, dataset)
    expected = step(model, batch)
    with torch.autocast(cfg.MODEL.DEVICE, dtype=LOW[cfg.MODEL.DEVICE]):
        losses = step(model, batch)
    assert losses.keys() == expected.keys()
    names = cfg.MODEL.ROI_MASK_PRIOR.NAME, cfg.MODEL.ROI_MASK_HEAD.NAME
    rounds_more = {"ContrastivePrior", "NarrowHourglassMaskHead"} & {*names}
    tolerance = LARGE_LOSS_TOLERANCE if rounds_more else LOSS_TOLERANCE
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(expected[name].item(), rel=tolerance), name
    # Rounding is in it: the comparison is not of float32 with itself.
    assert any(loss.item() != expected[name].item() for name, loss in losses.items())
    if isinstance(model.roi_heads, TeacherStudentROIHeads):
        first, second = model.roi_heads.pseudo_masks.masks
        assert 0.05 < first.mean() < 0.95 and (first - second).abs().mean() < MASK_TOLERANCE

    # On some CPUs oneDNN leaves gradients of bfloat16 maps of one cell unwritten.
    with torch.backends.mkldnn.flags(enabled="NarrowHourglassMaskHead" not in names):
        sum(losses.values()).backward()
    # Two levels of the pyramid serve nobody here.
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(x.isfinite().all() for x in gradients.values())
    assert {n for n, _ in model.roi_heads.named_parameters(prefix="roi_heads")} <= set(gradients)


@every_method
def test_half_precision_agrees_with_float32(tiny_cfg, tiny_coco, method):
    check_agreement(tiny_cfg(opts=ALL[method], dataset=tiny_coco), tiny_coco)


@needs_gpu
@pytest.mark.parametrize("method", ALL)
def test_half_precision_agrees_on_a_gpu(tiny_cfg, tiny_coco, method):
    opts = [*ALL[method], "MODEL.DEVICE", "cuda"]
    check_agreement(tiny_cfg(opts=opts, dataset=tiny_coco), tiny_coco)


@needs_gpu
@pytest.mark.parametrize("method", QUICK)
def test_training_in_mixed_precision(run_tiny, method):
    opts = [*ALL[method], "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True]
    output = run_tiny(opts=[*opts, "SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()"])
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert lines and all(0 < x["total_loss"] < 100 for x in lines)
    weights = torch.load(output / "model_final.pth", weights_only=False)["model"]
    assert all(x.isfinite().all() for x in weights.values())
