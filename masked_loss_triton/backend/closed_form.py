"""The loss and its gradient together, in plain torch operations on any device: the `torch` backend.

    d = pred - target;  psi = rho'(d);  gradient = a psi;  loss = sum(gradient (d - psi's share)),   a = s w

For mse psi = 2 d and rho = psi d / 2; for l1 psi = sign(d) and rho = psi d; for huber psi = clamp(d, -delta, delta) and
rho = psi (d - psi / 2); for smooth_l1 psi = clamp(d / beta, -1, 1) and rho = psi (d - beta psi / 2). The loss is therefore one dot
product with the gradient, and no error tensor is ever written.

On the CPU the work goes in blocks that stay in the second-level cache, so that pred and target are read from memory once and the
gradient is written once. Measured at (1, 16, 21, 60, 104) float32 on 2 cores: blocks of 2**18 elements 1.4 ms, 2**16 1.9 ms, 2**19
1.7 ms, the best eager recipe 4.5 ms (`make bench` repeats it).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from masked_loss_triton import weights
from masked_loss_triton.backend import refuse_second_derivative
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.inputs import LossInputs
from masked_loss_triton.kernels.strides import position_stride
from masked_loss_triton.reduction import loss_factors
from masked_loss_triton.stats import MaskedLossStats

# Elements of a block: two float32 buffers of 1 MB stay in a 2 MB second-level cache. Elsewhere a block only bounds the memory.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 22


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d float32 and differentiable in pred, and the stats if asked for."""
    with torch.no_grad():
        raw, w, v = weights.call_weights(inputs, config, torch.float32)
        sum_w = w.sum(dim=(1, 2, 3)).expand(inputs.batch)
        # Sums that nobody asks for are not made: on a CPU each is another pass over the weights.
        sum_v = sum_w if inputs.prior is None else v.sum(dim=(1, 2, 3)).expand(inputs.batch)
        sum_raw = raw.sum(dim=(1, 2, 3)).expand(inputs.batch) if config.area_scale_beta else sum_w
        s, r = loss_factors(sum_w, sum_v, sum_raw, inputs, config)
        a = s.view(-1, 1, 1, 1) * w
        b = None if inputs.prior is None else r.view(-1, 1, 1, 1) * v
    kept = (raw, w, v) if return_stats else None
    del raw, w, v  # the weights are in a and b now; what is not kept makes room for the gradient
    arguments = (inputs.pred, inputs.target, inputs.latents, inputs.prior, a, b, inputs.flow_sign, config)
    if torch.is_grad_enabled() and inputs.pred.requires_grad:
        total, target_term, prior_term = ClosedFormLoss.apply(*arguments)
    else:
        target_term, prior_term, _ = loss_and_gradient(*arguments, write_gradient=False)
        total = target_term + prior_term
    return total, None if kept is None else MaskedLossStats.from_weights(target_term, prior_term, *kept)


class ClosedFormLoss(torch.autograd.Function):
    """Writes the gradient in the forward; the backward scales it, or computes it again when it was already given away."""

    @staticmethod
    def forward(ctx: Any, pred, target, latents, prior, a, b, flow_sign, config):
        # float16 would lose gradients of 1e-7 before the loss scale reaches them: there the gradient waits for the backward.
        eager = pred.dtype != torch.float16
        target_term, prior_term, gradient = loss_and_gradient(
            pred, target, latents, prior, a, b, flow_sign, config, write_gradient=eager
        )
        ctx.options = flow_sign, config
        if torch.compiler.is_compiling():
            ctx.gradient = None
            ctx.save_for_backward(gradient if eager else None, pred, target, latents, prior, a, b)
        else:
            # Not a saved tensor: the backward scales it in place and gives it away, once.
            ctx.gradient = gradient
            ctx.save_for_backward(None, pred, target, latents, prior, a, b)
        ctx.mark_non_differentiable(target_term, prior_term)
        ctx.set_materialize_grads(False)  # else autograd launches a fill for each of them
        return target_term + prior_term, target_term, prior_term

    @staticmethod
    def backward(ctx: Any, grad_output, _target_term, _prior_term):
        refuse_second_derivative()
        saved, pred, target, latents, prior, a, b = ctx.saved_tensors
        flow_sign, config = ctx.options
        gradient, ctx.gradient = ctx.gradient, None
        if saved is not None:
            gradient = (saved * grad_output).to(saved.dtype)
        elif gradient is None:
            factors = (grad_output * a, None if b is None else grad_output * b)
            _, _, gradient = loss_and_gradient(pred, target, latents, prior, *factors, flow_sign, config)
        elif gradient.dtype != torch.float32 and gradient.device.type != "cpu":
            # Off the CPU, `mul_` would round grad_output to the dtype of the gradient before it multiplies.
            gradient = (gradient.float() * grad_output).to(gradient.dtype)
        elif not _is_known_one(grad_output):
            gradient.mul_(grad_output)
        return gradient, None, None, None, None, None, None, None


def _is_known_one(value: torch.Tensor) -> bool:
    """True when the value can be looked at without waiting for a device, and is 1."""
    return type(value) is torch.Tensor and value.device.type == "cpu" and value.item() == 1.0


