"""Where the tensors of a loss lie in memory, and in which order the loss kernel walks over them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, common_divisor
from masked_loss_triton.kernels.stages import Resampling, split_position


class Operand(NamedTuple):
    """A tensor (B, C, F, H, W), or a mask (B, F, H, W): its pointer and its strides, those of b, c, f and h divided by DIVISOR."""

    ptr: torch.Tensor
    b: int
    c: int
    f: int
    h: int
    w: int

    @classmethod
    def of(cls, tensor: torch.Tensor | None, strides: tuple[int, ...] | None) -> Operand | None:
        return None if tensor is None or strides is None else cls(tensor, *strides)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the operands of one call lie together.

    Args:
        strides: of each operand, as `Operand` takes them; None where there is no operand.
        channels, positions: as the kernel counts them, under the fold.
        flat: the positions (F, H, W) of each operand are one run of memory. channels_innermost: neighbours in pred are channels.
        fold: 2 takes (C, P) as (C / 2, 2 P), pairs of channels as one row: where P is an odd multiple of 4, rows of 2-byte
            elements start on 8 bytes, pairs of rows on 16.
        divisor: the power of two, up to 16, that divides the number of positions and all strides. A kernel multiplies it back: the
            compiler then knows what divides them and reads 128 bits at a time also where they are not multiples of 16.
        itemsize: bytes of an element of the widest operand.
    """

    strides: tuple[tuple[int, ...] | None, ...]
    channels: int
    positions: int
    flat: bool
    channels_innermost: bool
    fold: int
    divisor: int
    itemsize: int

    @classmethod
    def over(cls, operands: Sequence[Layout | None]) -> Walk:
        """The walk over pred, target and whatever else has the shape of pred."""
        given = [tensor for tensor in operands if tensor is not None]
        _, channels, frames, height, width = given[0].shape
        positions = frames * height * width
        flat = all(tensor.position_stride is not None for tensor in given)
        itemsize = max(tensor.dtype.itemsize for tensor in given)
        in_rows = flat and all(tensor.strides[1] == positions for tensor in given)
        fold = 2 if in_rows and itemsize == 2 and positions % 8 == 4 and channels % 2 == 0 else 1

        def steps(tensor: Layout) -> tuple[int, ...]:
            b, c, *rest, w = tensor.used_strides
            return b, c * fold, *rest, tensor.position_stride or 0 if flat else w

        used = [step for tensor in given for step in steps(tensor)[: 2 if flat else 4]]
        divisor = common_divisor([positions * fold, *used], 16)
        strides = tuple(None if tensor is None else divided(steps(tensor), divisor) for tensor in operands)
        channels_innermost = channels > 1 and given[0].strides[1] == 1 and positions > 1
        return cls(strides, channels // fold, positions * fold, flat, channels_innermost, fold, divisor, itemsize)


def divided(steps: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """All steps divided, but the last, from one position to the next, which is a unit and no distance."""
    return *(step // divisor for step in steps[:-1]), steps[-1]


def mask_steps(mask: Layout | None) -> tuple[tuple[int, ...] | None, bool, int]:
    """(strides as `Operand` takes them, whether positions are one run, the divisor) of a mask on the grid of the loss."""
    if mask is None:
        return None, False, 1
    b, *rest = mask.used_strides
    flat = mask.position_stride == 1
    divisor = common_divisor([b], 16) if flat else 1
    return (b // divisor, 0, *rest), flat, divisor


def resampling(mask: Layout, grid: tuple[int, int, int], mode: str) -> tuple[Resampling, dict[str, bool | int | str]]:
    """(the numbers of a mask's way to the grid of the weights, the options of the kernel that go with them)."""
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
    flat = mask.shape[1:] == grid and mask.position_stride == 1
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


@triton.jit
def walked(shape, OPTIONS: tl.constexpr):
    """(positions of this program, whether each is inside, its cell in the grid (F, H, W), that cell's (frame, row, column)).

    Under the fold a position lies in a pair of channels, and two positions share a cell. All but the second are of the type that
    a product with strides needs.
    """
    _batch, _channels, frames, height, width = shape
    grid_positions = frames * height * width
    positions = grid_positions * OPTIONS.FOLD // OPTIONS.DIVISOR * OPTIONS.DIVISOR
    position = tl.program_id(0) * OPTIONS.BLOCK_P + tl.arange(0, OPTIONS.BLOCK_P)[None, :]
    inside = position < positions
    cell = position
    if OPTIONS.FOLD == 2:
        cell = tl.where(position < grid_positions, position, position - grid_positions)
        CELL_VECTOR: tl.constexpr = OPTIONS.CELL_VECTOR
        cell = tl.max_contiguous(tl.multiple_of(cell, (1, CELL_VECTOR)), (1, CELL_VECTOR))
    frame, row, column = split_position(cell, height, width)
    # 64-bit where a tensor spans 2^31 elements.
    cell = cell.to(OPTIONS.OFFSET)
    at = (frame.to(OPTIONS.OFFSET), row.to(OPTIONS.OFFSET), column.to(OPTIONS.OFFSET))
    # No thread takes more neighbours than fit 16 bytes of the widest operand: with 8 float32 beside 8 halves, each access would
    # use half of its sectors.
    VECTOR: tl.constexpr = OPTIONS.VECTOR
    return tl.max_contiguous(position, (1, VECTOR)).to(OPTIONS.OFFSET), inside, cell, at


@triton.jit
def offsets_of(tensor, b, at, position, OPTIONS: tl.constexpr):
    """Offsets of positions in channel 0 of sample b; a tensor whose positions are one run needs no (frame, row, column)."""
    start = b.to(tl.int64) * (tensor.b * OPTIONS.DIVISOR)
    if OPTIONS.FLAT:
        return start + position * tensor.w
    return start + (at[0] * (tensor.f * OPTIONS.DIVISOR) + at[1] * (tensor.h * OPTIONS.DIVISOR) + at[2] * tensor.w)
