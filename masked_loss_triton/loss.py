"""The public loss: `masked_loss`, its module `MaskedLoss`, and `mask_weights`, the weights alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from masked_loss_triton.backend import loss_function, stages
from masked_loss_triton.backend.replay import recording_of
from masked_loss_triton.call import BACKENDS, Backend, CallOptions, FlowTarget, Layout, Normalizer, describe
from masked_loss_triton.checks import FLOAT_DTYPES, canonical_mask, per_sample_numbers
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.stats import MaskedLossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

Target = torch.Tensor | FlowTarget
LossAndStats = tuple[torch.Tensor, MaskedLossStats]
_DEFAULT = MaskedLossConfig()


def _checked(config: Any) -> MaskedLossConfig:
    if config is None:
        return _DEFAULT
    if not isinstance(config, MaskedLossConfig):
        raise TypeError(f"config must be a MaskedLossConfig, got {type(config).__name__}")
    return config


@overload
def masked_loss(
    pred: torch.Tensor,
    target: Target,
    mask: torch.Tensor | None,
    config: MaskedLossConfig | None = None,
    *,
    return_stats: Literal[False] = False,
    **call: Unpack[CallOptions],
) -> torch.Tensor: ...
@overload
def masked_loss(
    pred: torch.Tensor,
    target: Target,
    mask: torch.Tensor | None,
    config: MaskedLossConfig | None = None,
    *,
    return_stats: Literal[True],
    **call: Unpack[CallOptions],
) -> LossAndStats: ...
@overload
def masked_loss(
    pred: torch.Tensor,
    target: Target,
    mask: torch.Tensor | None,
    config: MaskedLossConfig | None = None,
    *,
    return_stats: bool,
    **call: Unpack[CallOptions],
) -> torch.Tensor | LossAndStats: ...
def masked_loss(
    pred: torch.Tensor,
    target: Target,
    mask: torch.Tensor | None,
    config: MaskedLossConfig | None = None,
    *,
    weighting: torch.Tensor | None = None,
    prior: torch.Tensor | None = None,
    prior_weight: torch.Tensor | float | Sequence[float] | None = None,
    prior_gate: torch.Tensor | None = None,
    mask_gate: torch.Tensor | None = None,
    loss_delta: torch.Tensor | None = None,
    normalizer: Normalizer | None = None,
    process_group: ProcessGroup | None = None,
    layout: Layout = "channels_first",
    patches: tuple[int, int] | None = None,
    backend: Backend = "auto",
    return_stats: bool = False,
) -> torch.Tensor | LossAndStats:
    """The mask-weighted loss of a prediction.

        loss = sum(w rho(pred - target)) / sum(w)  +  prior_weight * sum(v rho(pred - prior)) / sum(v)

    with weights w and the prior's region v made from the mask as `MaskedLossConfig` says, both counted once per channel.

    Example:
        >>> import torch
        >>> from masked_loss_triton import masked_loss
        >>> pred = torch.zeros(1, 16, 1, 8, 8, requires_grad=True)
        >>> mask = torch.zeros(1, 64, 64)
        >>> mask[:, :32] = 1
        >>> masked_loss(pred, torch.ones(1, 16, 1, 8, 8), mask).backward()
        >>> pred.grad[0, 0, 0, :, 0].count_nonzero().item()
        4

    Args:
        pred: (B, C, F, H, W) or (B, C, H, W), or (B, L, C, H, W) with layout="layered"; float32, bfloat16, float16 or float64.
        target: of the shape of pred, or a `FlowTarget`; a floating dtype, not necessarily that of pred.
        mask: (B, 1, Fm, Hm, Wm), (B, Fm, Hm, Wm), (B, 1, Hm, Wm) or (B, Hm, Wm) at any resolution, B may be 1; floating in
            [0, 1], uint8 in [0, 255] or bool. None is a mask of ones. With layout="layered" its frames are the layers.
        config: the options; the defaults of `MaskedLossConfig` when None.
        weighting: (B,) or broadcastable per sample; a factor of the errors, of both terms.
        prior: the teacher's prediction, of the shape of pred; without it there is no prior term.
        prior_weight: replaces `config.prior_weight` for this call: a number, or (B,) with config.per_sample.
        prior_gate: (B,) bool or floating in [0, 1]; multiplies the prior's region of each sample.
        mask_gate: (B,) bool; a sample that is False has weight 1 everywhere and no prior.
        loss_delta: (B,) or broadcastable per sample, > 0; replaces `config.loss_delta`, as for a schedule over timesteps.
        normalizer: replaces the denominator, for gradient accumulation: sum(w) over all elements of the window (a pair with
            sum(v) when there is a prior; `mask_weights` has both), the number of elements with normalization="mean", the number
            of samples with per_sample. The losses of the micro-batches then add up to the loss of the whole; where the trainer
            averages them, give the denominator divided by their number. A number or a 0-d tensor; under torch.compile a tensor,
            since a number that changes compiles anew.
        process_group: all-reduces the denominators over its ranks and multiplies by their number, so that the gradient
            that data parallel training averages is exactly that of the whole batch.
        layout: "channels_first", "layered", or "packed": tokens (B, T, 4 C) of 2x2 patches, row by row, as the transformers of
            Qwen-Image and FLUX give them; read in place. The mask is at any size, as for the unpacked picture.
        patches: (rows, columns) of the patches with layout="packed".
        backend: "auto", "triton", "torch" or "reference".
        return_stats: also return a `MaskedLossStats`.

    Returns:
        The loss, 0-d float32 (float64 from the reference for float64), or (loss, stats). 0 when nothing is weighted.

    Raises:
        ValueError, TypeError: naming the argument, what it got, what it takes and what to do. On all backends but "reference" also
            when anything but pred requires grad, since that gradient is not computed.

    Notes:
        Accumulates in float32 whatever the dtypes, also under autocast. Does not synchronise, modifies no input, gives the
        same bits from run to run on one device. NaN and Inf propagate. Differentiable once, in pred. The backward may read the
        inputs again, as that of any function may: autograd refuses it where they were changed, but not by way of `.data`.
    """
    config = _checked(config)
    recording = None
    # "auto" launches nothing on a CPU.
    launches = backend == "triton" or (backend == "auto" and getattr(pred, "is_cuda", False))
    number = prior_weight if type(prior_weight) is float else None
    weights: Any = None if number is not None else prior_weight  # of samples, or what `describe` will have to look at
    # A sequence in the config becomes a tensor that nobody gave.
    plain = prior_weight is not None or type(config.prior_weight) is float
    if launches and plain and normalizer is process_group is patches is None:
        sign = 1
        targets: tuple[Any, Any] = (target, None)
        if type(target) is FlowTarget:
            sign, targets = target.sign, (target.noise, target.latents)
        tensors = (pred, *targets, prior, mask, weighting, prior_gate, mask_gate, loss_delta, weights)
        recording = recording_of(tensors, layout, number, sign, backend, config.to_text(), return_stats)
        if recording is not None and recording.repeat is not None:
            again = recording.repeat(recording, tensors, return_stats)
            if again is not None:
                return again[0] if again[1] is None else (again[0], again[1])
    inputs = describe(
        pred,
        target,
        mask,
        config,
        layout=layout,
        patches=patches,
        weighting=weighting,
        prior=prior,
        prior_weight=prior_weight,
        prior_gate=prior_gate,
        mask_gate=mask_gate,
        loss_delta=loss_delta,
        normalizer=normalizer,
        process_group=process_group,
        recording=recording,
    )
    run = loss_function(backend, inputs)
    with _without_autocast(pred.device.type):
        loss, stats = run(inputs, config, return_stats)
    return loss if stats is None else (loss, stats)


def mask_weights(
    mask: torch.Tensor | None,
    config: MaskedLossConfig | None = None,
    *,
    shape: tuple[int, int, int, int],
    has_prior: bool = True,
    prior_gate: torch.Tensor | None = None,
    mask_gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the target and of the prior's region, to inspect, plot or sum.

    Args:
        mask, config, prior_gate, mask_gate: as for `masked_loss`.
        shape: (B, F, H, W) of the loss; F is 1 for images and the number of layers for layered images.
        has_prior: False gives the weights of a call without `prior`: no region, and nothing taken from the target.

    Returns:
        (w, v), each (B, F, H, W) float32, on the mask's device: before any normalisation, once per position (a sum over the
        elements of the loss is w.sum() times the number of channels).

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it takes.
    """
    config = _checked(config)
    if not isinstance(shape, (tuple, list, torch.Size)):
        raise TypeError(f"shape must be (B, F, H, W), got {type(shape).__name__}")
    if len(shape) != 4 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"shape must be (B, F, H, W) of positive integers, got {tuple(shape)}")
    batch, *grid = shape
    like = torch.empty(0) if mask is None else mask
    if mask is not None:
        mask = canonical_mask(mask, shape)
    if prior_gate is not None:
        prior_gate = per_sample_numbers("prior_gate", prior_gate, like, batch, (*FLOAT_DTYPES, torch.bool))
    if mask_gate is not None:
        mask_gate = per_sample_numbers("mask_gate", mask_gate, like, batch, (torch.bool,))
    raw = stages.raw_mask(mask, (grid[0], grid[1], grid[2]), config, like, torch.float32)
    w, v = stages.target_and_prior_weights(raw, config, prior_gate, mask_gate, has_prior)
    return w.expand(shape), v.expand(shape)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    # Asked in this order: torch 2.5 cannot trace the question which devices have autocast, and those that are compiled for have it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    if known and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class MaskedLoss(torch.nn.Module):
    """`masked_loss` as a module: `MaskedLoss(config)` or `MaskedLoss(gamma=0.7, min_weight=0.05)`, then called the same way."""

    def __init__(self, config: MaskedLossConfig | None = None, *, backend: Backend = "auto", **options: Any) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if config is not None and options:
            raise ValueError(f"give a config or options, not both; got a config and {', '.join(sorted(options))}")
        self.config = MaskedLossConfig(**options) if config is None else _checked(config)
        self.backend = backend

    if TYPE_CHECKING:  # torch types the call of a module as Any

        @overload
        def __call__(
            self,
            pred: torch.Tensor,
            target: Target,
            mask: torch.Tensor | None,
            *,
            return_stats: Literal[False] = False,
            **call: Unpack[CallOptions],
        ) -> torch.Tensor: ...
        @overload
        def __call__(
            self,
            pred: torch.Tensor,
            target: Target,
            mask: torch.Tensor | None,
            *,
            return_stats: Literal[True],
            **call: Unpack[CallOptions],
        ) -> LossAndStats: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self, pred: torch.Tensor, target: Target, mask: torch.Tensor | None, **call: Any
    ) -> torch.Tensor | LossAndStats:
        return masked_loss(pred, target, mask, self.config, **{"backend": self.backend, **call})

    def extra_repr(self) -> str:
        default = MaskedLossConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != default[name]}
        return ", ".join([f"{name}={value!r}" for name, value in changed.items()] + [f"backend={self.backend!r}"])
