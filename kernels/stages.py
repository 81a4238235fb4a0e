"""The stages of a loss, one helper each, that the kernels share; the table of the stages is in docs/formula.md.

m = resample(clamp(mask));  m = [m > th];  m = 1 - m                    the raw mask, stages 0 to 2
w = floor(snap(blur(m)) ** gamma);  v = 1 - w  or  [m < th]             the weights, stages 3 to 7
rho(d), rho'(d)                                                         the error, stage 8
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from masked_loss_triton.call import LossInputs
    from masked_loss_triton.config import MaskedLossConfig

# Values within this of 0 or 1 become 0 or 1: rounding must not create a region.
SNAP = tl.constexpr(1e-6)


class Stages(NamedTuple):
    """The numbers of the stages; None where a stage is off."""

    binarize: float | None
    gamma: float | None
    min_weight: float
    prior_threshold: float | None

    @classmethod
    def of(cls, config: MaskedLossConfig) -> Stages:
        gamma = None if config.gamma == 1 else config.gamma
        return cls(config.binarize, gamma, config.min_weight, config.prior_threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What the code of the stages depends on; a kernel takes one object of a subclass as its only constexpr."""

    INVERT: bool
    FLOOR: str


class Gates(NamedTuple):
    """Switches of each sample."""

    prior_gate_ptr: torch.Tensor | None  # (B,): bool, or floating in [0, 1]
    mask_gate_ptr: torch.Tensor | None  # (B,) bool

    @classmethod
    def of(cls, call: LossInputs) -> Gates:
        return cls._make(None if gate is None else gate.contiguous() for gate in (call.prior_gate, call.mask_gate))


class Resampling(NamedTuple):
    """The mask on its way to the grid of the loss: sizes, strides, taps and scales. The stride `b` is divided by DIVISOR."""

    frames: int
    height: int
    width: int
    b: int
    f: int
    h: int
    w: int
    taps_f: int
    taps_h: int
    taps_w: int
    scale_h: float
    scale_w: float


@triton.jit
def read(value):
    """Reads a mask value, stage 0. `where` and not minimum / maximum: NaN passes through."""
    if value.dtype == tl.uint8:
        value = tl.math.div_rn(value.to(tl.float32), 255.0)
    value = value.to(tl.float32)
    value = tl.where(value > 1.0, 1.0, value)
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def area_window(index, size_in, size_out):
    """The inputs that one output averages: start and count."""
    start = index * size_in // size_out
    end = ((index + 1) * size_in + size_out - 1) // size_out
    return start, end - start


@triton.jit
def linear_window(index, size_in, size_out):
    """First input and position t in [0, 1) behind it, in exact integer arithmetic: source = (index + 1/2) in / out - 1/2.

    In float32 that formula is off by up to 1e-4 at a few thousand positions.
    """
    numerator = (2 * index + 1) * size_in - size_out
    first = (numerator + 2 * size_out) // (2 * size_out) - 1  # rounds down also below 0, where // would round up
    rest = numerator - first * 2 * size_out
    return first, tl.math.div_rn(rest.to(tl.float32), (2 * size_out + 0 * index).to(tl.float32))


@triton.jit
def cubic_near(t):
    """Keys' kernel with a = -0.75 for a distance in [0, 1]."""
    return ((1.25 * t - 2.25) * t) * t + 1.0


@triton.jit
def cubic_far(t):
    """Keys' kernel with a = -0.75 for a distance in [1, 2]."""
    return ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0


@triton.jit
def tap(window_start, window_count, t, k, size_in, OPTIONS: tl.constexpr):
    """Index and coefficient of tap k on one axis. For "area" the coefficient is 1 inside the window and 0 outside."""
    if OPTIONS.MODE == "bilinear":
        # Below the first centre and behind the last one the border counts alone.
        index = tl.minimum(tl.maximum(window_start + k, 0), size_in - 1)
        return index, tl.where(k == 0, 1.0 - t, t)
    elif OPTIONS.MODE == "bicubic":
        index = tl.minimum(tl.maximum(window_start - 1 + k, 0), size_in - 1)
        near = tl.where(k == 1, cubic_near(t), cubic_near(1.0 - t))
        far = tl.where(k == 0, cubic_far(t + 1.0), cubic_far(2.0 - t))
        return index, tl.where((k == 1) | (k == 2), near, far)
    else:
        tl.static_assert(
            OPTIONS.MODE == "area" or OPTIONS.MODE == "nearest" or OPTIONS.MODE == "nearest-exact",
            "unknown way to resample",
        )
        inside = k < window_count
        return tl.where(inside, window_start + k, 0), tl.where(inside, 1.0, 0.0)


