"""Sums that cross programs: partial sums of the weights and of the loss, the factor of a sample, the statistics.

A partial sum is written by one program and read by others, in a fixed order: no float atomics, the same bits every time.
"""

import triton
import triton.language as tl

from masked_loss_triton.kernels.stages import power

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

# How the denominator is made; the value of the constexpr NORMALIZATION.
WEIGHTED_MEAN = tl.constexpr(0)
MEAN_ONE = tl.constexpr(1)
MEAN = tl.constexpr(2)


@triton.jit
def smaller(x, y):
    """The smaller of two numbers, NaN if one is NaN: `minimum` would drop it."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def plane_sum(partials_ptr, b, tiles, batch, PLANE: tl.constexpr, PER_SAMPLE: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Sum of one plane of the partial sums: of sample b, or of the whole batch."""
    start = PLANE * batch * tiles
    count = batch * tiles
    if PER_SAMPLE:
        start += b * tiles
        count = tiles
    total = tl.zeros((BLOCK_TILES,), tl.float32)
    for first in range(0, count, BLOCK_TILES):
        index = first + tl.arange(0, BLOCK_TILES)
        total += tl.load(partials_ptr + start + index, mask=index < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def factors(
    partials_ptr,
    factors_ptr,
    weighting_ptr,
    prior_weight_ptr,
    prior_weight,
    area_scale_beta,
    eps,
    b,
    batch,
    tiles,
    channels,
    positions,
    HAS_FACTORS: tl.constexpr,
    HAS_WEIGHTING: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_PRIOR_WEIGHT: tl.constexpr,
    HAS_AREA_SCALE: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """(s, r) of sample b: from the sums of the weights, or given where the denominators span more than this batch."""
    if HAS_FACTORS:
        return tl.load(factors_ptr + b), tl.load(factors_ptr + batch + b)
    samples = 1.0
    elements = channels * positions.to(tl.float32)
    if PER_SAMPLE:
        samples = samples * batch
    else:
        elements = elements * batch
    if NORMALIZATION == MEAN:
        w_denominator = elements
    else:
        sum_w = plane_sum(partials_ptr, b, tiles, batch, SUM_W, PER_SAMPLE, BLOCK_TILES)
        w_denominator = channels * sum_w + (eps * elements if NORMALIZATION == MEAN_ONE else eps)
    s = 1.0 / (w_denominator * samples)
    if HAS_AREA_SCALE:
        sum_raw = plane_sum(partials_ptr, b, tiles, batch, SUM_RAW, PER_SAMPLE, BLOCK_TILES)
        s = s * power(sum_raw * channels / elements, area_scale_beta)
    r = 0.0
    if HAS_PRIOR:
        if NORMALIZATION == MEAN:
            v_denominator = elements
        else:
            sum_v = plane_sum(partials_ptr, b, tiles, batch, SUM_V, PER_SAMPLE, BLOCK_TILES)
            v_denominator = channels * sum_v + (eps * elements if NORMALIZATION == MEAN_ONE else eps)
        if HAS_PRIOR_WEIGHT:
            prior_weight = tl.load(prior_weight_ptr + b).to(tl.float32)
        r = prior_weight / (v_denominator * samples)
    if HAS_WEIGHTING:
        weighting = tl.load(weighting_ptr + b).to(tl.float32)
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
def write_weight_stats(partials_ptr, stats_ptr, count, positions, BLOCK_TILES: tl.constexpr):
    """Means, minima and maxima of the raw mask, w and v, and their overlap: columns 3 to 12 of the statistics."""
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
