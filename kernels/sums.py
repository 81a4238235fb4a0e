"""Sums that cross programs: partial sums of the weights and of the loss, the factor of a sample, the statistics.

A partial sum is written by one program and read by others, in a fixed order: no float atomics, the same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.kernels.stages import power

if TYPE_CHECKING:
    from masked_loss_triton.call import LossInputs
    from masked_loss_triton.config import MaskedLossConfig

# Planes of the partial sums. The last seven are written only when statistics are asked for.
SUM_W = tl.constexpr(0)
SUM_V = tl.constexpr(1)
SUM_RAW = tl.constexpr(2)
SUM_OVERLAP = tl.constexpr(3)
MIN_RAW = tl.constexpr(4)  # then MAX_RAW, MIN_W, MAX_W, MIN_V, MAX_V
PLANES = 3
PLANES_WITH_STATS = 10

# Columns of the statistics, in the order of MaskedLossStats.
STATS = 14


class Normalization(NamedTuple):
    """The numbers of stage 9; area_scale_beta is None where it is off."""

    eps: float
    area_scale_beta: float | None

    @classmethod
    def of(cls, config: MaskedLossConfig) -> Normalization:
        return cls(config.eps, config.area_scale_beta or None)


class Sample(NamedTuple):
    """What goes into the factor of each sample beside the sums of its weights."""

    weighting_ptr: torch.Tensor | None  # (B,)
    prior_weight_ptr: torch.Tensor | None  # (B,), or None: `prior_weight` for all
    prior_weight: float
    factors_ptr: (
        torch.Tensor | None
    )  # (2, B) float32: the factors themselves, where denominators span more than this batch

    @classmethod
    def of(cls, call: LossInputs, factors: torch.Tensor | None) -> Sample:
        weighting = None if call.weighting is None else call.weighting.contiguous()
        if isinstance(call.prior_weight, torch.Tensor):
            return cls(weighting, call.prior_weight.contiguous(), 0.0, factors)
        return cls(weighting, None, call.prior_weight, factors)


class Outputs(NamedTuple):
    """Where the loss goes, and its statistics if somebody asked for them; None where only the gradient is wanted."""

    terms_ptr: torch.Tensor | None  # (2, programs) float32
    loss_ptr: torch.Tensor | None  # () float32
    stats_ptr: torch.Tensor | None  # (STATS,) float32


@triton.jit
def smaller(x, y):
    """The smaller of two numbers, NaN if one is NaN: `minimum` would drop it."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def plane_sum(partials_ptr, b, tiles, batch, PLANE: tl.constexpr, OPTIONS: tl.constexpr):
    """Sum of one plane of the partial sums: of sample b, or of the whole batch."""
    BLOCK_TILES: tl.constexpr = OPTIONS.BLOCK_TILES
    start = PLANE * batch * tiles
    count = batch * tiles
    if OPTIONS.PER_SAMPLE:
        start += b * tiles
        count = tiles
    total = tl.zeros((BLOCK_TILES,), tl.float32)
    for first in range(0, count, BLOCK_TILES):
        index = first + tl.arange(0, BLOCK_TILES)
        total += tl.load(partials_ptr + start + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def denominator(partials_ptr, tiles, b, batch, channels, elements, eps, PLANE: tl.constexpr, OPTIONS: tl.constexpr):
    """What the weighted errors of sample b are divided by, of one plane of the partial sums."""
    if OPTIONS.NORMALIZATION == "mean":
        return elements
    total = plane_sum(partials_ptr, b, tiles, batch, PLANE, OPTIONS) * channels
    if OPTIONS.NORMALIZATION == "mean_one":
        return total + eps * elements
    else:
        tl.static_assert(OPTIONS.NORMALIZATION == "weighted_mean", "unknown normalization")
        return total + eps


@triton.jit
def factors(partials_ptr, tiles, sample, b, shape, norm, OPTIONS: tl.constexpr, HAS_PRIOR: tl.constexpr):
    """The factors (s, r) of sample b, stage 9, that its weighted errors to target and prior are multiplied by.

    Args:
        partials_ptr: (PLANES, B, tiles). sample: `Sample`. shape: (B, C, F, H, W). norm: `Normalization`.
    """
    batch, channels, frames, height, width = shape
    if sample.factors_ptr is not None:
        return tl.load(sample.factors_ptr + b), tl.load(sample.factors_ptr + batch + b)
    samples = 1.0
    elements = 1.0 * channels * (frames * height * width)
    if OPTIONS.PER_SAMPLE:
        samples = samples * batch
    else:
        elements = elements * batch
    s = 1.0 / (denominator(partials_ptr, tiles, b, batch, channels, elements, norm.eps, SUM_W, OPTIONS) * samples)
    if norm.area_scale_beta is not None:
        sum_raw = plane_sum(partials_ptr, b, tiles, batch, SUM_RAW, OPTIONS)
        s = s * power(sum_raw * channels / elements, norm.area_scale_beta)
    r = 0.0
    if HAS_PRIOR:
        prior_weight = sample.prior_weight
        if sample.prior_weight_ptr is not None:
            prior_weight = tl.load(sample.prior_weight_ptr + b).to(tl.float32)
        below = denominator(partials_ptr, tiles, b, batch, channels, elements, norm.eps, SUM_V, OPTIONS)
        r = prior_weight / (below * samples)
    if sample.weighting_ptr is not None:
        weighting = tl.load(sample.weighting_ptr + b).to(tl.float32)
        s = s * weighting
        r = r * weighting
    return s, r


@triton.jit
def sum_of(values_ptr, count):
    """Sum of `count` numbers that other programs have just written, in a fixed order; one per thread and step, since volatile
    loads are never wider than one number."""
    total = tl.zeros((128,), tl.float32)
    for first in range(0, count, 128):
        index = first + tl.arange(0, 128)
        total += tl.load(values_ptr + index, mask=index < count, other=0.0, volatile=True)
    return tl.sum(total, axis=0)


@triton.jit
def write_weight_stats(partials_ptr, stats_ptr, count, positions, OPTIONS: tl.constexpr):
    """Means, minima and maxima of the raw mask, w and v, and their overlap: columns 3 to 12 of the statistics."""
    BLOCK_TILES: tl.constexpr = OPTIONS.BLOCK_TILES
    for plane in tl.static_range(10):
        source_ptr = partials_ptr + plane * count
        if plane < MIN_RAW:
            result = tl.zeros((BLOCK_TILES,), tl.float32)
            for first in range(0, count, BLOCK_TILES):
                index = first + tl.arange(0, BLOCK_TILES)
                result += tl.load(source_ptr + index, mask=index < count, other=0.0)
            value = tl.sum(result, axis=0) / positions
        else:
            # Maxima are minima of the negated values: `smaller` keeps NaN.
            sign = 1.0 - 2.0 * ((plane - MIN_RAW) % 2)
            result = tl.full((BLOCK_TILES,), float("inf"), tl.float32)
            for first in range(0, count, BLOCK_TILES):
                index = first + tl.arange(0, BLOCK_TILES)
                item = tl.load(source_ptr + index, mask=index < count, other=0.0)
                result = smaller(result, tl.where(index < count, item * sign, float("inf")))
            value = tl.reduce(result, 0, smaller) * sign
        if plane == SUM_RAW:
            column = 3
        elif plane == SUM_W:
            column = 6
        elif plane == SUM_V:
            column = 9
        elif plane == SUM_OVERLAP:
            column = 12
        else:
            column = 4 + (plane - MIN_RAW) // 2 * 3 + (plane - MIN_RAW) % 2
        tl.store(stats_ptr + column, value)


@triton.jit
def write_loss(out, weights, target_sum, prior_sum, b, shape, tiles, OPTIONS: tl.constexpr):
    """Writes the sums of this program; the last program to do so adds all of them, always in the same order.

    Args:
        out: `Outputs`. weights: `MaskWeights`. shape: (B, C, F, H, W). tiles: of the partial sums of the weights.
    """
    batch, _channels, frames, height, width = shape
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out.terms_ptr + program, target_sum)
    tl.store(out.terms_ptr + programs + program, prior_sum)
    # The barrier orders the stores of all threads before the release of the one that takes the ticket.
    tl.debug_barrier()
    if tl.atomic_add(weights.ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        target_term = sum_of(out.terms_ptr, programs)
        prior_term = sum_of(out.terms_ptr + programs, programs)
        loss = target_term + prior_term
        tl.store(out.loss_ptr, loss)
        if out.stats_ptr is not None:
            tl.store(out.stats_ptr, loss)
            tl.store(out.stats_ptr + 1, target_term)
            tl.store(out.stats_ptr + 2, prior_term)
            positions = 1.0 * batch * (frames * height * width)
            write_weight_stats(weights.partials_ptr, out.stats_ptr, batch * tiles, positions, OPTIONS)
            tl.store(out.stats_ptr + 13, prior_term / tl.where(loss == 0.0, 1.0, loss))
