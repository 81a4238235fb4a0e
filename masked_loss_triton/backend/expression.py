"""The loss and its gradient as one expression, for torch.compile: around the user's own compiled step, or alone, for one call.

One loop over memory reads each operand once and writes the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from masked_loss_triton.config import MaskedLossConfig


class Operands(NamedTuple):
    """What a loss is made of, as views of one shape (the weights: or one that broadcasts to it)."""

    pred: torch.Tensor
    target: torch.Tensor
    latents: torch.Tensor | None
    prior: torch.Tensor | None
    a: torch.Tensor  # float32, the weights times their factors and `slope`
    b: torch.Tensor | None


def slope(config: MaskedLossConfig) -> int:
    """The constant of rho': 2 for a square. It goes into the weights, which are few, instead of into every error."""
    return 2 if config.loss_type == "mse" else 1


def terms(
    operands: Operands, flow_sign: int, loss_type: str, delta: float, write_gradient: bool, axes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Both terms of the loss, 0-d float32, and the gradient in pred's dtype, or None.

    Args:
        axes: the innermost axes of memory. They are summed first: the compiler then sums in the loop that writes the gradient. For
            one sum over everything it makes a second loop, which reads all operands again.
    """
    pred, target, latents, prior, a, b = operands

    def term(other: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        difference = pred.float() - other
        if loss_type == "mse":
            psi, share = difference, 0.5 * difference
        elif loss_type == "l1":
            psi, share = torch.sign(difference), difference
        elif loss_type == "huber":
            psi = difference.clamp(-delta, delta)
            share = difference - 0.5 * psi
        else:
            psi = (difference / delta).clamp(-1, 1)
            share = difference - 0.5 * delta * psi
        gradient = factor * psi
        return (gradient * share).sum(axes).sum(), gradient

    formed = target.float() if latents is None else flow_sign * (target.float() - latents.float())
    target_term, gradient = term(formed, a)
    prior_term = torch.zeros_like(target_term)
    if prior is not None and b is not None:
        prior_term, prior_gradient = term(prior.float(), b)
        gradient = gradient + prior_gradient
    result = gradient.to(pred.dtype) if write_gradient else None
    if result is not None and prior is not None:
        # Always 0. A sum that reads the gradient keeps the compiler's loop in one piece, as the only term does without a prior.
        prior_term = prior_term + 0.0 * result.sum(axes).isnan().sum()
    return target_term, prior_term, result


def can_be_compiled(pred: torch.Tensor) -> bool:
    """False where somebody traces or fakes the computation: a compiled function cannot run there."""
    return type(pred) in (torch.Tensor, torch.nn.Parameter) and pred.device.type != "meta"


def compiled_terms(
    operands: Operands, flow_sign: int, config: MaskedLossConfig, write_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`terms` by one compiled function.

    Raises:
        RuntimeError: when torch.compile finds no compiler.
    """
    detached = Operands(*(None if x is None else x.detach() for x in operands))  # type: ignore[arg-type]
    try:
        return _compiled()(detached, flow_sign, config.loss_type, config.loss_delta, write_gradient, (-1,))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RuntimeError(
            "backend='compiled' could not compile the loss; it needs a C++ compiler that torch.compile finds (CXX names one). "
            f"Use backend='torch' where there is none. torch.compile said: {str(error).strip().splitlines()[0]}"
        ) from error


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Sizes are symbols: a training set with buckets would otherwise compile anew for each. The gradient is returned and not copied
    # into a tensor that is there: the compiler would do that in a second loop, which reads everything again.
    return torch.compile(terms, fullgraph=True, dynamic=True)
