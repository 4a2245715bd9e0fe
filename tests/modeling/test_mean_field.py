"""The mean field against the equations written out with two labels in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from teacher_student_mask.modeling.mean_field import mean_field

TINY = torch.finfo(torch.float32).tiny


def reference(
    prob, rgb, iters=5, gaussian=(3.0, 3.0), bilateral_sxy=80.0, bilateral=(13.0, 10.0), floor=1e-5
):
    """One ROI, (H, W) and (3, H, W); ``gaussian`` and ``bilateral`` are (width, weight)."""
    prob, rgb = np.asarray(prob, float), np.asarray(rgb, float)
    height, width = prob.shape
    cells = [(y, x) for y in range(height) for x in range(width)]
    n = len(cells)
    position, color = np.zeros((n, n)), np.zeros((n, n))
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            position[i, j] = (x - u) ** 2 + (y - v) ** 2
            color[i, j] = sum((rgb[c, y, x] - rgb[c, v, u]) ** 2 for c in range(3))
    kernels = [
        (gaussian[1], np.exp(-position / (2 * gaussian[0] ** 2))),
        (
            bilateral[1],
            np.exp(-position / (2 * bilateral_sxy**2) - color / (2 * bilateral[0] ** 2)),
        ),
    ]
    labels = np.stack([1 - prob.ravel(), prob.ravel()])
    unary = -np.log(np.clip(labels, floor, 1))

    def softmax(logits):
        e = np.exp(logits - logits.max(axis=0))
        return e / e.sum(axis=0)

    q = softmax(-unary)
    for _ in range(iters):
        logits = -unary
        for weight, kernel in kernels:
            rows = kernel.sum(axis=1)
            logits = logits + weight * q @ (kernel / np.sqrt(np.outer(rows, rows)))
        q = softmax(logits)
    return q[1].reshape(height, width)


def draw(seed, num_rois, height, width):
    """Probabilities, and smooth colours with whole values from 0 to 255."""
    rng = np.random.default_rng(seed)
    probs = torch.tensor(rng.uniform(0, 1, (num_rois, height, width)), dtype=torch.float32)
    ends = rng.integers(0, 256, (2, num_rois, 3, 1, 1))
    steps = np.linspace(0, 1, height * width).reshape(height, width)
    colors = ends[0] * steps + ends[1] * (1 - steps) + rng.normal(0, 10, (num_rois, 3, 1, width))
    return probs, torch.tensor(colors.round().clip(0, 255), dtype=torch.float32)


def assert_close(actual, expected, atol=2e-4):
    # Iterations multiply the rounding of float32, and CPUs round differently: up to 1e-5 on an
    # Intel Xeon, 5e-5 on an AMD EPYC. A weight or width that is wrong by 3 % makes 3e-4 to 8e-4.
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("height, width", [(6, 7), (8, 8), (9, 4), (1, 5), (1, 1)])
@pytest.mark.parametrize("iters", [0, 1, 5])
def test_equations(height, width, iters):
    probs, rois = draw(0, 3, height, width)
    refined = mean_field(probs, rois, num_iters=iters)
    expected = [reference(p, rgb, iters) for p, rgb in zip(probs, rois)]
    assert refined.shape == probs.shape and refined.dtype == torch.float32
    assert_close(refined, expected)
    if iters == 5 and height > 1:
        # Neither of the kernels does nothing here.
        assert (
            np.abs(reference(probs[0], rois[0], 5, gaussian=(3.0, 0.0)) - expected[0]).max() > 0.01
        )
        assert np.abs(reference(probs[0], rois[0], 5, bilateral=(13, 0)) - expected[0]).max() > 0.01


def test_every_setting_reaches_its_place():
    probs, rois = draw(1, 2, 6, 7)
    refined = mean_field(
        probs,
        rois,
        num_iters=3,
        gaussian_sxy=1.3,
        gaussian_compat=0.7,
        bilateral_sxy=2.1,
        bilateral_srgb=31.0,
        bilateral_compat=1.9,
    )
    expected = [reference(p, rgb, 3, (1.3, 0.7), 2.1, (31.0, 1.9)) for p, rgb in zip(probs, rois)]
    assert_close(refined, expected)


def test_colors_that_are_not_whole():
    probs, rois = draw(2, 2, 6, 7)
    rois = (rois + 0.37).clamp(max=255)
    # Their distances lose some digits.
    expected = [reference(p, rgb) for p, rgb in zip(probs, rois)]
    assert_close(mean_field(probs, rois), expected)


def test_one_color_leaves_the_positions():
    probs, _ = draw(3, 1, 6, 7)
    for value in (0, 77, 255):
        rois = torch.full((1, 3, 6, 7), float(value))
        assert_close(mean_field(probs, rois)[0], reference(probs[0], rois[0]))


def test_probabilities_of_exactly_zero_and_one():
    _, rois = draw(4, 3, 6, 7)
    probs = torch.zeros(3, 6, 7)
    probs[1] = 1
    probs[2, :, :3] = 1
    refined = mean_field(probs, rois)
    assert refined.isfinite().all()
    assert_close(refined, [reference(p, rgb) for p, rgb in zip(probs, rois)])
    assert refined[0].max() < 1e-5 and refined[1].min() > 1 - 1e-5
    # Eq. of the unary: clipped at 1e-5.
    np.testing.assert_allclose(mean_field(probs, rois, num_iters=0)[0], 1e-5, rtol=1e-3)


def test_black_and_white():
    probs, _ = draw(5, 1, 8, 8)
    squares = (torch.arange(8)[:, None] // 2 + torch.arange(8) // 2) % 2
    rois = (255.0 * squares).expand(1, 3, 8, 8)
    assert_close(mean_field(probs, rois)[0], reference(probs[0], rois[0]))


def test_no_roi():
    refined = mean_field(torch.zeros(0, 8, 8), torch.zeros(0, 3, 8, 8))
    assert refined.shape == (0, 8, 8) and refined.dtype == torch.float32


class Recorder(TorchDispatchMode):
    """Remembers name, arguments and result of every operation."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What operations in place overwrite is copied.
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        result = func(*args, **(kwargs or {}))
        copy = result.clone() if isinstance(result, torch.Tensor) else result
        self.calls.append((func.overloadpacket.__name__, before, copy))
        return result

    def num_kernels(self):
        """How many kernels of 8 x 8 cells each of the new tensors holds."""
        created = [x for name, _, x in self.calls if name in ("new_empty", "empty", "bmm", "exp")]
        return [len(x) for x in created if x.shape[1:] == (64, 64)]


