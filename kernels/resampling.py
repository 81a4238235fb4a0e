"""The mask on its way to the grid of the loss, stages 0 to 2: averaged by area, interpolated, or read as it is."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, common_divisor
from masked_loss_triton.kernels.stages import number, raw_of, read, smaller, split_position


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
    """The mask at the positions of the loss, stages 0 and 1, and minus the largest value read (with STATS, else infinity).
    Each mask value is read once per position that averages it.

    Rows, columns and frames are summed separately: the rounding error grows with each sum's own length.

    Args:
        mask_ptr: at the sample. at: (frame, row, column). grid: (F, H, W) of the loss. how: `Resampling`.
    """
    f_start, f_count = area_window(at[0], how.frames, grid[0])
    h_start, h_count, h_t = axis_window(at[1], how.height, grid[1], how.scale_h, OPTIONS)
    w_start, w_count, w_t = axis_window(at[2], how.width, grid[2], how.scale_w, OPTIONS)
    total = tl.zeros(at[0].shape, tl.float32)
    minus_most = tl.full(at[0].shape, float("inf"), tl.float32)
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
                value = tl.load(mask_ptr + offsets, mask=wanted, other=0)
                if OPTIONS.STATS:
                    minus_most = smaller(minus_most, tl.where(wanted, -number(value), float("inf")))
                value = read(value)
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
    return tl.math.div_rn(total, count.to(tl.float32)), minus_most


@triton.jit
def averaged(mask_ptr, at, valid, grid, how, OPTIONS: tl.constexpr):
    """`resampled` by area where every position covers WINDOW_H x WINDOW_W mask values exactly and rows are runs of memory.

    A row of a window is read at once: neighbours read neighbouring windows, and no sector is asked for twice.
    """
    f_start, f_count = area_window(at[0], how.frames, grid[0])
    tap_w = tl.arange(0, OPTIONS.WINDOW_W)[None, :]
    total = tl.zeros(at[0].shape, tl.float32)
    minus_most = tl.full(at[0].shape, float("inf"), tl.float32)
    for kf in range(how.taps_f):
        wanted = (valid & (kf < f_count))[:, None]
        first = (f_start + kf).to(tl.int64) * how.f + (at[1] * OPTIONS.WINDOW_H).to(tl.int64) * how.h
        offsets = (first + at[2] * OPTIONS.WINDOW_W)[:, None] + tap_w
        of_frame = tl.zeros(at[0].shape, tl.float32)
        for _ in range(OPTIONS.WINDOW_H):
            value = tl.load(mask_ptr + offsets, mask=wanted, other=0)
            if OPTIONS.STATS:
                here = tl.where(wanted, -number(value), float("inf"))
                minus_most = smaller(minus_most, tl.reduce(here, 1, smaller))
            # Bytes are summed as they are, exactly, and divided by 255 once.
            of_frame += tl.sum(value.to(tl.float32) if value.dtype == tl.uint8 else read(value), axis=1)
            offsets += how.h
        total += of_frame
    count = f_count * (OPTIONS.WINDOW_H * OPTIONS.WINDOW_W)
    count = count * 255 if mask_ptr.dtype.element_ty == tl.uint8 else count
    return tl.math.div_rn(total, count.to(tl.float32)), minus_most


@triton.jit
def place(position, grid, OPTIONS: tl.constexpr):
    """(frame, row, column) of a position of the weights; PACKED: they lie patch by patch, each of 2 x 2."""
    if OPTIONS.PACKED:
        patch, within = position // 4, position % 4
        columns = grid[2] // 2
        return 0 * patch, patch // columns * 2 + within // 2, patch % columns * 2 + within % 2
    else:
        return split_position(position, grid[1], grid[2])


@triton.jit
def raw_mask(mask_ptr, position, valid, grid, how, stages, OPTIONS: tl.constexpr):
    """The raw mask, stages 0 to 2, and minus the largest value read (with STATS).

    FLAT, a mask that is one run on the grid, needs no windows and no divisions.
    """
    at = place(position, grid, OPTIONS)
    if OPTIONS.FLAT:
        value = tl.load(mask_ptr + position, mask=valid, other=0)
        m, minus_most = read(value), tl.where(valid, -number(value), float("inf"))
    elif OPTIONS.WINDOW_W > 1:
        m, minus_most = averaged(mask_ptr, at, valid, grid, how, OPTIONS)
    else:
        m, minus_most = resampled(mask_ptr, at, valid, grid, how, OPTIONS)
    return raw_of(m, stages, OPTIONS), minus_most


def resampling_of(
    mask: Layout, grid: tuple[int, int, int], mode: str, packed: bool = False
) -> tuple[Resampling, dict[str, bool | int | str]]:
    """The numbers of a mask's way to the grid, and the options that go with them. packed: see `place`."""
    _, mask_frames, mask_height, mask_width = mask.shape
    if (mask_height, mask_width) == grid[1:]:
        mode = "area"  # a window of one: the value itself, also beside a NaN
    spatial = {"area": None, "nearest": 1, "nearest-exact": 1, "bilinear": 2, "bicubic": 4}[mode]
    step = 0 if mask.shape[0] == 1 else mask.strides[0]
    divisor = common_divisor([math.prod(grid), step], 16)
    window_h, window_w = _windows(mask, grid, mode)
    numbers = Resampling(
        frames=mask_frames,
        height=mask_height,
        width=mask_width,
        b=step // divisor,
        f=mask.strides[1],
        h=mask.strides[2],
        w=mask.strides[3],
        taps_f=_most_taps(mask_frames, grid[0]),
        taps_h=spatial or _most_taps(mask_height, grid[1]),
        taps_w=spatial or _most_taps(mask_width, grid[2]),
        scale_h=mask_height / grid[1],
        scale_w=mask_width / grid[2],
    )
    flat = mask.shape[1:] == grid and mask.position_stride == 1 and not packed
    if flat:
        # Nothing else is read, and numbers that differ would be other kernels.
        numbers = Resampling(0, 0, 0, numbers.b, 0, 0, 1, 1, 1, 1, 1.0, 1.0)
    return numbers, dict(MODE=mode, FLAT=flat, WINDOW_H=window_h, WINDOW_W=window_w, DIVISOR=divisor)


def _windows(mask: Layout, grid: tuple[int, int, int], mode: str) -> tuple[int, int]:
    """The size of the window that each position covers exactly, 1 x 1 where there is none that can be read row by row."""
    down, down_rest = divmod(mask.shape[2], grid[1])
    across, across_rest = divmod(mask.shape[3], grid[2])
    exact = mode == "area" and mask.strides[3] == 1 and (down_rest, across_rest) == (0, 0)
    return (down, across) if exact and down <= 16 and across in (2, 4, 8, 16) else (1, 1)


@functools.cache
def _most_taps(size_in: int, size_out: int) -> int:
    """The longest window of an area average, in inputs."""
    return max(-((i + 1) * size_in // -size_out) - i * size_in // size_out for i in range(size_out))
