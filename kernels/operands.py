"""Where the tensors of a loss lie in memory, and in which order the loss kernel walks over them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, ceil_div, common_divisor, next_power_of_2
from masked_loss_triton.kernels.stages import split_position


@functools.cache
def warps() -> int:
    """The warps of 128 threads on the current device: 4, or 2 where AMD has waves of 64.

    With 4 waves of 64, two would share the positions, and every sum over channels would cross from one to the other.
    """
    wide = torch.version.hip is not None and torch.cuda.get_device_properties("cuda").warp_size == 64
    return 2 if wide else 4


def coded(sizes: Iterable[int], wanted: bool) -> tuple[int, ...]:
    """Sizes or strides as a kernel takes them: 2 n + 1, or as they are.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and for each combination of such integers: the
    buckets of one data set took dozens of kernels. 2 n + 1 is a 1 for 0 alone. What divides a size, a constant says
    (`Walk.divisor`). Wanted only where positions are one run of memory: elsewhere the compiler needs to know all that it can.
    """
    return tuple(2 * size + 1 for size in sizes) if wanted else tuple(sizes)


@triton.jit
def decoded(size, OPTIONS: tl.constexpr):
    """The number that `coded` took."""
    if OPTIONS.CODED:
        return size // 2  # not >>, which Triton's interpreter gets wrong between 2^31 and 2^32
    else:
        return size


class Operand(NamedTuple):
    """A tensor (B, C, F, H, W), or a mask (B, F, H, W): its pointer; its strides, all but w divided by DIVISOR, b and c coded."""

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
        flat: the positions (F, H, W) of each operand are one run of memory, or those of each frame are.
        frames: 1, or F where only those of each frame are one run, as in layered latents: a program then stays in one frame.
        channels_innermost: neighbours in pred are channels.
        fold: 2 takes (C, P) as (C / 2, 2 P), pairs of channels as one row: where P is an odd multiple of 4, rows of 2-byte
            elements start on 8 bytes, pairs of rows on 16.
        divisor: the power of two, up to 16, that divides the number of positions and all strides. A kernel multiplies it back: the
            compiler then knows what divides them and reads 128 bits at a time also where they are not multiples of 16.
        itemsize: bytes of an element of the widest operand.
        rows_of_four: not flat, but one frame of four columns that are neighbours in every operand, as in packed tokens.
    """

    strides: tuple[tuple[int, ...] | None, ...]
    channels: int
    positions: int
    flat: bool
    frames: int
    channels_innermost: bool
    fold: int
    divisor: int
    itemsize: int
    rows_of_four: bool

    @classmethod
    def over(cls, operands: Sequence[Layout | None]) -> Walk:
        """The walk over pred, target and whatever else has the shape of pred."""
        given = [tensor for tensor in operands if tensor is not None]
        _, channels, frames, height, width = given[0].shape
        runs = [tensor.position_stride for tensor in given]
        by_frame = None in runs and frames > 1
        if by_frame:
            runs = [tensor.position_stride_in_frame for tensor in given]
        flat = None not in runs
        by_frame = by_frame and flat
        positions = height * width if by_frame else frames * height * width
        itemsize = max(tensor.dtype.itemsize for tensor in given)
        in_rows = flat and all(tensor.strides[1] == positions for tensor in given)
        fold = 2 if in_rows and itemsize == 2 and positions % 8 == 4 and channels % 2 == 0 else 1

        def steps(tensor: Layout) -> tuple[int, ...]:
            b, c, f, h, w = tensor.used_strides
            if flat:  # strides that nobody reads must not make kernels of their own
                f, h = f if by_frame else 0, 0
                w = (tensor.position_stride_in_frame if by_frame else tensor.position_stride) or 0
            return b, c * fold, f, h, w

        used = [step for tensor in given for step in steps(tensor)[: (3 if by_frame else 2) if flat else 4]]
        divisor = common_divisor([positions * fold, *used], 16)
        strides = tuple(None if tensor is None else divided(steps(tensor), divisor) for tensor in operands)
        rows_of_four = not flat and frames == 1 and width == 4 and divisor % 4 == 0
        rows_of_four = rows_of_four and all(tensor.strides[4] == 1 for tensor in given)
        channels_innermost = channels > 1 and given[0].strides[1] == 1 and positions > 1
        return cls(
            strides,
            channels // fold,
            positions * fold,
            flat,
            frames if by_frame else 1,
            channels_innermost,
            fold,
            divisor,
            itemsize,
            rows_of_four,
        )


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
    f, h, w = (0, 0, 1) if flat else rest
    return (b // divisor, 0, f, h, w), flat, divisor


@dataclasses.dataclass(frozen=True)
class LossLaunch:
    """Launch configuration of the loss kernel.

    vector, block_p, block_c: a thread holds 16 bytes of one channel of the widest operand (4 float32 or 8 halves: one 128-bit
        access; a half beside a float32 is read 64 bits at a time, since 8 float32 per thread would leave half of each sector to
        the next access), 128 threads lie along the positions, and block_c channels are in flight per thread. Where channels are
        the innermost axis it is the other way. Where positions are not one run, each element has an offset of its own in every
        tensor: a thread takes 4 halves, and where rows are not known to be four, of 2 channels: some versions of Triton spill
        at 16 elements.
    channel_blocks: how many blocks of channels a program walks with the same weights in registers. All of them, so that the
        mask is read once, unless the grid would not fill the device: then the channels are split, and the mask, then small,
        comes from the second-level cache.
    registers: what a thread may use at most, and what the compiler is told. With 64, 8 programs of 128 threads fit on an NVIDIA
        multiprocessor, with the 96 that a prior takes 5, with the 128 of packed tokens 4, with the 168 of tensors
        that are not one run 3. Each has 16 KB in
        flight (4 channels x 16 bytes x 2 tensors x 128 threads), of halves 8 KB. 16 KB is what 3.35 TB/s times 0.6 microseconds
        need for each multiprocessor of an H100: two programs would do.
    """

    vector: int
    block_p: int
    block_c: int
    channel_blocks: int
    registers: int
    num_warps: int = dataclasses.field(default_factory=warps)
    without_prior: ClassVar[int] = 64
    with_prior: ClassVar[int] = 96
    packed: ClassVar[int] = 128  # rows of four
    scattered: ClassVar[int] = 168  # positions that are not one run

    @classmethod
    def choose(cls, batch: int, walk: Walk, has_prior: bool, multiprocessors: int) -> LossLaunch:
        vector = 16 // max(walk.itemsize, 2 if walk.flat else 4)
        if walk.channels_innermost:
            block_c = min(32, next_power_of_2(walk.channels))
            block_p = max(16, 128 * 16 // block_c)
        else:
            block_p = 128 * vector
            while block_p > 128 and block_p // 2 >= walk.positions:
                block_p //= 2
            block_c = min((16 if walk.flat or walk.rows_of_four else 8) // vector, next_power_of_2(walk.channels))
        all_blocks = ceil_div(walk.channels, block_c)
        programs = ceil_div(walk.positions, block_p) * batch * walk.frames
        # Two programs of four warps per multiprocessor keep 32 KB in flight there, of halves 16: what its memory latency needs.
        groups = min(all_blocks, max(1, ceil_div(2 * multiprocessors, programs) if programs < multiprocessors else 1))
        registers = cls.packed if walk.rows_of_four else cls.scattered
        if walk.flat:
            registers = cls.with_prior if has_prior else cls.without_prior
        return cls(vector, block_p, block_c, ceil_div(all_blocks, groups), registers)

    def options(self) -> dict[str, int]:
        """Options of the launch. Without the limit, ptxas may spill registers for an occupancy that nobody needs."""
        # Only the CUDA compiler knows the option; AMD's multiprocessors have twice the registers.
        limit = {} if torch.version.hip else dict(maxnreg=self.registers)
        return dict(num_warps=self.num_warps, **limit)


@triton.jit
def walked(shape, OPTIONS: tl.constexpr):
    """(positions of this program, whether each is inside, its cell in the grid (F, H, W), that cell's (frame, row, column)).

    Under the fold a position lies in a pair of channels, and two positions share a cell. All but the second are of the type that
    a product with strides needs.
    """
    _batch, _channels, frames, height, width = shape
    grid_positions = height * width if OPTIONS.BY_FRAME else frames * height * width
    positions = grid_positions * OPTIONS.FOLD // OPTIONS.DIVISOR * OPTIONS.DIVISOR
    position = tl.program_id(0) * OPTIONS.BLOCK_P + tl.arange(0, OPTIONS.BLOCK_P)[None, :]
    inside = position < positions
    cell = position
    if OPTIONS.FOLD == 2:
        cell = tl.where(position < grid_positions, position, position - grid_positions)
    if OPTIONS.ROWS_OF_FOUR:
        frame, row, column = 0 * cell, cell // 4, cell % 4
    else:
        frame, row, column = split_position(cell, height, width)
    if OPTIONS.BY_FRAME:
        frame = tl.program_id(2) % frames
        cell += frame * grid_positions
    if OPTIONS.FOLD == 2 or OPTIONS.BY_FRAME:
        CELL_VECTOR: tl.constexpr = OPTIONS.CELL_VECTOR
        cell = tl.max_contiguous(tl.multiple_of(cell, (1, CELL_VECTOR)), (1, CELL_VECTOR))
    # 64-bit where a tensor spans 2^31 elements.
    cell = cell.to(OPTIONS.OFFSET)
    at = (frame.to(OPTIONS.OFFSET), row.to(OPTIONS.OFFSET), column.to(OPTIONS.OFFSET))
    # No thread takes more neighbours than fit 16 bytes of the widest operand: with 8 float32 beside 8 halves, each access would
    # use half of its sectors.
    VECTOR: tl.constexpr = OPTIONS.VECTOR
    return tl.max_contiguous(position, (1, VECTOR)).to(OPTIONS.OFFSET), inside, cell, at


@triton.jit
def sizes_of(shape, OPTIONS: tl.constexpr):
    """(B, C, F, H, W), decoded."""
    batch, channels, frames, height, width = shape
    return (
        decoded(batch, OPTIONS),
        decoded(channels, OPTIONS),
        decoded(frames, OPTIONS),
        decoded(height, OPTIONS),
        decoded(width, OPTIONS),
    )


@triton.jit
def step_of(code, OPTIONS: tl.constexpr):
    """The stride of which an operand holds this as `b` or `c`."""
    return decoded(code, OPTIONS) * OPTIONS.DIVISOR


@triton.jit
def offsets_of(tensor, b, at, position, OPTIONS: tl.constexpr):
    """Offsets of positions in channel 0 of sample b; a tensor whose positions are one run needs no (row, column)."""
    start = b.to(tl.int64) * step_of(tensor.b, OPTIONS)
    if OPTIONS.BY_FRAME:
        start += at[0] * (tensor.f * OPTIONS.DIVISOR)
    if OPTIONS.FLAT:
        return start + position * tensor.w
    offsets = start + (at[0] * (tensor.f * OPTIONS.DIVISOR) + at[1] * (tensor.h * OPTIONS.DIVISOR) + at[2] * tensor.w)
    if OPTIONS.ROWS_OF_FOUR:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, 4)), (1, 4))
    return offsets
