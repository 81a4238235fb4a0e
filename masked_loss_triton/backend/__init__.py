"""The backends of one formula (docs/formula.md): `reference` (autograd), `torch` (closed form, any device), `triton` (kernels).

The folder is called `backend`: torch.compile refuses to trace files whose path contains "triton/backends".
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

from masked_loss_triton.call import BACKENDS, TENSORS, Backend, LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.stats import MaskedLossStats

LossFunction = Callable[[LossInputs, MaskedLossConfig, bool], tuple[torch.Tensor, MaskedLossStats | None]]


@functools.cache
def _why_no_kernels() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 4):
        return f"the kernels need triton 3.4 or newer, and {triton.__version__} is installed"
    if torch.cuda.is_available() and not interpreter_is_on():
        try:
            # Triton builds its host code now: with a C compiler and Python.h.
            _ = triton.runtime.driver.active.utils
        except Exception as error:
            return f"triton {triton.__version__} cannot start here ({str(error).splitlines()[0]})"
    return None


def why_no_kernels() -> str | None:
    """None, or why the kernels cannot run here: no Triton, one older than 3.4, or one that finds no C compiler."""
    return _why_no_kernels()


# What `torch.compiler.assume_constant_result` does, without an import of the compiler: an older one could not trace it.
why_no_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def interpreter_is_on() -> bool:
    """True when Triton kernels run in its interpreter, on CPU tensors. Set before triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(name: Backend, pred: torch.Tensor) -> Backend:
    """The backend that computes the loss of `pred`.

    "auto": the reference for float64, Triton on a CUDA or ROCm device where it is installed, else torch. Where Triton is there
    but cannot run, a warning says why, once.

    Raises:
        ValueError: unknown name, or Triton asked for where it cannot run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "auto":
        if pred.dtype == torch.float64:
            return "reference"
        if pred.device.type != "cuda":
            return "torch"
        reason = why_no_kernels()
        if reason is not None and "not installed" not in reason and not torch.compiler.is_compiling():
            _say_once(f"masked_loss takes the slower torch backend: {reason}")
        return "triton" if reason is None else "torch"
    if name == "triton":
        if reason := why_no_kernels():
            raise ValueError(f"backend='triton' cannot run: {reason}; use backend='torch'")
        if pred.device.type != "cuda" and not interpreter_is_on():
            raise ValueError(
                f"backend='triton' needs a CUDA or ROCm tensor, and pred is on {pred.device}: use backend='torch' "
                "(or set TRITON_INTERPRET=1 before triton is imported, to run the kernels slowly on the CPU)"
            )
    return name


def loss_function(name: Backend, inputs: LossInputs) -> LossFunction:
    """`loss(inputs, config, return_stats)` of the backend that is asked for, after it has refused what it cannot compute.

    Raises:
        ValueError, RuntimeError: see `choose` and `refuse_lost_derivatives`.
    """
    name = choose(name, inputs.pred)
    if name == "reference":
        from masked_loss_triton.backend import reference

        return reference.loss
    refuse_lost_derivatives(inputs)
    if name == "torch":
        from masked_loss_triton.backend import closed_form

        return closed_form.loss
    from masked_loss_triton.backend import fused

    return fused.loss


def refuse_lost_derivatives(inputs: LossInputs) -> None:
    """Raises where a backend that differentiates in pred alone, once, would lose a derivative or fail inside.

    Raises:
        ValueError: something else requires grad.
        RuntimeError: forward mode, torch.func or vmap.
    """
    if torch.is_grad_enabled():
        values: list[tuple[str, Any]] = list(zip(TENSORS[1:], inputs.tensors[1:], strict=True))
        if inputs.normalizer is not None:
            values += [("normalizer", number) for number in inputs.normalizer if isinstance(number, torch.Tensor)]
        for name, value in values:
            if value is not None and value.requires_grad:
                raise ValueError(
                    f"{name} requires grad, but this backend differentiates with respect to pred only: "
                    f"detach {name}, or use backend='reference'"
                )
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func and torch.vmap cannot look into this backend of masked_loss: use backend='reference'"
        )
    if forward_ad._current_level < 0:
        return
    for name in ("pred", "target", "latents", "prior", "mask"):
        value = getattr(inputs, name)
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{name} carries a tangent, but this backend of masked_loss has no forward-mode derivative: "
                "use backend='reference'"
            )


def refuse_second_derivative() -> None:
    """For the backward of a fused loss: with create_graph=True its gradient would silently count as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this backend of masked_loss is differentiable once, and create_graph=True asks for more: use backend='reference'"
        )


def distinct(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The same tensors; under torch.compile one that came before, such as a prior that is the target, as a view of itself.

    Dynamo takes no tensor twice as an argument of an autograd.Function.
    """
    if not torch.compiler.is_compiling():
        return list(tensors)
    result: list[torch.Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view(tensor.shape) if again and tensor is not None else tensor)
    return result
