"""The `triton` backend: from one validated call to the launchers in kernels/, and the operators that torch.compile sees.

Two launches forward (three under a blur), one backward. The forward writes the finished gradient; the backward multiplies it by
grad_output, on the device, and returns at once where that is 1.
"""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

import torch

from masked_loss_triton.backend import distinct, refuse_second_derivative
from masked_loss_triton.backend.denominators import loss_factors, needs_exchange
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.kernels.launch_loss import launch_loss, launch_scale
from masked_loss_triton.kernels.launch_weights import launch_weights
from masked_loss_triton.kernels.sums import STATS
from masked_loss_triton.stats import MaskedLossStats


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d float32 and differentiable in pred, and the stats if asked for."""
    tensors = [
        inputs.pred,
        inputs.target,
        inputs.latents,
        inputs.prior,
        inputs.mask,
        _contiguous(inputs.weighting),
        _contiguous(inputs.prior_weight) if isinstance(inputs.prior_weight, torch.Tensor) else None,
        _contiguous(inputs.prior_gate),
        _contiguous(inputs.mask_gate),
    ]
    number = 0.0 if isinstance(inputs.prior_weight, torch.Tensor) else inputs.prior_weight
    options = (inputs.flow_sign, number, config.to_text(), return_stats)
    with torch.no_grad():
        factors = _exchanged_factors(inputs, config, tensors) if needs_exchange(inputs) else None
    if torch.is_grad_enabled() and inputs.pred.requires_grad:
        total, numbers = FusedLoss.apply(*distinct(tensors), factors, *options)
    else:
        total, numbers, _ = _run("forward", *tensors, factors, *options, False)
    return total, MaskedLossStats(*numbers.unbind()) if return_stats else None


class FusedLoss(torch.autograd.Function):
    """Writes the gradient in the forward; the backward scales it, or computes it again when it was already given away."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any):
        *tensors, flow_sign, prior_weight, config, stats = arguments
        # float16 would lose gradients of 1e-7 before the loss scale reaches them: there the gradient waits for the backward.
        now = tensors[0].dtype != torch.float16
        total, numbers, gradient = _run("forward", *tensors, flow_sign, prior_weight, config, stats, now)
        ctx.options = flow_sign, prior_weight, config
        # A plain gradient is no saved tensor: the backward scales it in place and gives it away, once.
        plain = _is_plain(gradient)
        ctx.gradient = gradient if now and plain else None
        ctx.save_for_backward(gradient if now and not plain else None, *tensors)
        ctx.mark_non_differentiable(numbers)
        ctx.set_materialize_grads(False)  # else autograd launches a fill for each of them
        return total, numbers

    @staticmethod
    def backward(ctx: Any, grad_output, _numbers):
        refuse_second_derivative()
        saved, *tensors = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if saved is not None:
            gradient = _run("scale", saved, grad_output)
        elif gradient is None:
            gradient = _run("gradient", *tensors, grad_output, *ctx.options)
        else:
            with _on_device(gradient):
                launch_scale(gradient, grad_output)
        return gradient, *([None] * 13)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@functools.lru_cache(maxsize=64)
def _from_text(text: str) -> MaskedLossConfig:
    """A config as it crossed the border of an operator, which takes only tensors, numbers and text."""
    return MaskedLossConfig(**json.loads(text))


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be that of the tensor."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _exchanged_factors(inputs: LossInputs, config: MaskedLossConfig, tensors: list[Any]) -> torch.Tensor:
    """(2, B): the factors, from denominators that span more than this batch."""
    _, _, _, prior, mask, _, _, prior_gate, mask_gate = tensors
    shape = [inputs.batch, *inputs.grid]
    sums = _run("sums", inputs.pred, mask, prior_gate, mask_gate, shape, prior is not None, config.to_text())
    return torch.stack(loss_factors(sums[0], sums[1], sums[2], inputs, config)).contiguous()


# The operators. A plain call goes straight to the implementation: the dispatcher would double the host time of a launch.

