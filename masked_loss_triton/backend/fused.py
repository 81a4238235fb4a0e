"""The `triton` backend: from one validated call to the launchers in kernels/, and the operators that torch.compile sees.

Two launches forward (three under a blur), one backward. The forward writes the finished gradient, multiplied by what grad_output
was the last time; the backward is the loss kernel again, and returns at once, on the device, where it is the same this time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from typing import Any, NamedTuple

import torch

from masked_loss_triton.backend import refuse_second_derivative
from masked_loss_triton.backend.denominators import loss_factors
from masked_loss_triton.backend.replay import ALIGNMENT, Recording, Tensors
from masked_loss_triton.call import TENSORS, LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.kernels.launches import Launches
from masked_loss_triton.kernels.loss import launch_loss
from masked_loss_triton.kernels.stages import Gates
from masked_loss_triton.kernels.sums import STATS, Outputs
from masked_loss_triton.kernels.upstream import ONE, Upstream
from masked_loss_triton.kernels.weights import MaskWeights, launch_weights
from masked_loss_triton.stats import MaskedLossStats

OperatorOutputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, stats, gradient; the last two may be empty


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d float32 and differentiable in pred, and the stats if asked for."""
    plain = _is_plain(inputs.pred)
    factors = None
    # One process divides inside the launches; what spans several, and what crosses the border of an operator, is made here.
    if inputs.process_group is not None or (inputs.normalizer is not None and not plain):
        with torch.no_grad():
            sums = _sums(inputs, config) if plain else OPERATORS.sums(*_flat(inputs, None), config.to_text())
            factors = torch.stack(loss_factors(sums[0], sums[1], sums[2], inputs, config)).contiguous()
    grad = torch.is_grad_enabled() and inputs.pred.requires_grad
    if not plain:
        write = grad and _writes_gradient(inputs.pred)
        total, numbers, _ = OPERATORS.forward(*_flat(inputs, factors), config.to_text(), return_stats, write)
    elif grad:
        total, numbers = FusedLoss.apply(inputs.pred, inputs, factors, config, return_stats)
    else:
        out = run(inputs, factors, config, stats=return_stats, recording=inputs.recording).out
        total, numbers = out.loss_ptr, out.stats_ptr
    return total, MaskedLossStats(*numbers.unbind()) if return_stats else None


