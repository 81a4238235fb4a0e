"""The loss and its gradient in one read of pred and target and one write of the gradient.

    d = pred - target;  gradient = a rho'(d) + b rho'(pred - prior);  loss = sum(a rho(d)) + sum(b rho(pred - prior))

with a = s w and b = r v: the weights times the factor of the sample, which holds every normalisation. The weights kernel
(weights.py) has summed the weights before, so the factor is known before the first error, and the gradient is finished when it is
written. The last program to finish adds the partial losses, always in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, ceil_div, common_divisor
from masked_loss_triton.kernels import devices
from masked_loss_triton.kernels.devices import Hardware, wait_for_last
from masked_loss_triton.kernels.launches import FUSION, Launches
from masked_loss_triton.kernels.operands import (
    LossLaunch,
    Operand,
    Walk,
    coded,
    decoded,
    mask_steps,
    offsets_of,
    sizes_of,
    step_of,
    walked,
)
from masked_loss_triton.kernels.stages import (
    Gates,
    StageOptions,
    Stages,
    error_and_slope,
    raw_of,
    read,
    sample_gates,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.sums import (
    STATS,
    TERMS,
    TERMS_WITH_STATS,
    Normalization,
    Outputs,
    Sample,
    add_term,
    factors,
    write_loss,
)
from masked_loss_triton.kernels.upstream import ONE, Upstream, nothing_to_do
from masked_loss_triton.kernels.weights import MaskWeights

if TYPE_CHECKING:
    from masked_loss_triton.call import LossInputs
    from masked_loss_triton.config import MaskedLossConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions(StageOptions):
    """What the code of the loss kernel depends on.

    Args:
        FLAT, FOLD, DIVISOR: see `Walk`. MASK_FLAT, MASK_DIVISOR: the same of a mask that the kernel reads itself.
        BY_FRAME: `Walk.frames` is more than 1; frames are then innermost in the last axis of the grid.
        ONE_FRAME: the weights or the mask have one frame, pred has several.
        ROWS_OF_FOUR: one frame of four columns, as in packed tokens: known to the compiler, neighbours are read together.
        CELL_VECTOR: neighbours whose weights are neighbours too: their number divides every place where a frame or a fold ends.
        OFFSET: int64 where a tensor spans 2^31 elements, else int32.
        VECTOR, BLOCK_P, BLOCK_C, CHANNEL_BLOCKS: see `LossLaunch`.
    """

    LOSS_TYPE: str
    NORMALIZATION: str
    PER_SAMPLE: bool
    FLAT: bool
    BY_FRAME: bool
    FOLD: int
    DIVISOR: int
    MASK_FLAT: bool
    MASK_DIVISOR: int
    ONE_FRAME: bool
    ROWS_OF_FOUR: bool
    CELL_VECTOR: int
    OFFSET: tl.dtype
    VECTOR: int
    BLOCK_P: int
    BLOCK_C: int
    CHANNEL_BLOCKS: int


@triton.jit
def weights_at(
    cell, at, inside, weights, mask, gates, b, shape, stages, OPTIONS: tl.constexpr, HAS_PRIOR: tl.constexpr
):
    """(m, w, v) at cells of sample b: what the weights kernel wrote, or what stages 0 to 7 make of a mask on the same grid."""
    CELL_VECTOR: tl.constexpr = OPTIONS.CELL_VECTOR
    _batch, _channels, frames, height, width = shape
    weight_positions = frames * height * width
    if OPTIONS.ONE_FRAME:
        weight_positions = height * width
        cell = cell % weight_positions
        cell = tl.max_contiguous(tl.multiple_of(cell, (1, CELL_VECTOR)), (1, CELL_VECTOR))
    if weights.w_ptr is not None:
        weight_offsets = b.to(tl.int64) * (weight_positions // CELL_VECTOR * CELL_VECTOR) + cell
        w = tl.load(weights.w_ptr + weight_offsets, mask=inside, other=0.0)
        v = tl.zeros_like(w)
        if weights.v_ptr is not None:
            v = tl.load(weights.v_ptr + weight_offsets, mask=inside, other=0.0)
        m = w
        if weights.m_ptr is not None:
            m = tl.load(weights.m_ptr + weight_offsets, mask=inside, other=0.0)
    else:
        m = tl.full((1, OPTIONS.BLOCK_P), 1.0, tl.float32)
        if mask is not None:
            start = b.to(tl.int64) * (decoded(mask.b, OPTIONS) * OPTIONS.MASK_DIVISOR)
            if OPTIONS.MASK_FLAT:
                mask_offsets = start + cell
            else:
                mask_offsets = start + (at[0] * mask.f + at[1] * mask.h + at[2] * mask.w)
            m = read(tl.load(mask.ptr + mask_offsets, mask=inside, other=0))
            m = raw_of(m, stages, OPTIONS)
        prior_gate, mask_gate = sample_gates(gates, b)
        w, v = target_and_prior_weight(m, m, prior_gate, mask_gate, stages, OPTIONS, HAS_PRIOR)
        m = tl.where(mask_gate, m, 1.0)
    return m, w, v


@triton.jit
def loss_kernel(
    pred,  # `Operand`, (B, C, F, H, W)
    target,
    latents,  # `Operand` or None
    prior,  # `Operand` or None
    gradient,  # `Operand`, or None where it is not wanted
    mask,  # `Operand`, (B, F or 1, H, W), or None
    weights,  # `MaskWeights`
    gates,
    sample,
    upstream,
    out,
    flow_sign,
    shape,  # (B, C, F, H, W)
    tiles,  # of the partial sums of the weights
    delta,
    stages,
    normalization,
    OPTIONS: tl.constexpr,
):
    """Writes gradient and loss; grid (tiles of positions, groups of channels, B, or B F with BY_FRAME).

    A program keeps its weights over its channels.
    """
    if OPTIONS.OVERLAPS:
        wait_for_last()
    BLOCK_P: tl.constexpr = OPTIONS.BLOCK_P
    shape, tiles = sizes_of(shape, OPTIONS), decoded(tiles, OPTIONS)
    channels = shape[1]
    b = tl.program_id(2) // shape[2] if OPTIONS.BY_FRAME else tl.program_id(2)
    position, inside, cell, at = walked(shape, OPTIONS)
    if upstream.grad_output_ptr is not None:
        grad_output = tl.load(upstream.grad_output_ptr).to(tl.float32)
        if nothing_to_do(upstream, grad_output):
            return

    s, r = factors(weights.partials_ptr, tiles, sample, b, shape, normalization, OPTIONS, prior is not None)
    if sample.delta_ptr is not None:
        delta = tl.load(sample.delta_ptr + b).to(tl.float32)
    m, w, v = weights_at(cell, at, inside, weights, mask, gates, b, shape, stages, OPTIONS, prior is not None)
    target_weight, prior_weight = s * w, r * v

    # One sum per position, weighted when it is whole: the channels of a block are added in the thread that holds them, and a sum
    # per element would take four times the registers.
    errors = tl.zeros((1, BLOCK_P), tl.float32)
    prior_errors = tl.zeros((1, BLOCK_P), tl.float32)
    pred_offsets = offsets_of(pred, b, at, position, OPTIONS)
    target_offsets = offsets_of(target, b, at, position, OPTIONS)
    first_channel = tl.program_id(1) * (OPTIONS.CHANNEL_BLOCKS * OPTIONS.BLOCK_C)
    for step in range(OPTIONS.CHANNEL_BLOCKS):
        channel = first_channel + step * OPTIONS.BLOCK_C + tl.arange(0, OPTIONS.BLOCK_C)[:, None]
        valid = inside & (channel < channels // OPTIONS.FOLD)
        channel = channel.to(OPTIONS.OFFSET)
        p = tl.load(pred.ptr + pred_offsets + channel * step_of(pred.c, OPTIONS), mask=valid, other=0.0)
        t = tl.load(target.ptr + target_offsets + channel * step_of(target.c, OPTIONS), mask=valid, other=0.0)
        p, t = p.to(tl.float32), t.to(tl.float32)
        if latents is not None:
            offsets = offsets_of(latents, b, at, position, OPTIONS) + channel * step_of(latents.c, OPTIONS)
            x = tl.load(latents.ptr + offsets, mask=valid, other=0.0)
            t = (t - x.to(tl.float32)) * flow_sign
        error, slope = error_and_slope(p - t, delta, OPTIONS)
        errors += tl.sum(error, axis=0, keep_dims=True)
        value = target_weight * slope
        if prior is not None:
            offsets = offsets_of(prior, b, at, position, OPTIONS) + channel * step_of(prior.c, OPTIONS)
            q = tl.load(prior.ptr + offsets, mask=valid, other=0.0)
            error, slope = error_and_slope(p - q.to(tl.float32), delta, OPTIONS)
            prior_errors += tl.sum(error, axis=0, keep_dims=True)
            value += prior_weight * slope
        if gradient is not None:
            if upstream.grad_output_ptr is not None:
                value *= grad_output
            value = value.to(gradient.ptr.dtype.element_ty)
            offsets = offsets_of(gradient, b, at, position, OPTIONS) + channel * step_of(gradient.c, OPTIONS)
            tl.store(gradient.ptr + offsets, value, mask=valid)

    add_term(out.terms_ptr, 0, target_weight, errors)
    if prior is not None:
        add_term(out.terms_ptr, 1, prior_weight, prior_errors)
    if out.stats_ptr is not None:
        add_term(out.terms_ptr, 2, m, errors)
        add_term(out.terms_ptr, 3, 1.0 - m, errors)
        if prior is not None:
            add_term(out.terms_ptr, 4, m, prior_errors)
            add_term(out.terms_ptr, 5, 1.0 - m, prior_errors)
    write_loss(out, weights, shape, tiles, prior is not None, OPTIONS)


@dataclasses.dataclass(frozen=True)
class LossPlan:
    """Everything of a launch that the numbers in the tensors do not change.

    Args:
        strides: of pred, target, latents, prior, gradient and mask. arguments: of the kernel, from `shape` on.
        options: of the launch.
    """

    grid: tuple[int, int, int]
    strides: tuple[tuple[int, ...] | None, ...]
    arguments: tuple[object, ...]
    options: dict[str, int]


@functools.lru_cache(maxsize=256)
def plan_loss(
    operands: tuple[Layout | None, ...],
    tiles: int,
    config: MaskedLossConfig,
    one_frame: bool,
    hardware: Hardware,
) -> LossPlan:
    """The plan of a call whose tensors lie like this; made once, since it takes longer than what a call does anew.

    Args:
        operands: pred, target, latents, prior, gradient, and the mask if the kernel reads it itself.
        tiles: of the partial sums of the weights.
        one_frame: the weights or the mask have one, pred has several.
    """
    pred, mask, has_prior = operands[0], operands[5], operands[3] is not None
    assert pred is not None
    batch, _, frames, height, width = pred.shape
    walk = Walk.over(operands[:5])
    mask_strides, mask_flat, mask_divisor = mask_steps(mask)
    launch = LossLaunch.choose(batch, walk, has_prior, hardware.multiprocessors)
    # Where channels lie innermost, their stride has to be known as 1.
    code = walk.flat and not walk.channels_innermost
    groups = ceil_div(walk.channels, launch.block_c * launch.channel_blocks)
    options = LossOptions(
        INVERT=config.invert,
        FLOOR=config.floor,
        LOSS_TYPE=config.loss_type,
        NORMALIZATION=config.normalization,
        PER_SAMPLE=config.per_sample,
        CODED=code,
        OVERLAPS=hardware.overlaps,
        FLAT=walk.flat,
        BY_FRAME=walk.frames > 1,
        FOLD=walk.fold,
        DIVISOR=walk.divisor,
        MASK_FLAT=mask_flat,
        MASK_DIVISOR=mask_divisor,
        ONE_FRAME=one_frame,
        ROWS_OF_FOUR=walk.rows_of_four,
        CELL_VECTOR=common_divisor([height * width * (1 if one_frame or walk.frames > 1 else frames)], launch.vector),
        OFFSET=tl.int64 if max(x.span for x in operands if x is not None) >= 2**31 else tl.int32,
        VECTOR=launch.vector,
        BLOCK_P=launch.block_p,
        BLOCK_C=launch.block_c,
        CHANNEL_BLOCKS=launch.channel_blocks,
    )
    return LossPlan(
        (ceil_div(walk.positions, launch.block_p), groups, batch * walk.frames),
        tuple(None if x is None else (*coded(x[:2], code), *x[2:]) for x in (*walk.strides, mask_strides)),
        (
            coded(pred.shape, code),
            *coded([tiles], code),
            config.loss_delta,
            Stages.of(config),
            Normalization.of(config),
            options,
        ),
        launch.options() | hardware.options(),
    )


def launch_loss(
    call: LossInputs,
    weights: MaskWeights,
    gates: Gates,
    config: MaskedLossConfig,
    launches: Launches,
    factors: torch.Tensor | None = None,
    upstream: Upstream = ONE,
    *,
    gradient: torch.Tensor | None = None,
    stats: bool = False,
) -> Outputs:
    """The loss and its gradient in one launch.

    Args:
        weights: what `launch_weights` made of `gates` and the mask.
        launches: takes down what is started.
        factors: (2, B) float32, instead of those that the sums in `weights` give.
        upstream: what the gradient is multiplied by before it is rounded to pred's dtype.
        gradient: as pred, to be written; None: not asked for.

    Returns:
        Where the kernel writes loss and statistics; of no use in the backward.
    """
    pred, device = call.pred, call.pred.device
    mask = call.mask if weights.w_ptr is None else None
    frames = next((x.shape[1] for x in (weights.w_ptr, mask) if x is not None), 1)
    tensors = (pred, call.target, call.latents, call.prior, gradient, mask)
    layouts = tuple(map(Layout.of, tensors))
    one_frame = frames == 1 < pred.shape[2]
    plan = plan_loss(layouts, weights.partials_ptr.shape[2], config, one_frame, devices.hardware(device))
    terms = launches.empty((TERMS_WITH_STATS if stats else TERMS, math.prod(plan.grid)), device)
    loss, numbers = (torch.empty(size, dtype=torch.float32, device=device) for size in ((), STATS if stats else 0))
    out = Outputs(terms, loss, numbers if stats else None)
    arguments = (
        *map(Operand.of, tensors, plan.strides),
        weights,
        gates,
        Sample.of(call, factors),
        upstream,
        out,
        float(call.flow_sign),
        *plan.arguments,
    )
    launches.add(loss_kernel[plan.grid](*arguments, **plan.options, **FUSION), plan.grid, arguments)
    return out
