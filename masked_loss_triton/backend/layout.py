"""How a tensor of the loss lies in memory. Shared by every backend; imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """All of a tensor that decides how a kernel reads it. Hashable: a launch is planned once for each combination."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> Layout | None:
        return None if tensor is None else cls(tensor.shape, tensor.stride(), tensor.dtype)

    @property
    def position_stride(self) -> int | None:
        return position_stride(self.shape, self.strides)

    @property
    def position_stride_in_frame(self) -> int | None:
        return position_stride((1, *self.shape[-2:]), (0, *self.strides[-2:]))

    @property
    def used_strides(self) -> tuple[int, ...]:
        """The strides, 0 where an axis has one element: what stands there then is arbitrary, and would only look odd."""
        return tuple(0 if size == 1 else step for size, step in zip(self.shape, self.strides, strict=True))

    @property
    def span(self) -> int:
        """Number of elements between the first and the last element of one sample, both included."""
        return 1 + sum((size - 1) * abs(step) for size, step in zip(self.shape[1:], self.strides[1:], strict=True))


def as_given(value: torch.Tensor, layout: str, dim: int) -> torch.Tensor:
    """The view of a (B, C, F, H, W) tensor that has the axes of a pred of `dim` axes as it was given in `layout`."""
    if layout == "layered":
        return value.transpose(1, 2)
    return value.squeeze(2) if dim == 4 else value


def position_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The step between neighbouring positions if the last three axes (F, H, W) are one run in memory, else None."""
    stride, run = None, 1
    for size, step in zip(reversed(shape[-3:]), reversed(strides[-3:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != stride * run:
            return None
        run *= size
    return 1 if stride is None else stride


def common_divisor(numbers: list[int], limit: int) -> int:
    """The largest power of two, up to `limit`, that divides all of them.

    1 when one of them needs 64 bits: divided, it would be passed in 32, and multiplied back in 32.
    """
    divisor = limit if max(numbers) < 2**31 else 1
    while any(number % divisor for number in numbers):
        divisor //= 2
    return divisor


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up. On the host Triton's own takes some microseconds, and a launch needs a dozen."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not smaller than `number` >= 1."""
    return 1 << (number - 1).bit_length()