class FusedLoss(torch.autograd.Function):
    """Writes the gradient in the forward; the backward computes it again where grad_output is another, or it was given away."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: torch.Tensor,
        inputs: LossInputs,
        factors: torch.Tensor | None,
        config: MaskedLossConfig,
        stats: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gradient = torch.empty_like(pred)
        weights, upstream, out = run(
            inputs, factors, config, stats=stats, gradient=gradient, foresee=True, recording=inputs.recording
        )
        # No saved tensors: a checkpoint would answer with what its second forward expects, by which this one did not multiply.
        # In a list, so that the backward gives it away only once: compiled autograd hands it a copy of ctx.
        ctx.gradient, ctx.upstream = [gradient], upstream
        flat, given = _flat(inputs, factors), inputs.normalizer if factors is None else None
        ctx.numbers, ctx.given = flat[_SIZE:], given
        ctx.config, ctx.stats = config, stats
        ctx.save_for_backward(*flat[:_SIZE], *weights, *(x for x in given or () if isinstance(x, torch.Tensor)))
        if out.stats_ptr is not None:
            ctx.mark_non_differentiable(out.stats_ptr)
        ctx.set_materialize_grads(False)  # else autograd launches a fill for each of them
        return out.loss_ptr, out.stats_ptr

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None, _numbers: None) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None:  # a later function has no gradient to give
            return None, None, None, None, None
        refuse_second_derivative()
        rest = iter(ctx.saved_tensors)  # refuses where one of them was changed, or freed
        inputs, factors = _call(*itertools.islice(rest, _SIZE), *ctx.numbers)
        # Hooks of saved tensors may give them back with other strides; of what follows the kernel knows none.
        factors = None if factors is None else factors.contiguous()
        scratch = itertools.islice(rest, len(MaskWeights._fields))
        weights = MaskWeights._make(None if x is None else x.contiguous() for x in scratch)
        if ctx.given is not None:
            given = tuple(next(rest) if isinstance(x, torch.Tensor) else x for x in ctx.given)
            inputs = dataclasses.replace(inputs, normalizer=given)
        gradient = ctx.gradient.pop() if ctx.gradient else None
        upstream = ctx.upstream._replace(grad_output_ptr=_aligned(grad_output), written=float(gradient is not None))
        if gradient is None:
            gradient = torch.empty_like(inputs.pred)
        with _on_device(gradient):
            launch_loss(
                inputs,
                weights,
                Gates.of(inputs),
                ctx.config,
                Launches(),
                factors,
                upstream,
                gradient=gradient,
                stats=ctx.stats,
            )
        return gradient, None, None, None, None


def repeated(
    recording: Recording, tensors: Tensors, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None] | None:
    """The loss of a call whose form was recorded, as `loss` gives it; None where it must take the whole way all the same.

    Args:
        tensors: those of `TENSORS`, as they were given to `masked_loss`.
    """
    stream = recording.stream()
    if stream is None or recording.forward is None:
        return None
    pred = tensors[0]
    assert pred is not None
    numbers = torch.empty(STATS, dtype=torch.float32, device=pred.device) if return_stats else None
    if recording.backward is None:
        total = torch.empty_like(recording.like_loss)
        forward = recording.forward
        forward((*tensors, total, numbers, None), forward.scratch(pred.device), stream)
    else:
        total = RepeatedLoss.apply(pred, (tensors, numbers, recording, stream))
    return total, None if numbers is None else MaskedLossStats(*numbers.unbind())


class RepeatedLoss(torch.autograd.Function):
    """`FusedLoss` for a call whose form was recorded."""

    @staticmethod
    def forward(
        ctx: Any, pred: torch.Tensor, call: tuple[Tensors, torch.Tensor | None, Recording, int]
    ) -> torch.Tensor:
        tensors, numbers, recording, stream = call
        total = torch.empty_like(recording.like_loss)
        gradient, forward = recording.empty_gradient(pred), recording.forward
        assert forward is not None
        scratch = forward.scratch(pred.device)
        forward((*tensors, total, numbers, gradient), scratch, stream)
        ctx.gradient, ctx.recording = [gradient], recording
        ctx.save_for_backward(scratch, *tensors)
        ctx.set_materialize_grads(False)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad_output is None:
            return None, None
        refuse_second_derivative()
        scratch, *tensors = ctx.saved_tensors
        recording, written = ctx.recording, 1.0
        if ctx.gradient:
            gradient = ctx.gradient.pop()
        else:
            gradient, written = recording.empty_gradient(tensors[0]), 0.0
        recording.backward((*tensors, gradient, _aligned(grad_output)), scratch, recording.current_stream(), written)
        return gradient, None


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same number where no kernel of its own has to be compiled for its address, and not as the negative of another."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT or tensor.is_neg() else tensor


class Launched(NamedTuple):
    """What the backward needs of the launches of a forward."""

    weights: MaskWeights
    upstream: Upstream
    out: Outputs


def run(
    inputs: LossInputs,
    factors: torch.Tensor | None,
    config: MaskedLossConfig,
    *,
    stats: bool = False,
    grad_output: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    foresee: bool = False,
    recording: Recording | None = None,
) -> Launched:
    """The weights, then the loss.

    Args:
        gradient: as pred, to be written; None: not asked for.
        grad_output: what the gradient is multiplied by. foresee: that is expected to be what it was the last time.
        recording: keeps the launches, if it has none yet.
    """
    gates, launches = Gates.of(inputs), Launches()
    with _on_device(inputs.pred):
        upstream = Upstream.foreseen(config, inputs.pred.device, launches) if foresee else ONE
        weights = launch_weights(inputs, gates, config, launches, upstream, stats)
        if grad_output is not None:
            upstream = Upstream(grad_output)
        out = launch_loss(inputs, weights, gates, config, launches, factors, upstream, gradient=gradient, stats=stats)
        if recording is not None and recording.forward is None and not recording.cannot:
            recording.keep(launches, inputs, out, gradient, repeated)
    return Launched(weights, upstream, out)


def _sums(inputs: LossInputs, config: MaskedLossConfig) -> torch.Tensor:
    """(3, B): the sums of w, v and the raw mask over the positions of each sample."""
    with _on_device(inputs.pred):
        return launch_weights(inputs, Gates.of(inputs), config, Launches()).partials_ptr.sum(dim=2)


def _writes_gradient(pred: torch.Tensor) -> bool:
    """An operator foresees nothing, and float16 would lose gradients of 1e-7 before the loss scale reaches them."""
    return pred.dtype != torch.float16


def _is_plain(tensor: torch.Tensor) -> bool:
    """False where somebody traces or fakes the computation, and kernels cannot be started."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be that of the tensor."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# The operators, for whoever traces or fakes. A plain call goes past them: the dispatcher would double the host time of a launch.
