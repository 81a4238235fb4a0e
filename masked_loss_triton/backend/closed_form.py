"""The `torch` backend: the loss and its gradient together, in plain torch operations on any device.

    d = pred - target;  loss = sum(a rho(d));  gradient = a rho'(d),    a = the weights times the factor of their sample

and the same for the prior. Plainly called, it goes block by block: what one operation writes, the next finds in the cache, and
nothing of the size of pred is made but the gradient. Under torch.compile it is one expression, which becomes one loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from masked_loss_triton.backend import distinct, refuse_second_derivative, stages
from masked_loss_triton.backend.denominators import Factor, unexpanded_factors
from masked_loss_triton.backend.formulas import error_and_slope
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.stats import MaskedLossStats

# Elements of a block, on a CPU for each of its threads: each block costs a dozen calls of torch, and a float32 buffer of them takes
# 1 MB of the caches (bench/README.md). On other devices a block only bounds the memory.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 22


class Operands(NamedTuple):
    """What a loss is made of: views of one shape (B, C, F, H, W), any strides; None where the call has no such tensor."""

    pred: torch.Tensor
    target: torch.Tensor  # or the noise
    latents: torch.Tensor | None
    prior: torch.Tensor | None
    a: torch.Tensor  # (B or 1, 1, F, H, W) float32
    b: torch.Tensor | None  # like a, for the prior
    delta: torch.Tensor | None  # (B, 1, 1, 1, 1) float32, or None: that of `Options`
    inside: torch.Tensor | None  # (B or 1, 1, F, H, W) float32: the raw mask, for the stats


class Options(NamedTuple):
    """Numbers and words of a call."""

    flow_sign: int
    loss_type: str
    loss_delta: float


class Result(NamedTuple):
    """Sums of errors, 0-d float32, and the gradient as pred.

    target, prior: weighted by a or b; then, for the stats, the plain errors inside and outside of the mask. Empty without a prior.
    """

    target: list[torch.Tensor]
    prior: list[torch.Tensor]
    gradient: torch.Tensor | None


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d float32 and differentiable in pred, and the stats if asked for."""
    # No no_grad: what requires grad beside pred was refused.
    raw, w, v = stages.call_weights(inputs, config, torch.float32)
    sum_w = _sum_of(w, inputs.batch)
    # Sums that nobody asks for are not made: on a CPU each is another pass over the weights.
    sum_v = sum_w if inputs.prior is None else _sum_of(v, inputs.batch)
    sum_raw = _sum_of(raw, inputs.batch) if config.area_scale_beta else sum_w
    s, r = unexpanded_factors(sum_w, sum_v, sum_raw, inputs, config)
    a = _times(w, s)
    b = None if inputs.prior is None else _times(v, r)
    kept = (raw, w, v) if return_stats else None
    del raw, w, v  # the weights are in a and b now; what is not kept makes room for the gradient
    inside = None if kept is None else kept[0].unsqueeze(1)
    delta = inputs.delta(config, torch.float32)
    deltas = delta if isinstance(delta, torch.Tensor) else None
    operands = Operands(inputs.pred, inputs.target, inputs.latents, inputs.prior, a, b, deltas, inside)
    options = Options(inputs.flow_sign, config.loss_type, config.loss_delta)
    if torch.is_grad_enabled() and inputs.pred.requires_grad:
        total, *sums = ClosedFormLoss.apply(*distinct(operands), options)
    else:
        total, *sums = _outputs(loss_and_gradient(operands, options, write_gradient=False))
    if kept is None or inside is None:
        return total, None
    sums += [torch.zeros_like(total)] * (6 - len(sums))
    target_term, *errors, prior_term, drift_inside, drift_outside = sums
    means = stages.mean_errors((*errors, drift_inside, drift_outside), inside, inputs.batch * inputs.channels)
    return total, MaskedLossStats.from_weights(target_term, prior_term, *kept, means, inputs.mask)


def _outputs(result: Result) -> tuple[torch.Tensor, ...]:
    """The loss, and where it was computed for the stats all sums that `Result` holds."""
    total = result.target[0] + result.prior[0] if result.prior else result.target[0]
    if len(result.target) == 1:
        return (total,)
    # Autograd takes no tensor as two outputs of one function.
    return (total if result.prior else total.clone(), *result.target, *result.prior)


def _sum_of(weight: torch.Tensor, batch: int) -> torch.Tensor:
    """The sums over the positions of each sample, (B,), of a weight (B or 1, F, H, W)."""
    sums = weight.sum(dim=(1, 2, 3))
    return sums if sums.shape[0] == batch else sums.expand(batch)


def _times(weight: torch.Tensor, factor: Factor) -> torch.Tensor:
    """A weight (B or 1, F, H, W) times the factor of its sample, as (B or 1, 1, F, H, W)."""
    if isinstance(factor, torch.Tensor) and factor.dim():
        factor = factor.view(-1, 1, 1, 1, 1)
    product = weight.unsqueeze(1) * factor
    if torch.compiler.is_compiling():
        # The compiler writes what `as_strided` takes to memory. It would compute the stages of the weights anew for every channel.
        return product.as_strided(product.shape, product.stride())
    return product