@triton.jit
def axis_window(index, size_in, size_out, scale, OPTIONS: tl.constexpr):
    """Start, count and fraction of the taps of one spatial axis."""
    if OPTIONS.MODE == "nearest":
        # torch multiplies by a rounded float32 scale, and so does this, to land on the same input.
        start = (index.to(tl.float32) * scale).to(tl.int32)
        return tl.minimum(start, size_in - 1), 1 + 0 * index, 0.0 * index.to(tl.float32)
    elif OPTIONS.MODE == "nearest-exact":
        start = ((index.to(tl.float32) + 0.5) * scale).to(tl.int32)
        return tl.minimum(start, size_in - 1), 1 + 0 * index, 0.0 * index.to(tl.float32)
    elif OPTIONS.MODE == "area":
        start, count = area_window(index, size_in, size_out)
        return start, count, 0.0 * index.to(tl.float32)
    else:
        tl.static_assert(OPTIONS.MODE == "bilinear" or OPTIONS.MODE == "bicubic", "unknown way to resample")
        start, t = linear_window(index, size_in, size_out)
        return start, 1 + 0 * index, t


@triton.jit
def resampled(mask_ptr, at, valid, grid, how, OPTIONS: tl.constexpr):
    """The mask at the positions of the loss, stages 0 and 1. Each mask value is read once per position that averages it.

    Rows, columns and frames are summed separately: the rounding error grows with each sum's own length.

    Args:
        mask_ptr: at the sample. at: (frame, row, column). grid: (F, H, W) of the loss. how: `Resampling`.
    """
    f_start, f_count = area_window(at[0], how.frames, grid[0])
    h_start, h_count, h_t = axis_window(at[1], how.height, grid[1], how.scale_h, OPTIONS)
    w_start, w_count, w_t = axis_window(at[2], how.width, grid[2], how.scale_w, OPTIONS)
    total = tl.zeros(at[0].shape, tl.float32)
    for kf in range(how.taps_f):
        in_time = kf < f_count
        of_frame = tl.zeros(at[0].shape, tl.float32)
        for kh in range(how.taps_h):
            h_index, h_coefficient = tap(h_start, h_count, h_t, kh, how.height, OPTIONS)
            of_row = tl.zeros(at[0].shape, tl.float32)
            for kw in range(how.taps_w):
                w_index, w_coefficient = tap(w_start, w_count, w_t, kw, how.width, OPTIONS)
                offsets = (
                    (f_start + kf).to(tl.int64) * how.f + h_index.to(tl.int64) * how.h + w_index.to(tl.int64) * how.w
                )
                wanted = valid & in_time
                if OPTIONS.MODE == "area":
                    wanted = wanted & (kh < h_count) & (kw < w_count)
                value = read(tl.load(mask_ptr + offsets, mask=wanted, other=0))
                if OPTIONS.MODE == "bilinear" or OPTIONS.MODE == "bicubic":
                    value = value * w_coefficient
                of_row += value
            if OPTIONS.MODE == "bilinear" or OPTIONS.MODE == "bicubic":
                of_row = of_row * h_coefficient
            of_frame += of_row
        if OPTIONS.MODE == "bicubic":
            of_frame = tl.where(of_frame > 1.0, 1.0, of_frame)
            of_frame = tl.where(of_frame < 0.0, 0.0, of_frame)
        total += of_frame
    count = f_count
    if OPTIONS.MODE == "area":
        count = count * h_count * w_count
    return tl.math.div_rn(total, count.to(tl.float32))


@triton.jit
def averaged(mask_ptr, at, valid, grid, how, OPTIONS: tl.constexpr):
    """`resampled` by area where every position covers WINDOW_H x WINDOW_W mask values exactly and rows are runs of memory.

    A row of a window is read at once: neighbours read neighbouring windows, and no sector is asked for twice.
    """
    f_start, f_count = area_window(at[0], how.frames, grid[0])
    tap_w = tl.arange(0, OPTIONS.WINDOW_W)[None, :]
    total = tl.zeros(at[0].shape, tl.float32)
    for kf in range(how.taps_f):
        wanted = (valid & (kf < f_count))[:, None]
        first = (f_start + kf).to(tl.int64) * how.f + (at[1] * OPTIONS.WINDOW_H).to(tl.int64) * how.h
        offsets = (first + at[2] * OPTIONS.WINDOW_W)[:, None] + tap_w
        of_frame = tl.zeros(at[0].shape, tl.float32)
        for _ in range(OPTIONS.WINDOW_H):
            value = tl.load(mask_ptr + offsets, mask=wanted, other=0)
            # Bytes are summed as they are, exactly, and divided by 255 once.
            of_frame += tl.sum(value.to(tl.float32) if value.dtype == tl.uint8 else read(value), axis=1)
            offsets += how.h
        total += of_frame
    count = f_count * (OPTIONS.WINDOW_H * OPTIONS.WINDOW_W)
    return tl.math.div_rn(total, (count * 255 if mask_ptr.dtype.element_ty == tl.uint8 else count).to(tl.float32))


