"""How the torch backend cuts one call into blocks: contiguous wherever the tensors are, and small enough for the CPU's cache."""

from __future__ import annotations

import torch

from masked_loss_triton.kernels.strides import position_stride


def in_memory_order(
    tensors: list[torch.Tensor], factors: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Views with the axes in the order of the first tensor's memory, and where its channels are among them.

    Args:
        tensors: (B, C, F, H, W) each.
        factors: (B, F, H, W) each; they come back with an axis of channels of step 0.

    A block of the innermost axes is then one run of memory: each operation is one loop, and a dot product can take it as it is.
    Where the strides of all tensors allow it (F, H, W) is one axis, and is cut without regard to frames and rows.
    """
    shape = tensors[0].shape
    factors = [factor.unsqueeze(1).expand(shape) for factor in factors]
    steps = [position_stride(tensor) for tensor in [*tensors, *factors]]
    if None not in steps:
        shape = torch.Size((shape[0], shape[1], shape[2] * shape[3] * shape[4]))
        views = [
            x.as_strided(shape, (x.stride(0), x.stride(1), step or 0))
            for x, step in zip([*tensors, *factors], steps, strict=True)
        ]
        tensors, factors = views[: len(tensors)], views[len(tensors) :]
    order = sorted(range(len(shape)), key=lambda axis: -tensors[0].stride()[axis] if shape[axis] > 1 else 0)
    return [x.permute(order) for x in tensors], [x.permute(order) for x in factors], order.index(1)


def block_steps(shape: torch.Size, size: int) -> list[int]:
    """How far each axis is cut: blocks of at most `size` elements, innermost axes first, of nearly equal size."""
    steps = [1] * len(shape)
    for axis in reversed(range(len(shape))):
        pieces = -(-shape[axis] // max(1, size))
        steps[axis] = -(-shape[axis] // pieces)
        size //= steps[axis]
        if pieces > 1:
            break
    return steps


def blocks(tensor: torch.Tensor, steps: list[int], channel_axis: int) -> list[torch.Tensor]:
    """The blocks of a tensor as views. The channels of the same positions follow each other: their weights are in the cache.

    `split` makes all views of an axis in one call; slices made one by one would take as long as the work on a block.
    """
    pieces = [tensor]
    for axis in sorted(range(len(steps)), key=lambda axis: axis == channel_axis):
        if steps[axis] < tensor.shape[axis]:
            pieces = [view for piece in pieces for view in piece.split(steps[axis], axis)]
    return pieces
