"""Sums that cross programs: partial sums of the weights and of the loss, the factor of a sample, the statistics.

A partial sum is written by one program and read by others, in a fixed order: no float atomics, the same bits every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.kernels.stages import power, smaller

if TYPE_CHECKING:
    from masked_loss_triton.call import LossInputs
    from masked_loss_triton.config import MaskedLossConfig

# Planes of the partial sums. All but the first three are written only when statistics are asked for.
SUM_W = tl.constexpr(0)
SUM_V = tl.constexpr(1)
SUM_RAW = tl.constexpr(2)
SUM_OVERLAP = tl.constexpr(3)
SUM_OUTSIDE = tl.constexpr(4)
MIN_RAW = tl.constexpr(5)  # then, as minima too, of -raw, w, -w, v, -v, and of the negated mask before it is clamped
PLANES = 3
PLANES_WITH_STATS = 12

# Numbers of other programs that are read at once, eight by each thread: a longer row costs another round to memory.
BLOCK_SUMS = tl.constexpr(1024)

# Columns of the statistics, in the order of MaskedLossStats.
STATS = 19
# What each program writes of its part of the loss: terms of target and prior, and with statistics four sums of plain errors.
TERMS = 2
TERMS_WITH_STATS = 6


class Normalization(NamedTuple):
    """The numbers of stage 9; area_scale_beta is None where it is off."""

    eps: float
    area_scale_beta: float | None

    @classmethod
    def of(cls, config: MaskedLossConfig) -> Normalization:
        return cls(config.eps, config.area_scale_beta or None)


class Given(NamedTuple):
    """A denominator of the caller's own: a tensor of one element, or else a number; both None where there is none."""

    ptr: torch.Tensor | None
    number: float | None

    @classmethod
    def of(cls, value: torch.Tensor | float | None) -> Given:
        if isinstance(value, torch.Tensor):
            return cls(value, 0.0)
        return cls(None, None if value is None else float(value))


class Sample(NamedTuple):
    """What each sample has of its own: what goes into its factor beside the sums of its weights, and its delta."""

    weighting_ptr: torch.Tensor | None  # (B,)
    delta_ptr: torch.Tensor | None  # (B,), or None: one for all
    prior_weight_ptr: torch.Tensor | None  # (B,), or None: `prior_weight` for all
    prior_weight: float
    # (2, B) float32: the factors themselves, where denominators span several processes
    factors_ptr: torch.Tensor | None
    given: Given  # in place of the sum of the weights, or of the number of samples
    given_prior: Given

    @classmethod
    def of(cls, call: LossInputs, factors: torch.Tensor | None) -> Sample:
        tensors = (call.weighting, call.loss_delta, call.prior_weight)
        weighting, delta, prior_weight = (None if x is None else x.contiguous() for x in tensors)
        given = (None, None) if factors is not None or call.normalizer is None else call.normalizer
        return cls(weighting, delta, prior_weight, call.prior_number, factors, Given.of(given[0]), Given.of(given[-1]))


class Outputs(NamedTuple):
    """Where the loss goes, and its statistics if somebody asked for them."""

    terms_ptr: torch.Tensor  # (TERMS or TERMS_WITH_STATS, programs) float32
    loss_ptr: torch.Tensor  # () float32
    stats_ptr: torch.Tensor | None  # (STATS,) float32

    def of_backward(self) -> Outputs:
        """For the same launch once more: its last program has written the loss, and no program is the last one again."""
        return Outputs(self.terms_ptr, self.terms_ptr, None if self.stats_ptr is None else self.terms_ptr)


@triton.jit
def lower(minima, values, valid):
    """The smaller of each minimum and, where it is valid, each value; seven of each."""
    infinity = float("inf")
    return (
        smaller(minima[0], tl.where(valid, values[0], infinity)),
        smaller(minima[1], tl.where(valid, values[1], infinity)),
        smaller(minima[2], tl.where(valid, values[2], infinity)),
        smaller(minima[3], tl.where(valid, values[3], infinity)),
        smaller(minima[4], tl.where(valid, values[4], infinity)),
        smaller(minima[5], tl.where(valid, values[5], infinity)),
        smaller(minima[6], values[6]),
    )


