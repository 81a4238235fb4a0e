"""The loss and its gradient block by block, in plain torch operations: what the `torch` backend does outside torch.compile.

A block is a run of memory wherever the tensors are, and small enough for the CPU's cache: pred and target are read from memory
once, and the gradient is written once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from masked_loss_triton.backend.expression import Operands, slope
from masked_loss_triton.backend.layout import position_stride
from masked_loss_triton.config import MaskedLossConfig

# Elements of a block for each thread of the CPU: difference, weights and three operands, 4 bytes each, fill a second-level cache of
# 2 MB; bench/README.md has the times of other sizes. On other devices a block only bounds the memory.
CPU_BLOCK = 3 << 15
DEVICE_BLOCK = 1 << 22


def in_memory_order(
    operands: Operands, gradient: torch.Tensor | None
) -> tuple[Operands, torch.Tensor | None, list[int]]:
    """Views with the axes in the order of pred's memory, and that order; axis 1 are the channels, as before.

    A block of the innermost axes is then one run of memory: each operation is one loop, and a dot product can take it as it is.
    Where the strides of all tensors allow it (F, H, W) is one axis, and is cut without regard to frames and rows.
    """
    pred, target, latents, prior, a, b = operands
    shape = pred.shape
    factors = [None if x is None else x.expand(shape) for x in (a, b)]
    tensors = [pred, target, latents, prior, *factors, gradient]
    steps = [None if x is None else position_stride(x.shape, x.stride()) for x in tensors]
    if all(x is None or step is not None for x, step in zip(tensors, steps, strict=True)):
        shape = torch.Size((shape[0], shape[1], math.prod(shape[2:])))
        tensors = [
            None if x is None else x.as_strided(shape, (x.stride(0), x.stride(1), step or 0))
            for x, step in zip(tensors, steps, strict=True)
        ]
    # Axes of one element come first, where they are in nobody's way.
    strides = [pred.stride(0), pred.stride(1), steps[0] or 0] if len(shape) == 3 else pred.stride()
    order = sorted(range(len(shape)), key=lambda axis: -strides[axis] if shape[axis] > 1 else -math.inf)
    if order != sorted(order):
        tensors = [None if x is None else x.permute(order) for x in tensors]
    *views, gradient = tensors
    return Operands(*views), gradient, order  # type: ignore[arg-type]


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


def split(tensor: torch.Tensor, steps: list[int], channel_axis: int) -> list[torch.Tensor]:
    """The blocks of a tensor as views. The channels of the same positions follow each other: their weights are in the cache.

    `split` and `unbind` make all views of an axis in one call; slices made one by one would take as long as the work on a block.
    """
    pieces, axes = [tensor], list(range(tensor.dim()))
    for axis in sorted(axes, key=lambda axis: axis == channel_axis):
        place = axes.index(axis)
        if steps[axis] == 1:
            pieces = [view for piece in pieces for view in piece.unbind(place)]
            axes.pop(place)
        elif steps[axis] < tensor.shape[axis]:
            pieces = [view for piece in pieces for view in piece.split(steps[axis], place)]
    return pieces


def terms(
    operands: Operands, gradient: torch.Tensor | None, channel_axis: int, flow_sign: int, config: MaskedLossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both terms of the loss, 0-d float32; the gradient is written into `gradient`, if there is one.

    Args:
        operands, gradient: as `in_memory_order` returns them; channel_axis: which of their axes are the channels.
    """
    pred = operands.pred
    has_prior = operands.prior is not None
    size = CPU_BLOCK * torch.get_num_threads() if pred.device.type == "cpu" else DEVICE_BLOCK
    steps = block_steps(pred.shape, size)
    # A float32 gradient is written where it belongs at once, and saves a buffer and a pass.
    direct = gradient is not None and pred.dtype == torch.float32
    buffers = torch.empty((2 - direct + has_prior, math.prod(steps)), dtype=torch.float32, device=pred.device)
    scratch: dict[torch.Size, list[torch.Tensor]] = {}
    target_terms, prior_terms = [], []
    given = [x for x in (*operands, gradient) if x is not None]
    for views in zip(*(split(x, steps, channel_axis) for x in given), strict=True):
        pieces = iter(views)
        block: list[Any] = [None if whole is None else next(pieces) for whole in (*operands, gradient)]
        p, t, x, q, a, b, g = block
        if p.shape not in scratch:
            scratch[p.shape] = [buffer[: p.numel()].view(p.shape) for buffer in buffers]
        difference, *spare = scratch[p.shape]
        psi = g if direct else spare[0]
        _subtract(difference, p, t, x, flow_sign, psi)
        target_terms.append(_weighted_error(difference, psi, a, config))
        if has_prior:
            _subtract(difference, p, q, None, 1, spare[-1])
            prior_terms.append(_weighted_error(difference, spare[-1], b, config))
            if g is not None:
                psi.add_(spare[-1])
        if g is not None and not direct:
            g.copy_(psi)
    target_term = torch.stack(target_terms).sum() / slope(config)
    prior_term = torch.stack(prior_terms).sum() / slope(config) if has_prior else torch.zeros_like(target_term)
    return target_term, prior_term


def _subtract(
    out: torch.Tensor,
    pred: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor | None,
    sign: int,
    spare: torch.Tensor,
) -> None:
    """out = pred - target in float32, whatever the dtypes; `spare` is a float32 buffer of the same shape."""
    if latents is not None:
        # In float32 the flow target is formed first and rounded once, as the other backends do.
        target = spare.copy_(target).sub_(latents)
    elif target.dtype != torch.float32:
        target = spare.copy_(target)  # into a buffer: mixed dtypes would be converted into fresh memory
    if pred.dtype != torch.float32:
        pred = out.copy_(pred)
    torch.sub(pred, target, alpha=sign, out=out)


def _weighted_error(
    difference: torch.Tensor, psi: torch.Tensor, factor: torch.Tensor, config: MaskedLossConfig
) -> torch.Tensor:
    """Leaves factor * rho'(difference) in psi, spoils difference, and returns sum(factor * rho(difference)).

    For mse the two of the slope is in the factor, and the result twice as large.
    """
    if config.loss_type == "mse":
        torch.mul(difference, factor, out=psi)
        return _dot(difference, psi)
    if config.loss_type == "l1":
        torch.sign(difference, out=psi)
    elif config.loss_type == "huber":
        torch.clamp(difference, -config.loss_delta, config.loss_delta, out=psi)
        difference.sub_(psi, alpha=0.5)
    else:
        torch.div(difference, config.loss_delta, out=psi)
        psi.clamp_(-1, 1)
        difference.sub_(psi, alpha=0.5 * config.loss_delta)
    psi.mul_(factor)
    return _dot(difference, psi)


def _dot(difference: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
    """sum(difference * psi); difference is a buffer, and may be spoiled."""
    if psi.is_contiguous():
        return torch.dot(difference, psi) if psi.dim() == 1 else torch.dot(difference.view(-1), psi.view(-1))
    return difference.mul_(psi).sum()
