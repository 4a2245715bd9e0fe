"""A GPU gives the losses and masks of the CPU, and finite gradients; skipped without one."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_base_methods import (  # noqa: F401  # dataset_of is the fixture
    EVERY_METHOD,
    batch_of,
    build,
    dataset_of,
    has_mask_head,
    step,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# All proposals and anchors take part: a draw on a GPU is another one than on the CPU.
NO_SAMPLING = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.RPN.POSITIVE_FRACTION", 1.0),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000, "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0),
]
# What still draws at random: the pixels that ContrastMask compares.
DRAWN_LOSSES = {"loss_mask_contrast"}
# A cell whose centre lies on an edge of a mask changes sides with the last bit of its ROI, and Dice
# shows it: 1e-6 of a pixel is 0.11 % of the loss, on the CPU as between CPU and GPU.
TOLERANCE, DICE_TOLERANCE = 1e-3, 5e-3
BOXES = torch.tensor([[4.0, 4, 30, 30], [20, 20, 50, 56], [0, 0, 64, 64]])
CLASSES = torch.tensor([2, 0, 1])


@pytest.fixture(autouse=True)
def exact_convolutions():
    """TF32, the default of convolutions on a GPU, has 10 bits; matrix products do without it."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_losses_are_those_of_the_cpu_and_gradients_finite(
    tiny_cfg, dataset_of, method  # noqa: F811
):
    dataset = dataset_of(method)
    cfg = tiny_cfg(opts=[*EVERY_METHOD[method], *NO_SAMPLING], dataset=dataset)
    batch = batch_of(cfg, dataset)
    model = build(cfg).train()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    expected = step(model, batch)
    on_gpu = build(cfg).cuda().train()
    on_gpu.load_state_dict(start)  # batch norms had moved
    losses = step(on_gpu, batch)
    assert losses.keys() == expected.keys()
    tolerance = DICE_TOLERANCE if "boxinst" in method else TOLERANCE
    for name, loss in losses.items():
        assert loss.is_cuda and loss.isfinite(), name
        if name not in DRAWN_LOSSES:
            value = expected[name].item()
            assert loss.item() == pytest.approx(value, rel=tolerance, abs=1e-5), name
    sum(losses.values()).backward()
    for name, parameter in on_gpu.roi_heads.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@torch.no_grad()
@pytest.mark.parametrize("method", [x for x, opts in EVERY_METHOD.items() if has_mask_head(opts)])
def test_masks_on_given_boxes_are_those_of_the_cpu(tiny_cfg, method):
    cfg = tiny_cfg(opts=EVERY_METHOD[method])
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    inputs = [{"image": image, "height": 64, "width": 64}]
    model = build(cfg).eval()
    probs = []
    for device in ("cpu", "cuda"):
        given = Instances((64, 64), pred_boxes=Boxes(BOXES), pred_classes=CLASSES)
        given = [given.to(device)]
        (found,) = model.to(device).inference(inputs, given, do_postprocess=False)
        assert found.pred_masks.device.type == device and len(found) == 3
        probs.append(found.pred_masks.cpu())
    torch.testing.assert_close(probs[1], probs[0], rtol=1e-3, atol=1e-4)
    assert probs[0].std() > 0


@torch.no_grad()
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_whole_inference_runs(tiny_cfg, method):
    cfg = tiny_cfg(opts=[*EVERY_METHOD[method], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0])
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    (result,) = build(cfg).cuda().eval()([{"image": image, "height": 48, "width": 96}])
    found = result["instances"]
    assert len(found) > 0 and found.pred_masks.shape == (len(found), 48, 96)
    assert found.pred_boxes.tensor.isfinite().all() and found.scores.isfinite().all()
