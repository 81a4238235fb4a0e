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
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from masked_loss_triton.kernels.reduction import (
    MEAN,
    MEAN_ONE,
    STATS,
    WEIGHTED_MEAN,
    factors,
    sum_of,
    write_weight_stats,
)
from masked_loss_triton.kernels.stages import (
    binarized_and_inverted,
    read,
    sample_gates,
    split_position,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.strides import common_divisor, position_stride, span, used_strides
from masked_loss_triton.kernels.weights import MaskWeights, stage_arguments


@triton.jit
def error_and_slope(d, delta, LOSS_TYPE: tl.constexpr):
    """(rho(d), rho'(d)) as torch defines them."""
    if LOSS_TYPE == "mse":
        return d * d, 2.0 * d
    elif LOSS_TYPE == "l1":
        return tl.abs(d), tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    elif LOSS_TYPE == "huber":
        slope = tl.where(d > delta, delta, tl.where(d < -delta, -delta, d))
        return slope * (d - 0.5 * slope), slope
    else:
        scaled = d / delta
        slope = tl.where(scaled > 1.0, 1.0, tl.where(scaled < -1.0, -1.0, scaled))
        return slope * (d - 0.5 * delta * slope), slope


@triton.jit
def offsets_of(position, frame, row, column, stride_f, stride_h, stride_w, FLAT: tl.constexpr):
    """Offsets of positions inside one channel; a tensor whose positions are one run needs no division."""
    if FLAT:
        return position * stride_w
    return frame * stride_f + row * stride_h + column * stride_w


@triton.jit
def loss_kernel(
    pred_ptr,
    target_ptr,
    latents_ptr,
    prior_ptr,
    gradient_ptr,
    mask_ptr,
    w_ptr,
    v_ptr,
    prior_gate_ptr,
    mask_gate_ptr,
    partials_ptr,
    factors_ptr,  # (2, B) float32
    weighting_ptr,  # (B,)
    prior_weight_ptr,  # (B,)
    grad_output_ptr,  # ()
    terms_ptr,  # (2, programs) float32
    loss_ptr,  # () float32
    stats_ptr,  # (STATS,) float32
    ticket_ptr,  # () int32
    binarize,
    gamma,
    min_weight,
    prior_threshold,
    prior_weight,
    area_scale_beta,
    eps,
    delta,
    flow_sign,
    batch,
    channels,
    frames,
    height,
    width,
    tiles,
    pred_stride_b,
    pred_stride_c,
    pred_stride_f,
    pred_stride_h,
    pred_stride_w,
    target_stride_b,
    target_stride_c,
    target_stride_f,
    target_stride_h,
    target_stride_w,
    latents_stride_b,
    latents_stride_c,
    latents_stride_f,
    latents_stride_h,
    latents_stride_w,
    prior_stride_b,
    prior_stride_c,
    prior_stride_f,
    prior_stride_h,
    prior_stride_w,
    gradient_stride_b,
    gradient_stride_c,
    gradient_stride_f,
    gradient_stride_h,
    gradient_stride_w,
    mask_stride_b,
    mask_stride_f,
    mask_stride_h,
    mask_stride_w,
    HAS_LATENTS: tl.constexpr,
    HAS_PRIOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_WEIGHTING: tl.constexpr,
    HAS_PRIOR_WEIGHT: tl.constexpr,
    HAS_AREA_SCALE: tl.constexpr,
    HAS_GRAD_OUTPUT: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    WRITE_LOSS: tl.constexpr,
    WRITE_WEIGHT_STATS: tl.constexpr,
    IS_UINT8: tl.constexpr,
    HAS_BINARIZE: tl.constexpr,
    INVERT: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    CLAMP_FLOOR: tl.constexpr,
    PRIOR_REGION: tl.constexpr,
    HAS_PRIOR_GATE: tl.constexpr,
    HAS_MASK_GATE: tl.constexpr,
    NORMALIZATION: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    LOSS_TYPE: tl.constexpr,
    FLAT: tl.constexpr,
    FOLD: tl.constexpr,
    MASK_FLAT: tl.constexpr,
    DIVISOR: tl.constexpr,
    MASK_DIVISOR: tl.constexpr,
    OFFSET: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (tiles of positions, groups of channels, B). A program keeps the weights of its positions over its channels.

    FOLD 2 takes (C, P) as (C / 2, 2 P), pairs of channels as one row: where P is an odd multiple of 4, rows of 2-byte elements
    start on 8 bytes, pairs of rows on 16.
    """
    b = tl.program_id(2)
    # Every stride and the number of positions came divided by DIVISOR: multiplied back, the compiler knows what divides them
    # and reads 128 bits at a time also where they are not multiples of 16.
    grid_positions = frames * height * width
    positions = grid_positions * FOLD // DIVISOR * DIVISOR
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    inside = position < positions
    cell = position
    if FOLD == 2:
        cell = tl.where(position < grid_positions, position, position - grid_positions)
    frame, row, column = split_position(cell, height, width)
    # Products with strides: 64-bit where a tensor spans 2^31 elements.
    cell, frame, row, column = cell.to(OFFSET), frame.to(OFFSET), row.to(OFFSET), column.to(OFFSET)
    # No thread takes more neighbours than fit 16 bytes of the widest operand: with 8 float32 beside 8 halves, each access would
    # use half of its sectors.
    position = tl.max_contiguous(position, (1, VECTOR)).to(OFFSET)

    s, r = factors(
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
        grid_positions,
        HAS_FACTORS,
        HAS_WEIGHTING,
        HAS_PRIOR,
        HAS_PRIOR_WEIGHT,
        HAS_AREA_SCALE,
        NORMALIZATION,
        PER_SAMPLE,
        BLOCK_TILES,
    )
    if HAS_GRAD_OUTPUT:
        grad_output = tl.load(grad_output_ptr).to(tl.float32)
        s = s * grad_output
        r = r * grad_output

    long_b = b.to(tl.int64)
    if HAS_W:
        weight_offsets = long_b * (positions // FOLD) + cell
        w = tl.load(w_ptr + weight_offsets, mask=inside, other=0.0)
        v = tl.zeros_like(w)
        if HAS_V:
            v = tl.load(v_ptr + weight_offsets, mask=inside, other=0.0)
    else:
        if HAS_MASK:
            mask_offsets = offsets_of(cell, frame, row, column, mask_stride_f, mask_stride_h, mask_stride_w, MASK_FLAT)
            m = tl.load(mask_ptr + long_b * (mask_stride_b * MASK_DIVISOR) + mask_offsets, mask=inside, other=0)
            m = binarized_and_inverted(read(m, IS_UINT8), binarize, HAS_BINARIZE, INVERT)
        else:
            m = tl.full((1, BLOCK_P), 1.0, tl.float32)
        prior_gate, mask_gate = sample_gates(prior_gate_ptr, mask_gate_ptr, b, HAS_PRIOR_GATE, HAS_MASK_GATE)
        w, v = target_and_prior_weight(
            m,
            m,
            prior_gate,
            mask_gate,
            gamma,
            min_weight,
            prior_threshold,
            HAS_GAMMA,
            CLAMP_FLOOR,
            PRIOR_REGION,
            HAS_MASK_GATE,
        )
    a = s * w
    b_weight = r * v

    target_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    prior_sum = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    pred_offsets = long_b * (pred_stride_b * DIVISOR) + offsets_of(
        position, frame, row, column, pred_stride_f * DIVISOR, pred_stride_h * DIVISOR, pred_stride_w, FLAT
    )
    target_offsets = long_b * (target_stride_b * DIVISOR) + offsets_of(
        position, frame, row, column, target_stride_f * DIVISOR, target_stride_h * DIVISOR, target_stride_w, FLAT
    )
    first_channel = tl.program_id(1) * (CHANNEL_BLOCKS * BLOCK_C)
    for step in range(CHANNEL_BLOCKS):
        channel = first_channel + step * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
        valid = inside & (channel < channels // FOLD)
        channel = channel.to(OFFSET)
        p = tl.load(pred_ptr + pred_offsets + channel * (pred_stride_c * DIVISOR), mask=valid, other=0.0)
        p = p.to(tl.float32)
        t = tl.load(target_ptr + target_offsets + channel * (target_stride_c * DIVISOR), mask=valid, other=0.0)
        t = t.to(tl.float32)
        if HAS_LATENTS:
            latents_offsets = long_b * (latents_stride_b * DIVISOR) + offsets_of(
                position,
                frame,
                row,
                column,
                latents_stride_f * DIVISOR,
                latents_stride_h * DIVISOR,
                latents_stride_w,
                FLAT,
            )
            x = tl.load(latents_ptr + latents_offsets + channel * (latents_stride_c * DIVISOR), mask=valid, other=0.0)
            t = (t - x.to(tl.float32)) * flow_sign
        error, slope = error_and_slope(p - t, delta, LOSS_TYPE)
        target_sum += a * error
        gradient = a * slope
        if HAS_PRIOR:
            prior_offsets = long_b * (prior_stride_b * DIVISOR) + offsets_of(
                position, frame, row, column, prior_stride_f * DIVISOR, prior_stride_h * DIVISOR, prior_stride_w, FLAT
            )
            q = tl.load(prior_ptr + prior_offsets + channel * (prior_stride_c * DIVISOR), mask=valid, other=0.0)
            error, slope = error_and_slope(p - q.to(tl.float32), delta, LOSS_TYPE)
            prior_sum += b_weight * error
            gradient += b_weight * slope
        if WRITE_GRADIENT:
            gradient_offsets = long_b * (gradient_stride_b * DIVISOR) + offsets_of(
                position,
                frame,
                row,
                column,
                gradient_stride_f * DIVISOR,
                gradient_stride_h * DIVISOR,
                gradient_stride_w,
                FLAT,
            )
            tl.store(
                gradient_ptr + gradient_offsets + channel * (gradient_stride_c * DIVISOR),
                gradient.to(gradient_ptr.dtype.element_ty),
                mask=valid,
            )

    if WRITE_LOSS:
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        program = (b * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        tl.store(terms_ptr + program, tl.sum(tl.sum(target_sum, axis=1), axis=0))
        tl.store(terms_ptr + programs + program, tl.sum(tl.sum(prior_sum, axis=1), axis=0))
        # The barrier orders the stores of all threads before the release of the one that takes the ticket.
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
            target_term = sum_of(terms_ptr, programs)
            prior_term = sum_of(terms_ptr + programs, programs)
            loss = target_term + prior_term
            tl.store(loss_ptr, loss)
            tl.store(stats_ptr, loss)
            tl.store(stats_ptr + 1, target_term)
            tl.store(stats_ptr + 2, prior_term)
            if WRITE_WEIGHT_STATS:
                write_weight_stats(
                    partials_ptr, stats_ptr, batch * tiles, batch * grid_positions.to(tl.float32), BLOCK_TILES
                )
                tl.store(stats_ptr + 13, prior_term / tl.where(loss == 0.0, 1.0, loss))


@triton.jit
def scale_kernel(gradient_ptr, grad_output_ptr, count, BLOCK: tl.constexpr):
    """gradient *= grad_output, in place; where that is 1, as in every plain `loss.backward()`, one load and nothing else."""
    grad_output = tl.load(grad_output_ptr).to(tl.float32)
    if grad_output != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient_ptr + index, mask=index < count, other=0.0).to(tl.float32) * grad_output
        tl.store(gradient_ptr + index, value.to(gradient_ptr.dtype.element_ty), mask=index < count)


@dataclasses.dataclass(frozen=True)
class LossLaunch:
    """Launch configuration of the loss kernel.

    vector, block_p, block_c: a thread holds 16 bytes of one channel of the widest operand (4 float32 or 8 halves: one 128-bit
        access; a half beside a float32 is read 64 bits at a time, since 8 float32 per thread would leave half of each sector to
        the next access), 4 warps lie along the positions, and block_c channels are in flight per thread. Where channels are
        the innermost axis it is the other way.
    channel_blocks: how many blocks of channels a program walks with the same weights in registers. All of them, so that the
        mask is read once, unless the grid would not fill the device: then the channels are split, and the mask, then small,
        comes from the second-level cache.
    registers: what a thread may use at most. With 128 of them 4 programs of 128 threads fit on every NVIDIA multiprocessor,
        and each has 16 KB or more in flight (4 channels x 16 bytes x 2 tensors x 128 threads). 16 KB is what 3.35 TB/s
        times 0.6 microseconds need for each multiprocessor of an H100: one program would nearly do. `python -m bench.gate`
        holds the compiled code to it.
    """

    vector: int
    block_p: int
    block_c: int
    channel_blocks: int
    num_warps: int = 4
    registers: ClassVar[int] = 128

    @classmethod
    def choose(
        cls, batch: int, channels: int, positions: int, itemsize: int, channels_innermost: bool, multiprocessors: int
    ) -> LossLaunch:
        vector = 16 // max(itemsize, 2)
        if channels_innermost:
            block_c = min(32, triton.next_power_of_2(channels))
            block_p = max(16, 128 * 16 // block_c)
        else:
            block_p = 128 * vector
            while block_p > 128 and block_p // 2 >= positions:
                block_p //= 2
            block_c = min(16 // vector, triton.next_power_of_2(channels))
        all_blocks = triton.cdiv(channels, block_c)
        programs = triton.cdiv(positions, block_p) * batch
        # Two programs of four warps per multiprocessor keep 32 KB in flight there, twice what its memory latency needs.
        groups = min(
            all_blocks, max(1, triton.cdiv(2 * multiprocessors, programs) if programs < multiprocessors else 1)
        )
        channel_blocks = triton.cdiv(all_blocks, groups)
        return cls(vector, block_p, block_c, channel_blocks)

    def grid(self, batch: int, channels: int, positions: int) -> tuple[int, int, int]:
        return (
            triton.cdiv(positions, self.block_p),
            triton.cdiv(channels, self.block_c * self.channel_blocks),
            batch,
        )


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter; small, but enough that small inputs take the path that splits the channels


NORMALIZATIONS = {"weighted_mean": WEIGHTED_MEAN.value, "mean_one": MEAN_ONE.value, "mean": MEAN.value}


def launch_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor | None,
    prior: torch.Tensor | None,
    mask: torch.Tensor | None,
    weights: MaskWeights,
    config: Any,
    *,
    flow_sign: int,
    weighting: torch.Tensor | None,
    prior_weight: torch.Tensor | float,
    prior_gate: torch.Tensor | None,
    mask_gate: torch.Tensor | None,
    factors: torch.Tensor | None,
    grad_output: torch.Tensor | None = None,
    write_gradient: bool = True,
    write_loss: bool = True,
    stats: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch: (loss, stats, gradient); what was not asked for is an empty tensor.

    Args:
        pred, target, latents, prior: (B, C, F, H, W), any strides, any floating dtype.
        mask, weights, prior_gate, mask_gate: what `launch_weights` took and gave.
        factors: (2, B) float32, or None to make them from the sums in `weights`.
        weighting, prior_weight: (B,) contiguous, or for the latter one number.
        grad_output: 0-d; the gradient is multiplied by it before it is rounded to pred's dtype.

    Returns:
        loss: 0-d float32. stats: (STATS,) float32, only its first three without `stats`. gradient: as pred.
    """
    batch, channels, frames, height, width = pred.shape
    positions = frames * height * width
    device = pred.device
    gradient = torch.empty_like(pred) if write_gradient else pred.new_empty(0)
    tensors: dict[str, torch.Tensor | None] = {"pred": pred, "target": target, "latents": latents, "prior": prior}
    tensors["gradient"] = gradient if write_gradient else None
    present = [tensor for tensor in tensors.values() if tensor is not None]
    flat = all(position_stride(tensor) is not None for tensor in present)
    direct_mask = mask if weights.w is None else None
    mask_flat = direct_mask is not None and direct_mask.shape[1] == frames and position_stride(direct_mask) == 1
    channels_innermost = channels > 1 and pred.stride(1) == 1 and positions > 1
    itemsize = max(tensor.element_size() for tensor in present)
    in_rows = flat and all(tensor.stride(1) == positions for tensor in present)
    fold = 2 if in_rows and itemsize == 2 and positions % 8 == 4 and channels % 2 == 0 else 1

    steps = {name: used_strides(tensor) for name, tensor in tensors.items() if tensor is not None}
    steps = {name: (step[0], step[1] * fold, *step[2:]) for name, step in steps.items()}
    used = [number for step in steps.values() for number in (step[:2] if flat else step[:4])]
    divisor = common_divisor([positions * fold, *used], 16)
    wide = max(span(tensor) for tensor in (*present, direct_mask) if tensor is not None) >= 2**31
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        step_b, step_c, step_f, step_h, step_w = steps.get(name, (0,) * 5)
        if flat and tensor is not None:
            step_w = position_stride(tensor) or 0
        values = (step_b // divisor, step_c // divisor, step_f // divisor, step_h // divisor, step_w)
        strides |= {f"{name}_stride_{axis}": value for axis, value in zip("bcfhw", values, strict=True)}
    mask_steps = (0,) * 4 if direct_mask is None else used_strides(direct_mask)
    mask_divisor = common_divisor([mask_steps[0]], 16) if mask_flat else 1
    strides |= dict(
        mask_stride_b=mask_steps[0] // mask_divisor,
        mask_stride_f=mask_steps[1],
        mask_stride_h=mask_steps[2],
        mask_stride_w=1 if mask_flat else mask_steps[3],
    )

    rows = channels // fold, positions * fold
    launch = LossLaunch.choose(batch, *rows, itemsize, channels_innermost, _multiprocessors(device))
    grid = launch.grid(batch, *rows)
    programs = math.prod(grid)
    loss = torch.empty((), dtype=torch.float32, device=device)
    numbers_out = torch.empty(STATS, dtype=torch.float32, device=device)
    terms = torch.empty((2, programs), dtype=torch.float32, device=device) if write_loss else None
    per_sample_prior = prior_weight if isinstance(prior_weight, torch.Tensor) else None
    tiles = weights.partials.shape[2]
    per_sum = 1 if config.per_sample else batch
    loss_kernel[grid](
        pred_ptr=pred,
        target_ptr=target,
        latents_ptr=latents,
        prior_ptr=prior,
        gradient_ptr=gradient,
        mask_ptr=direct_mask,
        w_ptr=weights.w,
        v_ptr=weights.v,
        partials_ptr=weights.partials,
        factors_ptr=factors,
        weighting_ptr=weighting,
        prior_weight_ptr=per_sample_prior,
        grad_output_ptr=grad_output,
        terms_ptr=terms,
        loss_ptr=loss,
        stats_ptr=numbers_out,
        ticket_ptr=weights.ticket,
        prior_weight=0.0 if per_sample_prior is not None else prior_weight,
        area_scale_beta=config.area_scale_beta,
        eps=config.eps,
        delta=config.loss_delta,
        flow_sign=float(flow_sign),
        batch=batch,
        channels=channels,
        frames=frames,
        height=height,
        width=width,
        tiles=tiles,
        **strides,
        **stage_arguments(config, prior is not None, prior_gate, mask_gate),
        HAS_LATENTS=latents is not None,
        HAS_PRIOR=prior is not None,
        HAS_MASK=direct_mask is not None,
        HAS_W=weights.w is not None,
        HAS_V=weights.v is not None,
        HAS_FACTORS=factors is not None,
        HAS_WEIGHTING=weighting is not None,
        HAS_PRIOR_WEIGHT=per_sample_prior is not None,
        HAS_AREA_SCALE=config.area_scale_beta != 0,
        HAS_GRAD_OUTPUT=grad_output is not None,
        WRITE_GRADIENT=write_gradient,
        WRITE_LOSS=write_loss,
        WRITE_WEIGHT_STATS=stats,
        IS_UINT8=direct_mask is not None and direct_mask.dtype == torch.uint8,
        NORMALIZATION=NORMALIZATIONS[config.normalization],
        PER_SAMPLE=config.per_sample,
        LOSS_TYPE=config.loss_type,
        FLAT=flat,
        FOLD=fold,
        MASK_FLAT=mask_flat,
        DIVISOR=divisor,
        MASK_DIVISOR=mask_divisor,
        VECTOR=launch.vector,
        OFFSET=tl.int64 if wide else tl.int32,
        # At least one element per thread: fewer would be read once by every warp.
        BLOCK_TILES=max(32 * launch.num_warps, triton.next_power_of_2(min(1024, tiles * per_sum))),
        BLOCK_C=launch.block_c,
        CHANNEL_BLOCKS=launch.channel_blocks,
        BLOCK_P=launch.block_p,
        num_warps=launch.num_warps,
    )
    return loss, numbers_out, gradient


@dataclasses.dataclass(frozen=True)
class ScaleLaunch:
    """Launch configuration of the scale kernel.

    block: 4096 elements on 4 warps, 32 per thread: a plain backward starts few programs that read one number and return.
    registers: what a thread may use at most: its 32 elements and little else. 12 programs are resident.
    """

    block: int = 4096
    num_warps: int = 4
    registers: ClassVar[int] = 40


def launch_scale(gradient: torch.Tensor, grad_output: torch.Tensor) -> None:
    """gradient *= grad_output in place, one launch. `gradient` is dense, in any order of axes; grad_output 0-d."""
    launch, count = ScaleLaunch(), gradient.numel()
    scale_kernel[(triton.cdiv(count, launch.block),)](
        gradient_ptr=gradient, grad_output_ptr=grad_output, count=count, BLOCK=launch.block, num_warps=launch.num_warps
    )
