"""How a tensor of the loss lies in memory. Shared by every backend; imports no Triton."""

from __future__ import annotations

import torch


def position_stride(tensor: torch.Tensor) -> int | None:
    """The step between neighbouring positions if the last three axes (F, H, W) are one run in memory, else None."""
    stride, run = None, 1
    for size, step in zip(reversed(tensor.shape[-3:]), reversed(tensor.stride()[-3:]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != stride * run:
            return None
        run *= size
    return 1 if stride is None else stride


def used_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides, 0 where an axis has one element: what stands there then is arbitrary, and would only look odd."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def span(tensor: torch.Tensor) -> int:
    """Number of elements between the first and the last element of one sample, both included."""
    return 1 + sum((size - 1) * abs(step) for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))


def common_divisor(numbers: list[int], limit: int) -> int:
    """The largest power of two, up to `limit`, that divides all of them.

    1 when one of them needs 64 bits: divided, it would be passed in 32, and multiplied back in 32.
    """
    divisor = limit if max(numbers) < 2**31 else 1
    while any(number % divisor for number in numbers):
        divisor //= 2
    return divisor
