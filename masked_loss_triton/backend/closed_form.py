"""The loss and its gradient together, in plain torch operations on any device: the backends `torch` and `compiled`.

    d = pred - target;  psi = rho'(d);  gradient = a psi;  loss = sum(gradient (d - psi's share)),   a = s w

For mse psi = 2 d and rho = psi d / 2; for l1 psi = sign(d) and rho = psi d; for huber psi = clamp(d, -delta, delta) and
rho = psi (d - psi / 2); for smooth_l1 psi = clamp(d / beta, -1, 1) and rho = psi (d - beta psi / 2). The loss is therefore one dot
product with the gradient, and no error tensor is ever written.

`torch` works in blocks that stay in the CPU's cache (blocks.py); `compiled` lets torch.compile make one loop of it (expression.py).
"""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.backend import blocks, distinct, expression, refuse_second_derivative, stages
from masked_loss_triton.backend.denominators import loss_factors
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.stats import MaskedLossStats


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool, compiled: bool = False
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d float32 and differentiable in pred, and the stats if asked for."""
    with torch.no_grad():
        raw, w, v = stages.call_weights(inputs, config, torch.float32)
        sum_w = w.sum(dim=(1, 2, 3)).expand(inputs.batch)
        # Sums that nobody asks for are not made: on a CPU each is another pass over the weights.
        sum_v = sum_w if inputs.prior is None else v.sum(dim=(1, 2, 3)).expand(inputs.batch)
        sum_raw = raw.sum(dim=(1, 2, 3)).expand(inputs.batch) if config.area_scale_beta else sum_w
        s, r = loss_factors(sum_w, sum_v, sum_raw, inputs, config)
        kept = (raw, w, v) if return_stats else None
        a = _times(w, expression.slope(config) * s, in_place=kept is None)
        b = None if inputs.prior is None else _times(v, expression.slope(config) * r, in_place=kept is None)
    del raw, w, v  # the weights are in a and b now; what is not kept makes room for the gradient
    tensors = (inputs.pred, inputs.target, inputs.latents, inputs.prior, a, b)
    options = (inputs.flow_sign, config, compiled)
    if torch.is_grad_enabled() and inputs.pred.requires_grad:
        total, target_term, prior_term = ClosedFormLoss.apply(*distinct(tensors), *options)
    else:
        with torch.no_grad():
            target_term, prior_term, _ = loss_and_gradient(*tensors, *options, write_gradient=False)
            total = target_term + prior_term
    return total, None if kept is None else MaskedLossStats.from_weights(target_term, prior_term, *kept)


def compiled_loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """`loss` by one function that torch.compile makes at the first call."""
    return loss(inputs, config, return_stats, compiled=True)


def _times(weight: torch.Tensor, factor: torch.Tensor, in_place: bool) -> torch.Tensor:
    """A weight (B or 1, F, H, W) times a factor (B,). In place, where nobody needs the weight again, costs no fresh memory."""
    factor = factor.view(-1, 1, 1, 1)
    if torch.compiler.is_compiling():
        product = weight * factor
        # The compiler writes what `as_strided` takes to memory. It would compute the stages of the weights anew for every channel.
        return product.as_strided(product.shape, product.stride())
    return weight.mul_(factor) if in_place and weight.shape[0] == factor.shape[0] else weight * factor


class ClosedFormLoss(torch.autograd.Function):
    """Writes the gradient in the forward; the backward scales it, or computes it again when it was already given away."""

    @staticmethod
    def forward(ctx: Any, pred, target, latents, prior, a, b, flow_sign, config, compiled):
        # float16 would lose gradients of 1e-7 before the loss scale reaches them: there the gradient waits for the backward.
        now = pred.dtype != torch.float16
        target_term, prior_term, gradient = loss_and_gradient(
            pred, target, latents, prior, a, b, flow_sign, config, compiled, write_gradient=now
        )
        ctx.options = flow_sign, config, compiled
        # A plain gradient is no saved tensor: the backward scales it in place and gives it away, once. The compiler does so itself.
        traced = torch.compiler.is_compiling()
        ctx.gradient = None if traced else gradient
        ctx.save_for_backward(gradient if traced else None, pred, target, latents, prior, a, b)
        ctx.mark_non_differentiable(target_term, prior_term)
        ctx.set_materialize_grads(False)  # else autograd launches a fill for each of them
        return target_term + prior_term, target_term, prior_term

    @staticmethod
    def backward(ctx: Any, grad_output, _target_term, _prior_term):
        refuse_second_derivative()
        saved, *tensors, a, b = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if saved is not None:
            gradient = (saved * grad_output).to(saved.dtype)
        elif gradient is None:
            factors = (grad_output * a, None if b is None else grad_output * b)
            pred, target, latents, prior = tensors
            _, _, gradient = loss_and_gradient(pred, target, latents, prior, *factors, *ctx.options)
        elif gradient.dtype != torch.float32 and gradient.device.type != "cpu":
            # Off the CPU, `mul_` would round grad_output to the dtype of the gradient before it multiplies.
            gradient = (gradient.float() * grad_output).to(gradient.dtype)
        elif not _is_known_one(grad_output):
            gradient.mul_(grad_output)
        return gradient, *([None] * 8)


def _is_known_one(value: torch.Tensor) -> bool:
    """True when the value can be looked at without waiting for a device, and is 1."""
    return type(value) is torch.Tensor and value.device.type == "cpu" and value.item() == 1.0


def loss_and_gradient(
    pred: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor | None,
    prior: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    flow_sign: int,
    config: MaskedLossConfig,
    compiled: bool = False,
    write_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both terms of the loss (0-d float32) and the gradient in pred's dtype, or None.

    Args:
        pred, target, latents, prior: (B, C, F, H, W), any strides.
        a, b: (B, F, H, W) float32, the weights times their factors and `expression.slope`.
    """
    tensors = expression.Operands(pred, target, latents, prior, a.unsqueeze(1), None if b is None else b.unsqueeze(1))
    if torch.compiler.is_compiling():
        return expression.terms(tensors, flow_sign, config.loss_type, config.loss_delta, write_gradient, (2, 3, 4))
    if compiled and expression.can_be_compiled(pred):
        operands, _, order = blocks.in_memory_order(tensors, None)
        target_term, prior_term, result = expression.compiled_terms(operands, flow_sign, config, write_gradient)
        if result is not None:
            result = result.permute([order.index(axis) for axis in range(len(order))]).view(pred.shape)
        return target_term, prior_term, result
    gradient = torch.empty_like(pred) if write_gradient else None
    operands, written, order = blocks.in_memory_order(tensors, gradient)
    target_term, prior_term = blocks.terms(operands, written, order.index(1), flow_sign, config)
    return target_term, prior_term, gradient