def record(*args, **kwargs):
    with Recorder() as recorder:
        mean_field(*args, **kwargs)
    return recorder


def test_nothing_waits_for_a_gpu():
    names = {name for name, _, _ in record(*draw(0, 3, 8, 8)).calls}
    assert "bmm" in names
    waiting = {"_local_scalar_dense", "nonzero", "index", "masked_select", "is_nonzero", "equal"}
    assert not names & (waiting | {"item", "_to_copy", "lift_fresh"})


def test_no_denormal_numbers():
    """Bug: exp of the distance between black and white made them, 20 times slower on a CPU."""
    probs, rois = draw(6, 2, 8, 8)
    # Exponents from 0 to -577, those of denormal numbers (-87 to -103) among them.
    rois[:] = torch.linspace(0, 255, 64).round().view(8, 8)
    kernels = [x for name, _, x in record(probs, rois).calls if name in ("exp", "exp_")]
    assert any(x.shape == (2, 64, 64) or x.shape == (1, 64, 64) for x in kernels)
    assert min(float(x[x != 0].min()) for x in kernels) >= TINY
    assert_close(mean_field(probs, rois), [reference(p, rgb) for p, rgb in zip(probs, rois)])


def to_eight_bits(x):
    """Round to 8 significant bits, as bfloat16 has; TF32 has 11."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.round(mantissa * 2**8) / 2**8 * 2.0**exponent


def test_distances_of_colors_are_exact_even_in_tf32():
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (3, 8, 8))
    colors[:, 0, :2], colors[:, 1, :2] = 0, 255
    rois = torch.tensor(colors[None], dtype=torch.float32)
    # Such a wide kernel leaves the positions out.
    calls = record(torch.rand(1, 8, 8), rois, bilateral_sxy=1e9).calls
    ((_, left, right),) = [args for name, args, _ in calls if name == "baddbmm_"][:1]
    flat = colors.reshape(3, -1).astype(np.int64)
    expected = ((flat[:, :, None] - flat[:, None]) ** 2).sum(axis=0)
    for rounded in (np.float64, to_eight_bits):
        distances = rounded(left[0].numpy()) @ rounded(right[0].numpy())
        assert np.abs(distances - expected).max() < 1e-6


def test_batch_and_chunks_change_nothing(monkeypatch):
    probs, rois = draw(7, 11, 8, 8)
    single = torch.cat([mean_field(p[None], rgb[None]) for p, rgb in zip(probs, rois)])
    for threads in (1, 2, 4, 100):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        for memory_mb in (0, 0.05, 256):
            assert_close(mean_field(probs, rois, memory_mb=memory_mb), single, 1e-6)


@pytest.mark.parametrize("memory_mb, expected", [(0.0, 1), (0.05, 3), (256, 11)])
def test_memory_budget(monkeypatch, memory_mb, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100)
    # A kernel of 8 x 8 cells is 64^2 numbers of 4 bytes, 16.4 kB.
    recorder = record(*draw(7, 11, 8, 8), memory_mb=memory_mb)
    assert recorder.num_kernels() == [expected]


def test_a_cpu_takes_as_many_rois_as_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert record(*draw(7, 11, 8, 8)).num_kernels() == [2]


inputs = st.tuples(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)
).map(lambda x: draw(*x))
fast = settings(max_examples=30, deadline=None)


@fast
@given(inputs, st.data())
def test_order_of_rois_is_kept(inputs, data):
    probs, rois = inputs
    order = data.draw(st.permutations(range(len(probs))))
    assert_close(mean_field(probs[order], rois[order]), mean_field(probs, rois)[order])


@fast
@given(inputs, st.sampled_from([(-1,), (-2,), (-1, -2), "transpose"]))
def test_flipped_rois_give_flipped_masks(inputs, dims):
    def move(x):
        return x.transpose(-1, -2) if dims == "transpose" else x.flip(dims)

    probs, rois = inputs
    assert_close(mean_field(move(probs), move(rois)), move(mean_field(probs, rois)), 1e-3)


@fast
@given(inputs)
def test_labels_are_treated_alike(inputs):
    probs, rois = inputs
    # Rounding, which some inputs multiply: of 11,735 random ones the worst was 2.4e-3, one other
    # above 1.2e-3.
    assert_close(mean_field(1 - probs, rois), 1 - mean_field(probs, rois), 1e-2)
    # And so are the three channels, and light and dark.
    assert_close(mean_field(probs, rois.flip(1)), mean_field(probs, rois), 1e-2)
    assert_close(mean_field(probs, 255 - rois), mean_field(probs, rois), 1e-2)


def test_no_gradient_and_inputs_stay():
    probs, rois = draw(8, 2, 8, 8)
    copies = probs.clone(), rois.clone()
    refined = mean_field(probs.requires_grad_(), rois.requires_grad_())
    assert not refined.requires_grad and refined.grad_fn is None
    assert torch.equal(probs, copies[0]) and torch.equal(rois, copies[1])
    with torch.inference_mode():
        assert torch.equal(mean_field(probs, rois), refined)


def test_no_iteration_shares_no_memory():
    probs, rois = draw(8, 2, 8, 8)
    refined = mean_field(probs, rois, num_iters=0)
    refined += 1
    assert probs.max() <= 1


def test_float32_under_autocast():
    probs, rois = draw(9, 2, 8, 8)
    expected = mean_field(probs, rois)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (probs @ probs).dtype == torch.bfloat16
        assert torch.equal(mean_field(probs, rois), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    probs, rois = (x.to(dtype) for x in draw(10, 2, 8, 8))
    refined = mean_field(probs, rois)
    assert refined.dtype == torch.float32
    assert torch.equal(refined, mean_field(probs.float(), rois.float()))


def test_memory_layout_does_not_matter():
    probs, rois = draw(11, 4, 8, 8)
    expected = mean_field(probs[::2], rois[::2])
    strided = probs.mT.contiguous().mT[::2]
    channels_last = rois.contiguous(memory_format=torch.channels_last)[::2]
    assert not strided.is_contiguous() and not channels_last.is_contiguous()
    assert torch.equal(mean_field(strided, channels_last), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_without_waiting():
    probs, rois = draw(12, 40, 14, 14)
    expected = mean_field(probs, rois)
    on_gpu = probs.cuda(), rois.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda"):
            refined = mean_field(*on_gpu, memory_mb=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert refined.is_cuda and refined.dtype == torch.float32
    assert_close(refined.cpu(), expected, 1e-4)
