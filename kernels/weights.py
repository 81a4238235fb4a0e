"""From the mask to the sums of the weights, and to weight tensors where they are needed.

    sum(w), sum(v), sum(m)  over the positions of each sample        the stages of w and v: stages.py

`resample_kernel` writes the raw mask, needed only under a blur, which looks at neighbours. `weights_kernel` makes the sums, and
writes the weights where the loss kernel cannot make them again in registers from a mask on its own grid.
"""

import triton
import triton.language as tl

from masked_loss_triton.kernels.stages import (
    binarized_and_inverted,
    gaussian_tap,
    on_grid_or_resampled,
    sample_gates,
    split_position,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.sums import MIN_RAW, SUM_OVERLAP, SUM_RAW, SUM_V, SUM_W, smaller


@triton.jit
def resample_kernel(
    mask_ptr,
    raw_ptr,  # (B or 1, F or 1, H, W) float32, contiguous
    binarize,
    frames,
    height,
    width,
    mask_frames,
    mask_height,
    mask_width,
    mask_stride_b,
    mask_stride_f,
    mask_stride_h,
    mask_stride_w,
    taps_f,
    taps_h,
    taps_w,
    scale_h,
    scale_w,
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    FLAT: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    HAS_BINARIZE: tl.constexpr,
    INVERT: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the raw mask, grid (tiles, B or 1)."""
    b = tl.program_id(1).to(tl.int64)
    positions = frames * height * width // DIVISOR * DIVISOR
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = position < positions
    frame, row, column = split_position(position, height, width)
    m = on_grid_or_resampled(
        mask_ptr + b * (mask_stride_b * DIVISOR),
        position,
        frame,
        row,
        column,
        valid,
        frames,
        height,
        width,
        mask_frames,
        mask_height,
        mask_width,
        mask_stride_f,
        mask_stride_h,
        mask_stride_w,
        taps_f,
        taps_h,
        taps_w,
        scale_h,
        scale_w,
        RESAMPLE,
        IS_UINT8,
        FLAT,
        WINDOW_H,
        WINDOW_W,
    )
    m = binarized_and_inverted(m, binarize, HAS_BINARIZE, INVERT)
    tl.store(raw_ptr + b * positions + position, m, mask=valid)


@triton.jit
def weights_kernel(
    mask_ptr,  # the mask, or under a blur the raw mask
    prior_gate_ptr,  # (B,)
    mask_gate_ptr,  # (B,) bool
    w_ptr,  # (B, F or 1, H, W) float32, contiguous
    v_ptr,  # (B, F or 1, H, W) float32, contiguous
    partials_ptr,  # (PLANES, B, TILES) float32
    ticket_ptr,  # int32, set to 0 for the loss kernel that follows
    binarize,
    blur_exponent,
    blur_norm,
    gamma,
    min_weight,
    prior_threshold,
    frames,
    height,
    width,
    mask_frames,
    mask_height,
    mask_width,
    mask_stride_b,
    mask_stride_f,
    mask_stride_h,
    mask_stride_w,
    taps_f,
    taps_h,
    taps_w,
    scale_h,
    scale_w,
    blocks_per_tile,
    repeats,  # frames of the loss for each frame of weights
    HAS_MASK: tl.constexpr,
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    HAS_BINARIZE: tl.constexpr,
    INVERT: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    CLAMP_FLOOR: tl.constexpr,
    PRIOR_REGION: tl.constexpr,
    HAS_PRIOR_GATE: tl.constexpr,
    HAS_MASK_GATE: tl.constexpr,
    WRITE_W: tl.constexpr,
    WRITE_V: tl.constexpr,
    STATS: tl.constexpr,
    FLAT: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the weights if asked, and the partial sums of each tile; grid (tiles, B). A mask of one frame has weights of one.

    Sums over tiles are left to whoever reads them: a few dozen numbers, added in a fixed order, without atomics.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if (tile == 0) & (b == 0):
        tl.store(ticket_ptr, 0)
    # Divided and multiplied back: the compiler then knows what divides it, and a mask in one run is read 128 bits at a time.
    positions = frames * height * width // DIVISOR * DIVISOR
    prior_gate, mask_gate = sample_gates(prior_gate_ptr, mask_gate_ptr, b, HAS_PRIOR_GATE, HAS_MASK_GATE)

    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_raw = tl.zeros((BLOCK,), tl.float32)
    if STATS:
        sum_overlap = tl.zeros((BLOCK,), tl.float32)
        min_raw = tl.full((BLOCK,), float("inf"), tl.float32)
        max_raw = tl.full((BLOCK,), -float("inf"), tl.float32)
        min_w = tl.full((BLOCK,), float("inf"), tl.float32)
        max_w = tl.full((BLOCK,), -float("inf"), tl.float32)
        min_v = tl.full((BLOCK,), float("inf"), tl.float32)
        max_v = tl.full((BLOCK,), -float("inf"), tl.float32)

    for step in range(blocks_per_tile):
        position = (tile * blocks_per_tile + step) * BLOCK + tl.arange(0, BLOCK)
        valid = position < positions
        frame, row, column = split_position(position, height, width)
        if HAS_MASK:
            if KERNEL_SIZE > 1:
                sample_ptr = mask_ptr + b * (mask_stride_b * DIVISOR)
                raw = tl.load(sample_ptr + position, mask=valid, other=0.0)
                blurred = tl.zeros((BLOCK,), tl.float32)
                for kh in range(KERNEL_SIZE):
                    tap_row = tl.minimum(tl.maximum(row + kh - KERNEL_SIZE // 2, 0), height - 1)
                    of_row = tl.zeros((BLOCK,), tl.float32)
                    for kw in range(KERNEL_SIZE):
                        tap_column = tl.minimum(tl.maximum(column + kw - KERNEL_SIZE // 2, 0), width - 1)
                        neighbour = (frame * height + tap_row) * width + tap_column
                        value = tl.load(sample_ptr + neighbour, mask=valid, other=0.0)
                        of_row += gaussian_tap(kw - KERNEL_SIZE // 2, blur_exponent, blur_norm) * value
                    blurred += gaussian_tap(kh - KERNEL_SIZE // 2, blur_exponent, blur_norm) * of_row
            else:
                raw = on_grid_or_resampled(
                    mask_ptr + b * (mask_stride_b * DIVISOR),
                    position,
                    frame,
                    row,
                    column,
                    valid,
                    frames,
                    height,
                    width,
                    mask_frames,
                    mask_height,
                    mask_width,
                    mask_stride_f,
                    mask_stride_h,
                    mask_stride_w,
                    taps_f,
                    taps_h,
                    taps_w,
                    scale_h,
                    scale_w,
                    RESAMPLE,
                    IS_UINT8,
                    FLAT,
                    WINDOW_H,
                    WINDOW_W,
                )
                raw = binarized_and_inverted(raw, binarize, HAS_BINARIZE, INVERT)
                blurred = raw
        else:
            raw = tl.full((BLOCK,), 1.0, tl.float32)
            blurred = raw
        w, v = target_and_prior_weight(
            raw,
            blurred,
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
        if HAS_MASK_GATE:
            raw = tl.where(mask_gate, raw, 1.0)
        if WRITE_W:
            tl.store(w_ptr + b * positions + position, w, mask=valid)
        if WRITE_V:
            tl.store(v_ptr + b * positions + position, v, mask=valid)
        sum_w += tl.where(valid, w, 0.0)
        sum_v += tl.where(valid, v, 0.0)
        sum_raw += tl.where(valid, raw, 0.0)
        if STATS:
            sum_overlap += tl.where(valid, tl.where(w < v, w, v), 0.0)
            min_raw = smaller(min_raw, tl.where(valid, raw, float("inf")))
            max_raw = -smaller(-max_raw, tl.where(valid, -raw, float("inf")))
            min_w = smaller(min_w, tl.where(valid, w, float("inf")))
            max_w = -smaller(-max_w, tl.where(valid, -w, float("inf")))
            min_v = smaller(min_v, tl.where(valid, v, float("inf")))
            max_v = -smaller(-max_v, tl.where(valid, -v, float("inf")))

    tiles = tl.num_programs(0)
    plane = tl.num_programs(1) * tiles
    partial_ptr = partials_ptr + b * tiles + tile
    tl.store(partial_ptr + SUM_W * plane, tl.sum(sum_w, axis=0) * repeats)
    tl.store(partial_ptr + SUM_V * plane, tl.sum(sum_v, axis=0) * repeats)
    tl.store(partial_ptr + SUM_RAW * plane, tl.sum(sum_raw, axis=0) * repeats)
    if STATS:
        tl.store(partial_ptr + SUM_OVERLAP * plane, tl.sum(sum_overlap, axis=0) * repeats)
        tl.store(partial_ptr + MIN_RAW * plane, tl.reduce(min_raw, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 1) * plane, -tl.reduce(-max_raw, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 2) * plane, tl.reduce(min_w, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 3) * plane, -tl.reduce(-max_w, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 4) * plane, tl.reduce(min_v, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 5) * plane, -tl.reduce(-max_v, 0, smaller))
