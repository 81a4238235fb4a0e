"""The stages of a loss, one helper each, that the kernels share; the table of the stages is in docs/formula.md.

m = snap(resample(clamp(mask)));  m = [m > th];  m = 1 - m              the raw mask, stages 0 to 2
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
    """What the code of the stages depends on; a kernel takes one object of a subclass as its only constexpr.

    CODED: sizes and some strides are `coded`. OVERLAPS: see `Hardware`.
    """

    INVERT: bool
    FLOOR: str
    CODED: bool = False
    OVERLAPS: bool = False


class Gates(NamedTuple):
    """Switches of each sample."""

    prior_gate_ptr: torch.Tensor | None  # (B,): bool, or floating in [0, 1]
    mask_gate_ptr: torch.Tensor | None  # (B,) bool

    @classmethod
    def of(cls, call: LossInputs) -> Gates:
        return cls._make(None if gate is None else gate.contiguous() for gate in (call.prior_gate, call.mask_gate))


@triton.jit
def number(value):
    """A mask value as float32, bytes divided by 255, not yet clamped."""
    if value.dtype == tl.uint8:
        value = tl.math.div_rn(value.to(tl.float32), 255.0)
    return value.to(tl.float32)


@triton.jit
def read(value):
    """Reads a mask value, stage 0. `where` and not minimum / maximum: NaN passes through."""
    value = number(value)
    value = tl.where(value > 1.0, 1.0, value)
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def smaller(x, y):
    """The smaller of two numbers, NaN if one is NaN: `minimum` would drop it."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def snapped(m):
    """Values within SNAP of 0 or 1 as 0 or 1."""
    m = tl.where(m <= SNAP, 0.0, m)
    return tl.where(m >= 1.0 - SNAP, 1.0, m)


@triton.jit
def raw_of(m, stages, OPTIONS: tl.constexpr):
    """The raw mask of a resampled one: what comes between the stages 1 and 2, and stage 2."""
    m = snapped(m)
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
    """(w, v): stages 4 to 7. Without a blur, `blurred` is the raw mask."""
    w = blurred
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