_TENSORS = (
    "Tensor pred, Tensor target, Tensor? latents, Tensor? prior, Tensor? mask, Tensor? weighting, Tensor? prior_weights, "
    "Tensor? prior_gate, Tensor? mask_gate, Tensor? factors"
)
_OPTIONS = "int flow_sign, float prior_weight, str config"
SCHEMAS = {
    "forward": f"({_TENSORS}, {_OPTIONS}, bool stats, bool write_gradient) -> (Tensor, Tensor, Tensor)",
    "gradient": f"({_TENSORS}, Tensor grad_output, {_OPTIONS}) -> Tensor",
    "sums": "(Tensor like, Tensor? mask, Tensor? prior_gate, Tensor? mask_gate, int[] shape, bool has_prior, str config) -> Tensor",
    "scale": "(Tensor gradient, Tensor grad_output) -> Tensor",
}


def _run(name: str, *arguments: Any) -> Any:
    if _is_plain(arguments[0]):
        return _IMPLEMENTATIONS[name](*arguments)
    return getattr(torch.ops.masked_loss_triton, name)(*arguments)


def _is_plain(tensor: torch.Tensor) -> bool:
    """False where somebody traces or fakes the computation, and kernels cannot be started."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _weights(mask, prior_gate, mask_gate, shape, device, has_prior: bool, text: str, stats: bool = False):
    batch, *grid = shape
    return launch_weights(
        mask,
        _from_text(text),
        tuple(grid),
        batch,
        device,
        has_prior=has_prior,
        prior_gate=prior_gate,
        mask_gate=mask_gate,
        stats=stats,
    )


def _launch(tensors, options, stats: bool = False, **how: Any):
    pred, target, latents, prior, mask, weighting, prior_weights, prior_gate, mask_gate, factors = tensors
    flow_sign, prior_weight, text = options
    shape = (pred.shape[0], *pred.shape[2:])
    with _on_device(pred):
        weights = _weights(mask, prior_gate, mask_gate, shape, pred.device, prior is not None, text, stats)
        return launch_loss(
            pred,
            target,
            latents,
            prior,
            mask,
            weights,
            _from_text(text),
            flow_sign=flow_sign,
            weighting=weighting,
            prior_weight=prior_weight if prior_weights is None else prior_weights,
            prior_gate=prior_gate,
            mask_gate=mask_gate,
            factors=factors,
            stats=stats,
            **how,
        )


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *tensors, flow_sign, prior_weight, config, stats, write_gradient = arguments
    return _launch(tensors, (flow_sign, prior_weight, config), stats, write_gradient=write_gradient)


def _forward_fake(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pred, write_gradient = arguments[0], arguments[-1]
    total, numbers = (pred.new_empty(shape, dtype=torch.float32) for shape in ((), (STATS,)))
    return total, numbers, torch.empty_like(pred) if write_gradient else pred.new_empty(0)


def _gradient(*arguments: Any) -> torch.Tensor:
    *tensors, grad_output, flow_sign, prior_weight, config = arguments
    return _launch(tensors, (flow_sign, prior_weight, config), grad_output=grad_output, write_loss=False)[2]


def _sums(like, mask, prior_gate, mask_gate, shape, has_prior, config) -> torch.Tensor:
    with _on_device(like):
        weights = _weights(mask, prior_gate, mask_gate, shape, like.device, has_prior, config)
    return weights.partials.sum(dim=2)


def _scale(gradient: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    scaled = gradient.clone()
    with _on_device(gradient):
        launch_scale(scaled, grad_output)
    return scaled


_IMPLEMENTATIONS = {"forward": _forward, "gradient": _gradient, "sums": _sums, "scale": _scale}
_FAKES = {
    "forward": _forward_fake,
    "gradient": lambda pred, *_: torch.empty_like(pred),
    "sums": lambda like, mask, prior_gate, mask_gate, shape, *_: like.new_empty((3, shape[0]), dtype=torch.float32),
    "scale": lambda gradient, _: torch.empty_like(gradient),
}
for _name, _schema in SCHEMAS.items():
    torch.library.custom_op(
        f"masked_loss_triton::{_name}", _IMPLEMENTATIONS[_name], mutates_args=(), schema=_schema
    ).register_fake(_FAKES[_name])  # type: ignore[arg-type]
