"""From a mask to weights, in plain torch: stages 0 to 7 of docs/formula.md, shared by the reference and the torch backend.

    m = clamp(mask)  ->  resample  ->  binarize  ->  invert  ->  blur  ->  gamma  ->  floor  =  w;   v = the prior's region

Runs in the dtype it is asked for, float32 or float64, and is differentiable. The Triton kernels are written anew from the same
formulas (kernels/stages.py) and compared with this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from masked_loss_triton.backend.formulas import unknown
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig

# Rounding must not create a region: float32 noise in 1 - w, divided by its own sum, would become a loss of order 1.
SNAP = 1e-6

# Stage 5, by the word of the config.
FLOORS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "affine": lambda w, least: w * (1 - least) + least,
    "clamp": lambda w, least: w.clamp(min=least),
}


def read(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stage 0: any accepted mask as numbers in [0, 1] of `dtype`; NaN stays NaN."""
    if mask.dtype == torch.uint8:
        return mask.to(dtype) / 255
    return mask.to(dtype).clamp(0, 1)


def resample(mask: torch.Tensor, grid: tuple[int, int, int], mode: str) -> torch.Tensor:
    """Stage 1: (B, Fm, Hm, Wm) to (B, F, H, W): space by `mode`, then time as it is, repeated, or averaged by area."""
    frames, height, width = grid
    if mask.shape[2:] != (height, width):
        options = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
        mask = F.interpolate(mask, size=(height, width), mode=mode, **options)
        if mode == "bicubic":
            mask = mask.clamp(0, 1)  # its taps overshoot
    if mask.shape[1] == frames:
        return mask
    if mask.shape[1] == 1:
        return mask.expand(-1, frames, -1, -1)
    return F.adaptive_avg_pool3d(mask.unsqueeze(1), (frames, height, width)).squeeze(1)


def gaussian_taps(kernel_size: int) -> list[float]:
    """The normalised taps of the blur: sigma = 0.3 ((k - 1) / 2 - 1) + 0.8, as OpenCV chooses it from a kernel size."""
    sigma = 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8
    taps = [math.exp(-((i - kernel_size // 2) ** 2) / (2 * sigma**2)) for i in range(kernel_size)]
    return [tap / math.fsum(taps) for tap in taps]


def blur(mask: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Stage 3: a Gaussian over height and width with replicated borders.

    A sum of shifted slices and not a convolution: cuDNN would compute that in TF32.
    """
    radius = kernel_size // 2
    _, _, height, width = mask.shape
    taps = gaussian_taps(kernel_size)
    rows = F.pad(mask, (0, 0, radius, radius), mode="replicate")
    mask = sum((tap * rows[:, :, i : i + height] for i, tap in enumerate(taps)), torch.zeros_like(mask))
    columns = F.pad(mask, (radius, radius, 0, 0), mode="replicate")
    return sum((tap * columns[:, :, :, i : i + width] for i, tap in enumerate(taps)), torch.zeros_like(mask))


def snap(mask: torch.Tensor) -> torch.Tensor:
    """Values within 1e-6 of 0 or 1 become 0 or 1; NaN stays NaN.

    `threshold` and not `where`, which is not vectorised on the CPU (bench/README.md).
    """
    mask = torch.threshold(mask, SNAP, 0.0).neg_()  # a tensor of its own from here: in place, no fresh memory
    return torch.threshold_(mask, SNAP - 1, -1.0).neg_()


def raw_mask(
    mask: torch.Tensor | None,
    grid: tuple[int, int, int],
    config: MaskedLossConfig,
    like: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Stages 0 to 2: the mask at the size of the loss, (B or 1, F, H, W), inverted if asked, not yet blurred."""
    if mask is None:
        return torch.ones((1, *grid), dtype=dtype, device=like.device)
    m = snap(resample(read(mask, dtype), grid, config.resample))
    if config.binarize is not None:
        # The threshold is one of float32 in every backend, also where the mask is float64.
        m = (m.float() > config.binarize).to(dtype)
    return 1 - m if config.invert else m


def target_and_prior_weights(
    raw: torch.Tensor,
    config: MaskedLossConfig,
    prior_gate: torch.Tensor | None,
    mask_gate: torch.Tensor | None,
    has_prior: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stages 3 to 7: (w, v) from the raw mask, each (B or 1, F, H, W); B as soon as there is a gate.

    Without a prior its region is empty, and takes nothing from the target.
    """
    w = snap(blur(raw, config.blur_kernel_size)) if config.blur_kernel_size > 1 else raw
    if config.gamma != 1:
        w = w**config.gamma
    if config.floor not in FLOORS:
        raise unknown("floor", config.floor)
    if config.min_weight:
        w = FLOORS[config.floor](w, config.min_weight)

    if not has_prior:
        v = w.new_zeros(()).expand(w.shape)
    elif config.prior_threshold is None:
        v = 1 - w
    else:
        v = (raw.float() < config.prior_threshold).to(w.dtype)
    if prior_gate is not None and has_prior:
        v = v * prior_gate.to(w.dtype).view(-1, 1, 1, 1)
    if has_prior and config.prior_threshold is not None:
        w = w * (1 - v)
    if has_prior:
        v = torch.threshold(v, SNAP, 0.0)

    if mask_gate is not None:
        on = mask_gate.view(-1, 1, 1, 1)
        w = torch.where(on, w, torch.ones_like(w))
        v = torch.where(on, v, torch.zeros_like(v))
    return w, v


def mean_errors(
    sums: Sequence[torch.Tensor], inside: torch.Tensor, copies: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(error_inside, error_outside, drift_inside, drift_outside) of the stats; 0 where there is no such place.

    Args:
        sums: of the plain errors in that order, 0-d. inside: the raw mask, (B or 1, ...).
        copies: how many elements of the loss a value of a whole batch's `inside` stands for: samples times channels.
    """
    counts = [where.sum() * (copies / len(where)) for where in (inside, 1 - inside)]
    counts = [torch.where(count == 0, torch.ones_like(count), count) for count in counts]
    means = [total / count for total, count in zip(sums, counts * 2, strict=True)]
    return means[0], means[1], means[2], means[3]


def call_weights(
    inputs: LossInputs, config: MaskedLossConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(raw, w, v) of one call, each (B or 1, F, H, W)."""
    raw = raw_mask(inputs.mask, inputs.grid, config, inputs.pred, dtype)
    w, v = target_and_prior_weights(raw, config, inputs.prior_gate, inputs.mask_gate, inputs.prior is not None)
    if inputs.mask_gate is not None:
        # A sample whose mask is off counts as fully covered, also for area_scale_beta.
        raw = torch.where(inputs.mask_gate.view(-1, 1, 1, 1), raw, torch.ones_like(raw))
    if inputs.patches is not None:
        raw, w, v = (in_patches(x, inputs.patches) for x in (raw, w, v))
    return raw, w, v


def in_patches(weights: torch.Tensor, patches: tuple[int, int]) -> torch.Tensor:
    """(B, 1, 2 rows, 2 columns) in the order of packed tokens, (B, 1, rows * columns, 4)."""
    rows, columns = patches
    cells = weights.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))
    return cells.transpose(3, 4).reshape(len(weights), 1, rows * columns, 4)
