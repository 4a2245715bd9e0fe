"""Exact mean-field inference in a fully connected CRF with two labels, for all ROIs at once."""

from __future__ import annotations

import torch

__all__ = ["mean_field"]

# A kernel value below e^-50 vanishes beside the 1 that every cell has with itself. Left as it is,
# it can be a denormal number, with which a CPU computes twenty times more slowly.
_MIN_EXPONENT = -50.0


@torch.no_grad()
def mean_field(
    probs: torch.Tensor,
    rois: torch.Tensor,
    *,
    num_iters: int = 5,
    gaussian_sxy: float = 3.0,
    gaussian_compat: float = 3.0,
    bilateral_sxy: float = 80.0,
    bilateral_srgb: float = 13.0,
    bilateral_compat: float = 10.0,
    memory_mb: float = 256,
) -> torch.Tensor:
    """
    Mean field of the CRF of Kraehenbuehl and Koltun (2011), all pairs of a ROI's cells written out.

    The unary energies are U = -log(clip(probability, 1e-5, 1)) of the labels 0 and 1. The kernels

        k_g(i, j) = exp(-|xy_i - xy_j|^2 / (2 gaussian_sxy^2)),
        k_b(i, j) = exp(-|xy_i - xy_j|^2 / (2 bilateral_sxy^2)
                        - |rgb_i - rgb_j|^2 / (2 bilateral_srgb^2))

    are normalised, K(i, j) = k(i, j) / sqrt(r_i r_j), r being the sums of k's rows, i = j included.
    With Potts compatibility Q starts as softmax(-U) and becomes, ``num_iters`` times,
    softmax(-U + gaussian_compat K_g Q + bilateral_compat K_b Q).

    Two labels need one channel: for s = Q_1 - Q_0 and h half the difference of the two labels'
    logits, the step is h = (U_0 - U_1 + gaussian_compat K_g s + bilateral_compat K_b s) / 2,
    s = tanh(h), and the probability of label 1 is sigmoid(2 h).

    In float32, whatever the input and autocast are, on the device of the input, without waiting
    for a GPU. The bilateral kernel of a ROI takes 4 (H W)^2 bytes, 2.5 MB at 28 x 28.

    Args:
        probs: shape (R, H, W), probabilities of label 1.
        rois: shape (R, 3, H, W), RGB in 0-255. Differences of whole numbers are exact.
        num_iters: mean-field iterations.
        gaussian_sxy, gaussian_compat: width in cells, and weight, of the position kernel.
        bilateral_sxy, bilateral_srgb, bilateral_compat: widths in cells and in colour values, and
            weight, of the bilateral kernel.
        memory_mb: so many megabytes may the kernels of the ROIs computed together take; one ROI
            is always computed. On a CPU only as many are taken as torch has threads, because the
            kernels should stay in its caches.

    Returns:
        float32, shape (R, H, W), probabilities of label 1, without gradient.
    """
    num_rois, height, width = probs.shape
    num_cells = height * width
    # On CUDA autocast would multiply in half precision.
    with torch.autocast(probs.device.type, enabled=False):
        probs, rois = probs.detach().float(), rois.detach().float()
        unary = (probs.clamp(1e-5, 1).log() - (1 - probs).clamp(1e-5, 1).log()) / 2
        left, right = _bilateral_features(rois, (bilateral_srgb / bilateral_sxy) ** 2)
        chunk = _chunk_size(num_rois, num_cells, memory_mb, probs.device)
        # The kernel of positions is a product of one over rows and one over columns.
        over_rows = gaussian_compat / 2 * _gaussian_kernel(height, gaussian_sxy, probs)
        over_columns = _gaussian_kernel(width, gaussian_sxy, probs)
        buffer = probs.new_empty(chunk, num_cells, num_cells)
        half_logits = []
        for start in range(0, num_rois, chunk):
            part = slice(start, start + chunk)
            # Cells as rows: with the symmetric kernel on the right a CPU is faster.
            unary_part = unary[part].reshape(-1, 1, num_cells)
            num_part = len(unary_part)
            rows = over_rows.expand(num_part, -1, -1)
            columns = over_columns.expand(num_part, -1, -1)
            kernels = buffer[:num_part]
            # With beta 0 what the buffer holds does not matter.
            kernels.baddbmm_(left[part], right[part], beta=0, alpha=-0.5 / bilateral_srgb**2)
            kernels.clamp_(min=_MIN_EXPONENT).exp_()
            norm = kernels.sum(dim=1, keepdim=True).rsqrt_()
            weight = bilateral_compat / 2 * norm
            h = unary_part
            for _ in range(num_iters):
                s = h.tanh()
                h = torch.addcmul(unary_part, weight, torch.bmm(s * norm, kernels))
                smoothed = torch.bmm(rows, s.view(-1, height, width))
                h.view(-1, height, width).baddbmm_(smoothed, columns)
            half_logits.append(h)
        if not half_logits:
            return probs
        return (2 * torch.cat(half_logits)).sigmoid_().view_as(probs)


def _gaussian_kernel(length: int, sxy: float, like: torch.Tensor) -> torch.Tensor:
    """Normalised kernel over a line of cells, shape (length, length)."""
    x = torch.arange(length, device=like.device, dtype=like.dtype)
    exponents = (x[:, None] - x) ** 2 * (-0.5 / sxy**2)
    kernel = exponents.clamp(min=_MIN_EXPONENT).exp()
    norm = kernel.sum(dim=1).rsqrt()
    return kernel * norm * norm[:, None]


def _bilateral_features(
    rois: torch.Tensor, position_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factors of the squared distances |rgb_i - rgb_j|^2 + position_weight |xy_i - xy_j|^2.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a b as one matrix product. It cancels; but whole colours in
    [-128, 127] and the two digits of their |a|^2 to the base 256 have at most 8 bits, so that the
    colours' part is exact in float32, and also where TF32 is allowed for matrix products.

    Args:
        rois: float32, shape (R, 3, H, W), RGB in 0-255.
        position_weight: see above.

    Returns:
        shapes (R, H W, 11) and (R, 11, H W): their product is the distances.
    """
    colors = rois.flatten(2) - 128
    squared = (colors**2).sum(dim=1, keepdim=True)
    high = (squared / 256).floor()
    low = squared - 256 * high

    height, width = rois.shape[-2:]
    # From the centre on, where squares are small and lose less when they cancel.
    axes = [
        torch.arange(n, device=rois.device, dtype=rois.dtype) - (n - 1) / 2 for n in (height, width)
    ]
    grid = torch.stack(torch.meshgrid(axes, indexing="ij")).flatten(1)
    positions = grid.expand(len(rois), -1, -1)
    distances = position_weight * (positions**2).sum(dim=1, keepdim=True)

    one = torch.ones_like(squared)
    left = [-2 * colors, one, one, high, low, -2 * position_weight * positions, one, distances]
    right = [colors, 256 * high, low, 256 * one, one, positions, distances, one]
    return torch.cat(left, dim=1).transpose(1, 2).contiguous(), torch.cat(right, dim=1)


def _chunk_size(num_rois: int, num_cells: int, memory_mb: float, device: torch.device) -> int:
    """How many ROIs are computed together."""
    fitting = int(memory_mb * 1e6 / (4 * num_cells**2)) if num_cells > 0 else num_rois
    if device.type == "cpu":
        fitting = min(fitting, torch.get_num_threads())
    return max(1, min(fitting, num_rois))
