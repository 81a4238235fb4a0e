"""The loss and its gradient in one read of pred and target and one write of the gradient.

    d = pred - target;  gradient = a rho'(d) + b rho'(pred - prior);  loss = sum(a rho(d)) + sum(b rho(pred - prior))

with a = s w and b = r v: the weights times the factor of the sample, which holds every normalisation. The weights kernel
(weights.py) has summed the weights before, so the factor is known before the first error, and the gradient is finished when it is
written. The last program to finish adds the partial losses, always in the same order.
"""

import triton
import triton.language as tl

from masked_loss_triton.kernels.stages import (
    binarized_and_inverted,
    read,
    sample_gates,
    split_position,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.sums import factors, sum_of, write_weight_stats


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
    prior_weight,
    flow_sign,
    binarize,  # from here on a plan has the arguments (launch_loss.py)
    gamma,
    min_weight,
    prior_threshold,
    area_scale_beta,
    eps,
    delta,
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
    ONE_FRAME: tl.constexpr,
    CELL_VECTOR: tl.constexpr,
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
        cell = tl.max_contiguous(tl.multiple_of(cell, (1, CELL_VECTOR)), (1, CELL_VECTOR))
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
    weight_positions = grid_positions
    if ONE_FRAME:
        weight_positions = height * width
        cell = cell % weight_positions
        cell = tl.max_contiguous(tl.multiple_of(cell, (1, CELL_VECTOR)), (1, CELL_VECTOR))
    if HAS_W:
        weight_offsets = long_b * (weight_positions // CELL_VECTOR * CELL_VECTOR) + cell
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

    # One sum per position: the channels of a block are added in the thread that holds them, and a sum per element would take four
    # times the registers.
    target_sum = tl.zeros((BLOCK_P,), tl.float32)
    prior_sum = tl.zeros((BLOCK_P,), tl.float32)
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
        target_sum += tl.sum(a * error, axis=0)
        gradient = a * slope
        if HAS_PRIOR:
            prior_offsets = long_b * (prior_stride_b * DIVISOR) + offsets_of(
                position, frame, row, column, prior_stride_f * DIVISOR, prior_stride_h * DIVISOR, prior_stride_w, FLAT
            )
            q = tl.load(prior_ptr + prior_offsets + channel * (prior_stride_c * DIVISOR), mask=valid, other=0.0)
            error, slope = error_and_slope(p - q.to(tl.float32), delta, LOSS_TYPE)
            prior_sum += tl.sum(b_weight * error, axis=0)
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
        tl.store(terms_ptr + program, tl.sum(target_sum, axis=0))
        tl.store(terms_ptr + programs + program, tl.sum(prior_sum, axis=0))
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
