"""The stages of a weight, as helpers that the kernels share.

m = resample(clamp(mask));  m = [m > th];  m = 1 - m                    the raw mask, stages 0 to 2
w = floor(snap(blur(m)) ** gamma);  v = 1 - w  or  [m < th]             the weights, stages 3 to 7
"""

import triton
import triton.language as tl

# Values within this of 0 or 1 become 0 or 1: rounding must not create a region (see the table in the design, stage "snap").
SNAP = tl.constexpr(1e-6)

# How the prior's region is made; also the value of the constexpr PRIOR_REGION.
NO_PRIOR = tl.constexpr(0)
COMPLEMENT = tl.constexpr(1)
THRESHOLD = tl.constexpr(2)


@triton.jit
def read(value, IS_UINT8: tl.constexpr):
    """Stage 0. `where` and not minimum / maximum: NaN passes through."""
    value = value.to(tl.float32)
    if IS_UINT8:
        value = tl.math.div_rn(value, 255.0)
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
def tap(window_start, window_count, t, k, size_in, RESAMPLE: tl.constexpr):
    """Index and coefficient of tap k on one axis. For "area" the coefficient is 1 inside the window and 0 outside."""
    if RESAMPLE == "bilinear":
        # Below the first centre and behind the last one the border counts alone.
        index = tl.minimum(tl.maximum(window_start + k, 0), size_in - 1)
        return index, tl.where(k == 0, 1.0 - t, t)
    elif RESAMPLE == "bicubic":
        index = tl.minimum(tl.maximum(window_start - 1 + k, 0), size_in - 1)
        near = tl.where(k == 1, cubic_near(t), cubic_near(1.0 - t))
        far = tl.where(k == 0, cubic_far(t + 1.0), cubic_far(2.0 - t))
        return index, tl.where((k == 1) | (k == 2), near, far)
    else:
        inside = k < window_count
        return tl.where(inside, window_start + k, 0), tl.where(inside, 1.0, 0.0)


@triton.jit
def axis_window(index, size_in, size_out, scale, RESAMPLE: tl.constexpr):
    """Start, count and fraction of the taps of one spatial axis."""
    if RESAMPLE == "nearest":
        # torch multiplies by a rounded float32 scale, and so does this, to land on the same input.
        start = (index.to(tl.float32) * scale).to(tl.int32)
        return tl.minimum(start, size_in - 1), 1 + 0 * index, 0.0 * index.to(tl.float32)
    elif RESAMPLE == "nearest-exact":
        start = ((index.to(tl.float32) + 0.5) * scale).to(tl.int32)
        return tl.minimum(start, size_in - 1), 1 + 0 * index, 0.0 * index.to(tl.float32)
    elif RESAMPLE == "area":
        start, count = area_window(index, size_in, size_out)
        return start, count, 0.0 * index.to(tl.float32)
    else:
        start, t = linear_window(index, size_in, size_out)
        return start, 1 + 0 * index, t


@triton.jit
def resampled(
    mask_ptr,  # at the sample
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
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
):
    """Stages 0 and 1: the mask at the positions of the loss. Each mask value is read once per position that averages it.

    Rows, columns and frames are summed separately: the rounding error grows with each sum's own length.
    """
    f_start, f_count = area_window(frame, mask_frames, frames)
    h_start, h_count, h_t = axis_window(row, mask_height, height, scale_h, RESAMPLE)
    w_start, w_count, w_t = axis_window(column, mask_width, width, scale_w, RESAMPLE)
    total = tl.zeros(frame.shape, tl.float32)
    for kf in range(taps_f):
        in_time = kf < f_count
        of_frame = tl.zeros(frame.shape, tl.float32)
        for kh in range(taps_h):
            h_index, h_coefficient = tap(h_start, h_count, h_t, kh, mask_height, RESAMPLE)
            of_row = tl.zeros(frame.shape, tl.float32)
            for kw in range(taps_w):
                w_index, w_coefficient = tap(w_start, w_count, w_t, kw, mask_width, RESAMPLE)
                offsets = (
                    (f_start + kf).to(tl.int64) * mask_stride_f
                    + h_index.to(tl.int64) * mask_stride_h
                    + w_index.to(tl.int64) * mask_stride_w
                )
                wanted = valid & in_time
                if RESAMPLE == "area":
                    wanted = wanted & (kh < h_count) & (kw < w_count)
                value = read(tl.load(mask_ptr + offsets, mask=wanted, other=0), IS_UINT8)
                if RESAMPLE == "bilinear" or RESAMPLE == "bicubic":
                    value = value * w_coefficient
                of_row += value
            if RESAMPLE == "bilinear" or RESAMPLE == "bicubic":
                of_row = of_row * h_coefficient
            of_frame += of_row
        if RESAMPLE == "bicubic":
            of_frame = tl.where(of_frame > 1.0, 1.0, of_frame)
            of_frame = tl.where(of_frame < 0.0, 0.0, of_frame)
        total += of_frame
    count = f_count
    if RESAMPLE == "area":
        count = count * h_count * w_count
    return tl.math.div_rn(total, count.to(tl.float32))