def loss_and_gradient(
    pred: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor | None,
    prior: torch.Tensor | None,
    a: Any,
    b: Any,
    flow_sign: int,
    config: MaskedLossConfig,
    write_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both terms of the loss (0-d float32) and the gradient in pred's dtype, or None.

    Args:
        pred, target, latents, prior: (B, C, F, H, W), any strides.
        a, b: (B, F, H, W) float32, the weights times their factors.
    """
    if torch.compiler.is_compiling():
        return _whole(pred, target, latents, prior, a, b, flow_sign, config, write_gradient)
    gradient = torch.empty_like(pred) if write_gradient else None
    operands = _with_one_axis_of_positions([x for x in (pred, target, latents, prior, gradient) if x is not None])
    shape = operands[0].shape
    a, b = (None if factor is None else factor.reshape(shape[0], *shape[2:]) for factor in (a, b))
    block_size = CPU_BLOCK if pred.device.type == "cpu" else DEVICE_BLOCK
    # A float32 gradient is written where it belongs at once, and saves a buffer and a pass.
    direct = write_gradient and pred.dtype == torch.float32
    size = min(pred.numel(), max(block_size, shape[1]))
    buffers = torch.empty((3 - direct - (b is None), size), dtype=torch.float32, device=pred.device)
    target_terms, prior_terms = [], []
    for block in _blocks(shape, block_size):
        views = iter([operand[block[0], :, block[1], block[2], block[3]] for operand in operands])
        p, t = next(views), next(views)
        x = None if latents is None else next(views)
        q = None if prior is None else next(views)
        g = next(views, None)
        scratch = iter([row[: p.numel()].view(p.shape) for row in buffers])
        difference = next(scratch)
        result = g if direct and g is not None else next(scratch)
        _subtract(difference, p, t, x, flow_sign)
        target_terms.append(_weighted_error(difference, result, a[block], config))
        if q is not None:
            psi = next(scratch)
            _subtract(difference, p, q, None, 1)
            prior_terms.append(_weighted_error(difference, psi, b[block], config))
            result.add_(psi)
        if g is not None and not direct:
            g.copy_(result)
    target_term = torch.stack(target_terms).sum()
    prior_term = torch.stack(prior_terms).sum() if prior_terms else torch.zeros_like(target_term)
    return target_term, prior_term, gradient


def _subtract(
    out: torch.Tensor, pred: torch.Tensor, target: torch.Tensor, latents: torch.Tensor | None, sign: int
) -> None:
    """out = pred - target in float32, whatever the dtypes."""
    if pred.dtype == target.dtype == torch.float32 and latents is None:
        torch.sub(pred, target, out=out)  # one pass less than below
        return
    out.copy_(pred)
    if latents is None:
        out.sub_(target)
        return
    # In float32 the flow target is formed first and rounded once, as the other backends do.
    formed = target.to(torch.float32, copy=True).sub_(latents)
    out.sub_(formed, alpha=sign)


def _weighted_error(
    difference: torch.Tensor, psi: torch.Tensor, factor: torch.Tensor, config: MaskedLossConfig
) -> torch.Tensor:
    """Leaves factor * rho'(difference) in psi, spoils difference, and returns sum(factor * rho(difference))."""
    factor = factor.unsqueeze(1)
    if config.loss_type == "mse":
        torch.mul(difference, 2 * factor, out=psi)
        return _dot(difference, psi) / 2
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
        return torch.dot(difference.view(-1), psi.view(-1))
    return difference.mul_(psi).sum()


def _with_one_axis_of_positions(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors as views (B, C, 1, 1, P), if the strides of all of them allow it; otherwise as they came."""
    steps = [position_stride(tensor) for tensor in tensors]
    if None in steps:
        return tensors
    views = []
    batch, channels, frames, height, width = tensors[0].shape
    shape = (batch, channels, 1, 1, frames * height * width)
    for tensor, step in zip(tensors, steps, strict=True):
        views.append(tensor.as_strided(shape, (tensor.stride(0), tensor.stride(1), 0, 0, step or 0)))
    return views


def _blocks(shape: torch.Size, block_size: int) -> Iterator[tuple[slice, ...]]:
    """Slices (b, f, h, w) that cover (B, C, F, H, W) in blocks of at most `block_size` elements, innermost axes first."""
    batch, channels, *grid = shape
    sizes = [batch, *grid]
    steps = [1] * 4
    budget = max(1, block_size // channels)
    for axis in (3, 2, 1, 0):
        steps[axis] = min(sizes[axis], budget)
        if steps[axis] < sizes[axis]:
            break
        budget //= steps[axis]
        if budget == 0:
            break
    ranges = [[slice(i, i + step) for i in range(0, size, step)] for size, step in zip(sizes, steps, strict=True)]
    return itertools.product(*ranges)


def _whole(pred, target, latents, prior, a, b, flow_sign, config, write_gradient):
    """The same without blocks or buffers: under torch.compile the compiler fuses it."""

    def term(other: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = pred.float() - other
        if config.loss_type == "mse":
            psi, share = 2 * difference, 0.5 * difference
        elif config.loss_type == "l1":
            psi, share = torch.sign(difference), difference
        elif config.loss_type == "huber":
            psi = difference.clamp(-config.loss_delta, config.loss_delta)
            share = difference - 0.5 * psi
        else:
            psi = (difference / config.loss_delta).clamp(-1, 1)
            share = difference - 0.5 * config.loss_delta * psi
        gradient = factor.unsqueeze(1) * psi
        return (gradient * share).sum(), gradient

    formed = target.float() if latents is None else flow_sign * (target.float() - latents.float())
    target_term, gradient = term(formed, a)
    prior_term = torch.zeros_like(target_term)
    if prior is not None:
        prior_term, prior_gradient = term(prior.float(), b)
        gradient = gradient + prior_gradient
    return target_term, prior_term, gradient.to(pred.dtype) if write_gradient else None