@triton.jit
def raw_mask(mask_ptr, position, valid, grid, how, stages, OPTIONS: tl.constexpr):
    """The raw mask, stages 0 to 2. FLAT, a mask that is one run on the grid, needs no windows and no divisions."""
    at = split_position(position, grid[1], grid[2])
    if OPTIONS.FLAT:
        m = read(tl.load(mask_ptr + position, mask=valid, other=0))
    elif OPTIONS.WINDOW_W > 1:
        m = averaged(mask_ptr, at, valid, grid, how, OPTIONS)
    else:
        m = resampled(mask_ptr, at, valid, grid, how, OPTIONS)
    return binarized_and_inverted(m, stages, OPTIONS)


@triton.jit
def binarized_and_inverted(m, stages, OPTIONS: tl.constexpr):
    """The raw mask after the end of stage 1 and stage 2."""
    if stages.binarize is not None:
        m = tl.where(m > stages.binarize, 1.0, 0.0)
    if OPTIONS.INVERT:
        m = 1.0 - m
    return m


@triton.jit
def gaussian_tap(distance, exponent, norm):
    """The weight of a neighbour in the blur, stage 3; computed, since a tensor of taps would have to come from the host."""
    return norm * tl.exp2(exponent * (distance * distance))


@triton.jit
def power(x, exponent):
    """x ** exponent for x >= 0; NaN stays NaN."""
    result = tl.exp2(exponent * tl.log2(tl.where(x > 0.0, x, 1.0)))
    return tl.where(x > 0.0, result, x)


@triton.jit
def target_and_prior_weight(
    raw, blurred, prior_gate, mask_gate, stages, OPTIONS: tl.constexpr, HAS_PRIOR: tl.constexpr
):
    """(w, v): stages 4 to 7, the snap before them included."""
    w = tl.where(blurred <= SNAP, 0.0, blurred)
    w = tl.where(w >= 1.0 - SNAP, 1.0, w)
    if stages.gamma is not None:
        w = power(w, stages.gamma)
    if OPTIONS.FLOOR == "affine":
        w = w * (1.0 - stages.min_weight) + stages.min_weight
    else:
        tl.static_assert(OPTIONS.FLOOR == "clamp", "unknown floor")
        w = tl.where(w < stages.min_weight, stages.min_weight, w)
    v = tl.zeros_like(w)
    if HAS_PRIOR:
        if stages.prior_threshold is None:
            v = (1.0 - w) * prior_gate
        else:
            v = tl.where(raw < stages.prior_threshold, 1.0, 0.0) * prior_gate
            w = w * (1.0 - v)
    v = tl.where(v <= SNAP, 0.0, v)
    return tl.where(mask_gate, w, 1.0), tl.where(mask_gate, v, 0.0)


@triton.jit
def split_position(position, height, width):
    """(frame, row, column) of a flat position."""
    column = position % width
    rest = position // width
    return rest // height, rest % height, column


@triton.jit
def sample_gates(gates, b):
    """(prior gate, mask gate) of sample b; 1.0 and True where there is none."""
    prior_gate = 1.0
    mask_gate = True
    if gates.prior_gate_ptr is not None:
        prior_gate = tl.load(gates.prior_gate_ptr + b).to(tl.float32)
    if gates.mask_gate_ptr is not None:
        mask_gate = tl.load(gates.mask_gate_ptr + b) != 0
    return prior_gate, mask_gate


@triton.jit
def error_and_slope(d, delta, OPTIONS: tl.constexpr):
    """(rho(d), rho'(d)), stage 8, as in backend/formulas.py, written so that rho shares the work of rho'."""
    if OPTIONS.LOSS_TYPE == "mse":
        return d * d, 2.0 * d
    elif OPTIONS.LOSS_TYPE == "l1":
        return tl.abs(d), tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    elif OPTIONS.LOSS_TYPE == "huber":
        slope = tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))
        return slope * (d - 0.5 * slope), slope
    elif OPTIONS.LOSS_TYPE == "smooth_l1":
        scaled = d / delta
        slope = tl.where(scaled > 1.0, 1.0, tl.where(scaled < -1.0, -1.0, scaled))
        return slope * (d - 0.5 * delta * slope), slope
    else:
        tl.static_assert(OPTIONS.LOSS_TYPE == "pseudo_huber", "unknown kind of loss")
        root = tl.sqrt_rn(1.0 + (d / delta) * (d / delta))
        # delta^2 (root - 1), without the digits that the difference would lose where d is small.
        return d * (d / (root + 1.0)), d / root