@triton.jit
def averaged(
    mask_ptr,  # at the sample
    frame,
    row,
    column,
    valid,
    frames,
    mask_frames,
    mask_stride_f,
    mask_stride_h,
    taps_f,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    IS_UINT8: tl.constexpr,
):
    """`resampled` by area where every position covers WINDOW_H x WINDOW_W mask values exactly and rows are runs of memory.

    A row of a window is read at once: neighbours read neighbouring windows, and no sector is asked for twice.
    """
    f_start, f_count = area_window(frame, mask_frames, frames)
    tap_w = tl.arange(0, WINDOW_W)[None, :]
    total = tl.zeros(frame.shape, tl.float32)
    for kf in range(taps_f):
        wanted = (valid & (kf < f_count))[:, None]
        first = (f_start + kf).to(tl.int64) * mask_stride_f + (row * WINDOW_H).to(tl.int64) * mask_stride_h
        offsets = (first + column * WINDOW_W)[:, None] + tap_w
        of_frame = tl.zeros(frame.shape, tl.float32)
        for _ in range(WINDOW_H):
            value = tl.load(mask_ptr + offsets, mask=wanted, other=0)
            # Bytes are summed as they are, exactly, and divided by 255 once.
            of_frame += tl.sum(value.to(tl.float32) if IS_UINT8 else read(value, IS_UINT8), axis=1)
            offsets += mask_stride_h
        total += of_frame
    count = f_count * (WINDOW_H * WINDOW_W)
    return tl.math.div_rn(total, (count * 255 if IS_UINT8 else count).to(tl.float32))


@triton.jit
def on_grid_or_resampled(
    mask_ptr,  # at the sample
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
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    FLAT: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """Stages 0 and 1 by the shortest way: FLAT, a mask that is one run on the grid, needs no windows and no divisions."""
    if FLAT:
        return read(tl.load(mask_ptr + position, mask=valid, other=0), IS_UINT8)
    elif WINDOW_W > 1:
        return averaged(
            mask_ptr,
            frame,
            row,
            column,
            valid,
            frames,
            mask_frames,
            mask_stride_f,
            mask_stride_h,
            taps_f,
            WINDOW_H,
            WINDOW_W,
            IS_UINT8,
        )
    else:
        return resampled(
            mask_ptr,
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
        )


@triton.jit
def binarized_and_inverted(m, binarize, HAS_BINARIZE: tl.constexpr, INVERT: tl.constexpr):
    """The end of stage 1, and stage 2."""
    if HAS_BINARIZE:
        m = tl.where(m > binarize, 1.0, 0.0)
    if INVERT:
        m = 1.0 - m
    return m


@triton.jit
def gaussian_tap(distance, exponent, norm):
    """Stage 3: the weight of a neighbour. Computed and not loaded: a tensor of taps would have to come from the host."""
    return norm * tl.exp2(exponent * (distance * distance))


@triton.jit
def power(x, exponent):
    """x ** exponent for x >= 0; NaN stays NaN."""
    result = tl.exp2(exponent * tl.log2(tl.where(x > 0.0, x, 1.0)))
    return tl.where(x > 0.0, result, x)


@triton.jit
def target_and_prior_weight(
    raw,
    blurred,
    prior_gate,
    mask_gate,
    gamma,
    min_weight,
    prior_threshold,
    HAS_GAMMA: tl.constexpr,
    CLAMP_FLOOR: tl.constexpr,
    PRIOR_REGION: tl.constexpr,
    HAS_MASK_GATE: tl.constexpr,
):
    """Stages 4 to 7, the snap before them included: (w, v)."""
    w = tl.where(blurred <= SNAP, 0.0, blurred)
    w = tl.where(w >= 1.0 - SNAP, 1.0, w)
    if HAS_GAMMA:
        w = power(w, gamma)
    if CLAMP_FLOOR:
        w = tl.where(w < min_weight, min_weight, w)
    else:
        w = w * (1.0 - min_weight) + min_weight
    v = tl.zeros_like(w)
    if PRIOR_REGION == COMPLEMENT:
        v = (1.0 - w) * prior_gate
    elif PRIOR_REGION == THRESHOLD:
        v = tl.where(raw < prior_threshold, 1.0, 0.0) * prior_gate
        w = w * (1.0 - v)
    v = tl.where(v <= SNAP, 0.0, v)
    if HAS_MASK_GATE:
        w = tl.where(mask_gate, w, 1.0)
        v = tl.where(mask_gate, v, 0.0)
    return w, v


@triton.jit
def split_position(position, height, width):
    """(frame, row, column) of a flat position."""
    column = position % width
    rest = position // width
    return rest // height, rest % height, column


@triton.jit
def sample_gates(prior_gate_ptr, mask_gate_ptr, b, HAS_PRIOR_GATE: tl.constexpr, HAS_MASK_GATE: tl.constexpr):
    """The two gates of sample b, 1.0 and True where there is none."""
    prior_gate = 1.0
    mask_gate = True
    if HAS_PRIOR_GATE:
        prior_gate = tl.load(prior_gate_ptr + b).to(tl.float32)
    if HAS_MASK_GATE:
        mask_gate = tl.load(mask_gate_ptr + b) != 0
    return prior_gate, mask_gate