class ClosedFormLoss(torch.autograd.Function):
    """Writes the gradient in the forward; the backward scales it, or computes it again when it was already given away."""

    @staticmethod
    def forward(ctx: Any, pred, target, latents, prior, a, b, delta, inside, options):
        operands = Operands(pred, target, latents, prior, a, b, delta, inside)
        # float16 would lose gradients of 1e-7 before the loss scale reaches them: there the gradient waits for the backward.
        result = loss_and_gradient(operands, options, pred.dtype != torch.float16)
        gradient, (total, *sums) = result.gradient, _outputs(result)
        ctx.options = options
        # A plain gradient is no saved tensor: the backward scales it in place and gives it away, once. The compiler does so itself.
        traced = torch.compiler.is_compiling()
        ctx.gradient = None if traced else gradient
        ctx.save_for_backward(gradient if traced else None, *operands[:-1])
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)  # else autograd launches a fill for each of them
        return total, *sums

    @staticmethod
    def backward(ctx: Any, grad_output, *_sums):
        if grad_output is None:  # a later function has no gradient to give
            return (None,) * len(ctx.needs_input_grad)
        refuse_second_derivative()
        saved, pred, target, latents, prior, a, b, delta = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if saved is not None:
            gradient = (saved * grad_output).to(saved.dtype)
        elif gradient is None:
            factors = grad_output * a, None if b is None else grad_output * b
            scaled = Operands(pred, target, latents, prior, *factors, delta, None)
            gradient = loss_and_gradient(scaled, ctx.options, write_gradient=True).gradient
        elif gradient.dtype != torch.float32 and gradient.device.type != "cpu":
            # Off the CPU, `mul_` would round grad_output to the dtype of the gradient before it multiplies.
            gradient = (gradient.float() * grad_output).to(gradient.dtype)
        elif not _is_known_one(grad_output):
            gradient.mul_(grad_output)
        return gradient, *([None] * 8)


def _is_known_one(value: torch.Tensor) -> bool:
    """True when the value can be looked at without waiting for a device, and is 1."""
    return type(value) is torch.Tensor and value.device.type == "cpu" and value.item() == 1.0


def loss_and_gradient(operands: Operands, options: Options, write_gradient: bool) -> Result:
    """The loss, and the gradient in pred's dtype if it is wanted."""
    pred = operands.pred
    if torch.compiler.is_compiling():
        errors, drift, gradient = _elements(operands, None, options)
        target_sums, prior_sums = _sums(errors, drift, operands)
        result = gradient.to(pred.dtype) if write_gradient else None
        if result is not None and prior_sums:
            # Always 0. A sum that reads the gradient keeps the compiler's loop in one piece, as the only term does without a prior.
            prior_sums[0] = prior_sums[0] + 0.0 * result.sum((2, 3, 4)).isnan().sum()
        return Result(target_sums, prior_sums, result)
    result = torch.empty_like(pred) if write_gradient else None
    size = CPU_BLOCK * torch.get_num_threads() if pred.device.type == "cpu" else DEVICE_BLOCK
    sums = []
    for *tensors, out in _blocks((*operands, result), size):
        block = Operands(*tensors)  # type: ignore[arg-type]
        # Held by no name: the buffers of a block are free for the next one.
        sums.append(_sums(*_elements(block, out, options)[:2], block))
    if len(sums) == 1:
        return Result(*sums[0], result)
    totals = [[torch.stack(column).sum() for column in zip(*rows, strict=True)] for rows in zip(*sums, strict=True)]
    return Result(totals[0], totals[1], result)


def _sums(
    errors: torch.Tensor, drift: torch.Tensor | None, operands: Operands
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sums that `Result` holds."""
    inside = operands.inside
    plain = [] if inside is None else [inside, 1 - inside]
    if torch.compiler.is_compiling():
        # The innermost axes first: the compiler then sums in the loop that writes the gradient. For one sum over everything it
        # makes a second loop, which reads all operands again.
        def total(weight: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
            return (weight * errors).sum((2, 3, 4)).sum()
    else:
        # Over the channels first: what is left to multiply and to sum is a sixteenth.
        errors = errors.sum(1, keepdim=True)
        drift = None if drift is None else drift.sum(1, keepdim=True)

        def total(weight: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
            return (weight * errors).sum()

    of_target = [total(weight, errors) for weight in (operands.a, *plain)]
    if drift is None or operands.b is None:
        return of_target, []
    return of_target, [total(weight, drift) for weight in (operands.b, *plain)]


def _blocks(tensors: tuple[torch.Tensor | None, ...], size: int) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Views of about `size` elements of the first tensor, and what belongs to them of the others, whole where their axis is 1.

    Cut where the first one's memory is, outermost axis first; between channels last, since they share their weights.
    """
    first = tensors[0]
    assert first is not None
    if first.numel() <= size:
        yield tensors
        return
    axis = max(range(first.dim()), key=lambda axis: (first.shape[axis] > 1, axis != 1, first.stride(axis)))
    pieces = min(first.shape[axis], -(-first.numel() // size))
    step = -(-first.shape[axis] // pieces)
    cut = [[x] * pieces if x is None or x.shape[axis] == 1 else x.split(step, axis) for x in tensors]
    for block in zip(*cut, strict=False):
        yield from _blocks(block, size)


def _elements(
    operands: Operands, out: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(rho(pred - target), rho(pred - prior), gradient) of each element, in float32; `out`, if given, gets the gradient too."""
    pred, target, latents, prior, a, b, deltas, _ = operands
    delta = options.loss_delta if deltas is None else deltas
    pred, target = pred.float(), target.float()
    if latents is not None:
        # Rounded to float32 once, as in the other backends.
        target = target - latents.float() if options.flow_sign == 1 else latents.float() - target
    plain = not torch.compiler.is_compiling()
    # The difference is made where the gradient will be: a buffer less to fetch.
    place = out if out is not None and out.dtype == torch.float32 else None
    difference = torch.sub(pred, target, out=place)
    error, slope = error_and_slope(difference, options.loss_type, delta, overwrite=plain)
    if prior is None or b is None:
        return error, None, torch.mul(slope, a, out=out)
    gradient = slope.mul_(a)
    prior_error, slope = error_and_slope(pred - prior.float(), options.loss_type, delta, overwrite=plain)
    return error, prior_error, torch.addcmul(gradient, slope, b, out=out)
