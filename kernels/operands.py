"""Where the tensors of a loss lie in memory, and in which order the loss kernel walks over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, common_divisor


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


@triton.jit
def offsets_of(tensor, b, at, position, OPTIONS: tl.constexpr):
    """Offsets of positions in channel 0 of sample b; a tensor whose positions are one run needs no (frame, row, column)."""
    start = b.to(tl.int64) * (tensor.b * OPTIONS.DIVISOR)
    if OPTIONS.FLAT:
        return start + position * tensor.w
    return start + (at[0] * (tensor.f * OPTIONS.DIVISOR) + at[1] * (tensor.h * OPTIONS.DIVISOR) + at[2] * tensor.w)