@triton.jit
def plane_sum(partials_ptr, b, tiles, batch, PLANE: tl.constexpr, OPTIONS: tl.constexpr):
    """Sum of one plane of the partial sums: of sample b, or of the whole batch."""
    start = PLANE * batch * tiles
    count = batch * tiles
    if OPTIONS.PER_SAMPLE:
        start += b * tiles
        count = tiles
    total = tl.zeros((BLOCK_SUMS,), tl.float32)
    for first in range(0, count, BLOCK_SUMS):
        index = first + tl.arange(0, BLOCK_SUMS)
        total += tl.load(partials_ptr + start + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def number_of(given):
    """The number of a `Given`."""
    if given.ptr is not None:
        return tl.load(given.ptr).to(tl.float32)
    else:
        return given.number


@triton.jit
def denominator(partials_ptr, tiles, b, shape, elements, eps, given, PLANE: tl.constexpr, OPTIONS: tl.constexpr):
    """What the weighted errors of sample b are divided by: what the caller gave, or one plane of the partial sums."""
    below = elements
    if given.number is not None and not OPTIONS.PER_SAMPLE:
        below = number_of(given)
    elif OPTIONS.NORMALIZATION != "mean":
        below = plane_sum(partials_ptr, b, tiles, shape[0], PLANE, OPTIONS) * shape[1]
    if OPTIONS.NORMALIZATION == "mean_one":
        below += eps * elements
    elif OPTIONS.NORMALIZATION == "weighted_mean":
        below += eps
    else:
        tl.static_assert(OPTIONS.NORMALIZATION == "mean", "unknown normalization")
    return below


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
        if sample.given.number is not None:
            samples = number_of(sample.given)
    else:
        elements = elements * batch
    s = 1.0 / (denominator(partials_ptr, tiles, b, shape, elements, norm.eps, sample.given, SUM_W, OPTIONS) * samples)
    if norm.area_scale_beta is not None:
        sum_raw = plane_sum(partials_ptr, b, tiles, batch, SUM_RAW, OPTIONS)
        s = s * power(sum_raw * channels / elements, norm.area_scale_beta)
    r = 0.0
    if HAS_PRIOR:
        prior_weight = sample.prior_weight
        if sample.prior_weight_ptr is not None:
            prior_weight = tl.load(sample.prior_weight_ptr + b).to(tl.float32)
        below = denominator(partials_ptr, tiles, b, shape, elements, norm.eps, sample.given_prior, SUM_V, OPTIONS)
        r = prior_weight / (below * samples)
    if sample.weighting_ptr is not None:
        weighting = tl.load(sample.weighting_ptr + b).to(tl.float32)
        s = s * weighting
        r = r * weighting
    return s, r


@triton.jit
def sum_of(values_ptr, count):
    """Sum of `count` numbers that other programs have just written, in a fixed order.

    `.cv` reads past the first-level cache, which may hold older values; `volatile` does not on AMD, and loads one number at a time.
    """
    total = tl.zeros((BLOCK_SUMS,), tl.float32)
    for first in range(0, count, BLOCK_SUMS):
        index = first + tl.arange(0, BLOCK_SUMS)
        total += tl.load(values_ptr + index, mask=index < count, other=0.0, cache_modifier=".cv")
    return tl.sum(total, axis=0)


@triton.jit
def plane_total(partials_ptr, count, PLANE: tl.constexpr, OPTIONS: tl.constexpr):
    """The sum of one plane of the partial sums over the batch, or from MIN_RAW on its minimum."""
    neutral = 0.0 if PLANE < MIN_RAW else float("inf")
    result = tl.full((BLOCK_SUMS,), neutral, tl.float32)
    for first in range(0, count, BLOCK_SUMS):
        index = first + tl.arange(0, BLOCK_SUMS)
        item = tl.load(partials_ptr + PLANE * count + index, mask=index < count, other=neutral)
        if PLANE < MIN_RAW:
            result += item
        else:
            result = smaller(result, item)
    if PLANE < MIN_RAW:
        return tl.sum(result, axis=0)
    else:
        return tl.reduce(result, 0, smaller)


@triton.jit
def write_weight_stats(partials_ptr, stats_ptr, count, positions, OPTIONS: tl.constexpr):
    """Means, minima and maxima of the raw mask, w and v, their overlap, and the largest mask value: columns 3 to 12 and 18."""
    tl.store(stats_ptr + 3, plane_total(partials_ptr, count, SUM_RAW, OPTIONS) / positions)
    tl.store(stats_ptr + 6, plane_total(partials_ptr, count, SUM_W, OPTIONS) / positions)
    tl.store(stats_ptr + 9, plane_total(partials_ptr, count, SUM_V, OPTIONS) / positions)
    tl.store(stats_ptr + 12, plane_total(partials_ptr, count, SUM_OVERLAP, OPTIONS) / positions)
    for which in tl.static_range(3):
        tl.store(stats_ptr + 4 + 3 * which, plane_total(partials_ptr, count, MIN_RAW + 2 * which, OPTIONS))
        tl.store(stats_ptr + 5 + 3 * which, -plane_total(partials_ptr, count, MIN_RAW + 2 * which + 1, OPTIONS))
    tl.store(stats_ptr + 18, -plane_total(partials_ptr, count, MIN_RAW + 6, OPTIONS))


@triton.jit
def write_error_stats(terms_ptr, programs, partials_ptr, stats_ptr, count, channels, HAS_PRIOR, OPTIONS: tl.constexpr):
    """Mean errors to target and prior inside and outside of the mask: columns 14 to 17. 0 where there is no such place."""
    inside = plane_total(partials_ptr, count, SUM_RAW, OPTIONS) * channels
    outside = plane_total(partials_ptr, count, SUM_OUTSIDE, OPTIONS) * channels
    inside = tl.where(inside == 0.0, 1.0, inside)
    outside = tl.where(outside == 0.0, 1.0, outside)
    tl.store(stats_ptr + 14, sum_of(terms_ptr + 2 * programs, programs) / inside)
    tl.store(stats_ptr + 15, sum_of(terms_ptr + 3 * programs, programs) / outside)
    drift_inside, drift_outside = 0.0, 0.0
    if HAS_PRIOR:
        drift_inside = sum_of(terms_ptr + 4 * programs, programs) / inside
        drift_outside = sum_of(terms_ptr + 5 * programs, programs) / outside
    tl.store(stats_ptr + 16, drift_inside)
    tl.store(stats_ptr + 17, drift_outside)


@triton.jit
def add_term(terms_ptr, TERM: tl.constexpr, weight, errors):
    """Writes this program's part of one term, the sum of weight times error; both (1, BLOCK_P)."""
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(terms_ptr + TERM * programs + program, tl.sum(tl.sum(weight * errors, axis=0), axis=0))


@triton.jit
def write_loss(out, weights, shape, tiles, HAS_PRIOR: tl.constexpr, OPTIONS: tl.constexpr):
    """Once the terms of this program are written: the last program to come here adds all of them, always in the same order.

    Args:
        out: `Outputs`. weights: `MaskWeights`. shape: (B, C, F, H, W). tiles: of the partial sums of the weights.
    """
    batch, channels, frames, height, width = shape
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    # The barrier orders the stores of all threads before the release of the one that takes the ticket.
    tl.debug_barrier()
    if tl.atomic_add(weights.ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        target_term = sum_of(out.terms_ptr, programs)
        prior_term = 0.0
        if HAS_PRIOR:
            prior_term = sum_of(out.terms_ptr + programs, programs)
        loss = target_term + prior_term
        tl.store(out.loss_ptr, loss)
        if out.stats_ptr is not None:
            tl.store(out.stats_ptr, loss)
            tl.store(out.stats_ptr + 1, target_term)
            tl.store(out.stats_ptr + 2, prior_term)
            tl.store(out.stats_ptr + 13, prior_term / tl.where(loss == 0.0, 1.0, loss))
            count = batch * tiles
            positions = 1.0 * batch * (frames * height * width)
            write_weight_stats(weights.partials_ptr, out.stats_ptr, count, positions, OPTIONS)
            write_error_stats(
                out.terms_ptr, programs, weights.partials_ptr, out.stats_ptr, count, channels, HAS_PRIOR, OPTIONS
            )
