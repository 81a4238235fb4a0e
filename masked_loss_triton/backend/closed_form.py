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

import math
from typing import Any

import torch

from masked_loss_triton import weights
from masked_loss_triton.backend import refuse_second_derivative
from masked_loss_triton.backend.blocks import block_steps, blocks, in_memory_order
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.inputs import LossInputs
from masked_loss_triton.reduction import loss_factors
from masked_loss_triton.stats import MaskedLossStats

# Elements of a block: two float32 buffers of 1 MB stay in a 2 MB second-level cache. Elsewhere a block only bounds the memory.
CPU_BLOCK = 3 << 15
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
        kept = (raw, w, v) if return_stats else None
        a = _times(w, slope(config) * s, in_place=kept is None)
        b = None if inputs.prior is None else _times(v, slope(config) * r, in_place=kept is None)
    del raw, w, v  # the weights are in a and b now; what is not kept makes room for the gradient
    arguments = (inputs.pred, inputs.target, inputs.latents, inputs.prior, a, b, inputs.flow_sign, config)
    if torch.is_grad_enabled() and inputs.pred.requires_grad:
        total, target_term, prior_term = ClosedFormLoss.apply(*arguments)
    else:
        target_term, prior_term, _ = loss_and_gradient(*arguments, write_gradient=False)
        total = target_term + prior_term
    return total, None if kept is None else MaskedLossStats.from_weights(target_term, prior_term, *kept)


def _times(weight: torch.Tensor, factor: torch.Tensor, in_place: bool) -> torch.Tensor:
    """A weight (B or 1, F, H, W) times a factor (B,). In place, where nobody needs the weight again, costs no fresh memory."""
    factor = factor.view(-1, 1, 1, 1)
    return weight.mul_(factor) if in_place and weight.shape[0] == factor.shape[0] else weight * factor


def slope(config: MaskedLossConfig) -> int:
    """The constant of rho': 2 for a square. It goes into the weights, which are few, instead of into every error."""
    return 2 if config.loss_type == "mse" else 1


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
        a, b: (B, F, H, W) float32, the weights times their factors and `slope`.
    """
    if torch.compiler.is_compiling():
        return _whole(pred, target, latents, prior, a, b, flow_sign, config, write_gradient)
    gradient = torch.empty_like(pred) if write_gradient else None
    tensors = [x for x in (pred, target, latents, prior, gradient) if x is not None]
    operands, factors, channel_axis = in_memory_order(tensors, [a] if b is None else [a, b])
    block_size = CPU_BLOCK * torch.get_num_threads() if pred.device.type == "cpu" else DEVICE_BLOCK
    steps = block_steps(operands[0].shape, block_size)
    # A float32 gradient is written where it belongs at once, and saves a buffer and a pass.
    direct = write_gradient and pred.dtype == torch.float32
    buffers = torch.empty((3 - direct - (b is None), math.prod(steps)), dtype=torch.float32, device=pred.device)
    scratch: dict[torch.Size, list[torch.Tensor]] = {}
    target_terms, prior_terms = [], []
    for views in zip(*(blocks(x, steps, channel_axis) for x in [*factors, *operands]), strict=True):
        pieces = iter(views)
        factor = next(pieces)
        prior_factor = None if b is None else next(pieces)
        p, t = next(pieces), next(pieces)
        x = None if latents is None else next(pieces)
        q = None if prior is None else next(pieces)
        g = next(pieces, None)
        if p.shape not in scratch:
            scratch[p.shape] = [buffer[: p.numel()].view(p.shape) for buffer in buffers]
        difference, *spare = scratch[p.shape]
        psi = g if direct and g is not None else spare[0]
        _subtract(difference, p, t, x, flow_sign, psi)
        target_terms.append(_weighted_error(difference, psi, factor, config))
        if q is not None and prior_factor is not None:
            prior_psi = spare[-1]
            _subtract(difference, p, q, None, 1, prior_psi)
            prior_terms.append(_weighted_error(difference, prior_psi, prior_factor, config))
            if g is not None:
                psi.add_(prior_psi)
        if g is not None and not direct:
            g.copy_(psi)
    target_term = torch.stack(target_terms).sum() / slope(config)
    prior_term = torch.stack(prior_terms).sum() / slope(config) if prior_terms else torch.zeros_like(target_term)
    return target_term, prior_term, gradient


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
        return torch.dot(difference.view(-1), psi.view(-1))
    return difference.mul_(psi).sum()


def _whole(pred, target, latents, prior, a, b, flow_sign, config, write_gradient):
    """The same without blocks or buffers: under torch.compile the compiler fuses it."""

    def term(other: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = pred.float() - other
        if config.loss_type == "mse":
            psi, share = difference, 0.5 * difference
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