# Only tensors, numbers and text cross their border.

OPERATORS = torch.ops.masked_loss_triton
_SCHEMA = ", ".join(f"Tensor{'' if name in ('pred', 'target') else '?'} {name}" for name in TENSORS)
_SCHEMA += ", Tensor? factors, int flow_sign, float prior_number, int[] patches"
_SIZE = len(TENSORS) + 1  # tensors at the front of an operator's arguments


def _flat(inputs: LossInputs, factors: torch.Tensor | None) -> tuple[Any, ...]:
    """What an operator takes of a call: all tensors, then the numbers."""
    return *inputs.tensors, factors, inputs.flow_sign, inputs.prior_number, list(inputs.patches or ())


def _call(*flat: Any) -> tuple[LossInputs, torch.Tensor | None]:
    """The inverse of `_flat`."""
    *tensors, factors, flow_sign, prior_number, patches = flat
    named = dict(zip(TENSORS, tensors, strict=True))
    numbers: dict[str, Any] = dict(flow_sign=flow_sign, prior_number=prior_number, patches=tuple(patches) or None)
    return LossInputs(**named, **numbers, normalizer=None, process_group=None), factors


@functools.lru_cache(maxsize=64)
def _config(text: str) -> MaskedLossConfig:
    return MaskedLossConfig(**json.loads(text))


def _forward(*arguments: Any) -> OperatorOutputs:
    *flat, text, stats, write_gradient = arguments
    gradient = torch.empty_like(flat[0]) if write_gradient else None
    out = run(*_call(*flat), _config(text), stats=stats, gradient=gradient).out
    numbers = out.loss_ptr.new_empty(0) if out.stats_ptr is None else out.stats_ptr
    return out.loss_ptr, numbers, flat[0].new_empty(0) if gradient is None else gradient


def _gradient(*arguments: Any) -> torch.Tensor:
    *flat, text, grad_output = arguments
    gradient = torch.empty_like(flat[0])
    run(*_call(*flat), _config(text), grad_output=grad_output, gradient=gradient)
    return gradient


def _sums_operator(*arguments: Any) -> torch.Tensor:
    *flat, text = arguments
    return _sums(_call(*flat)[0], _config(text))


def _fake_forward(pred: torch.Tensor, *rest: Any) -> OperatorOutputs:
    *_, stats, write_gradient = rest
    total, numbers = (pred.new_empty(size, dtype=torch.float32) for size in ((), STATS if stats else 0))
    return total, numbers, torch.empty_like(pred) if write_gradient else pred.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: OperatorOutputs) -> None:
    _, numbers, gradient = output
    *flat, text, _, ctx.wrote = inputs
    ctx.options = (*flat[_SIZE:], text)
    ctx.save_for_backward(*((gradient,) if ctx.wrote else flat[:_SIZE]))
    ctx.mark_non_differentiable(numbers, gradient)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
    refuse_second_derivative()
    if ctx.wrote:  # a product that the compiler may fuse with what comes next
        (gradient,) = ctx.saved_tensors
        gradient = (gradient.float() * grad_output).to(gradient.dtype)
    else:
        gradient = OPERATORS.gradient(*ctx.saved_tensors, *ctx.options, grad_output)
    return gradient, *[None] * (_SIZE + len(ctx.options) + 1)


def _operator(name: str, implementation: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(
        f"masked_loss_triton::{name}", implementation, mutates_args=(), schema=f"({_SCHEMA}, str config{schema}"
    )
    operator.register_fake(fake)
    return operator


_operator("gradient", _gradient, lambda pred, *_: torch.empty_like(pred), ", Tensor grad_output) -> Tensor")
_operator("sums", _sums_operator, lambda pred, *_: pred.new_empty((3, len(pred)), dtype=torch.float32), ") -> Tensor")
_operator(
    "forward", _forward, _fake_forward, ", bool stats, bool write_gradient) -> (Tensor, Tensor, Tensor)"
).register_autograd(_backward, setup_context=_save)
