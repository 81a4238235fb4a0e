"""One call of the loss, validated and brought to one form. Nothing here waits for a device; no later layer validates again.

Every tensor becomes a view, never a copy: pred, target and prior (B, C, F, H, W), the mask (B or 1, Fm, Hm, Wm), numbers per
sample (B,).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch

from masked_loss_triton.checks import (
    FLOAT_DTYPES,
    canonical_mask,
    check_device,
    check_dtype,
    checked_tensor,
    like_pred,
    per_sample_numbers,
)
from masked_loss_triton.config import MaskedLossConfig, checked_prior_weight
from masked_loss_triton.layouts import LAYOUTS, PRED_SHAPES, Layout, canonical, checked_patches

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from masked_loss_triton.backend.replay import Recording

Number = torch.Tensor | float
Normalizer = Number | Sequence[Number]

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


@dataclasses.dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class FlowTarget:
    """The target of flow matching, sign * (noise - latents), formed in float32 inside the loss instead of in memory.

    Args:
        noise, latents: of the shape of pred; float32, bfloat16, float16 or float64, not necessarily the same.
        sign: +1 for noise - latents (HunyuanVideo, WAN, Qwen-Image), -1 for latents - noise.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    sign: int = 1

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"FlowTarget.sign must be 1 (noise - latents) or -1 (latents - noise), got {self.sign!r}")


class CallOptions(TypedDict, total=False):
    """The keyword arguments of `masked_loss` but return_stats, for its overloads."""

    weighting: torch.Tensor | None
    prior: torch.Tensor | None
    prior_weight: torch.Tensor | float | Sequence[float] | None
    prior_gate: torch.Tensor | None
    mask_gate: torch.Tensor | None
    loss_delta: torch.Tensor | None
    normalizer: Normalizer | None
    process_group: ProcessGroup | None
    layout: Layout
    patches: tuple[int, int] | None
    backend: Backend


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """The tensors of one call as views of one form, and the numbers that go with them.

    `target` is the target itself, or the noise when `latents` is given; then target = flow_sign * (target - latents).
    """

    pred: torch.Tensor  # (B, C, F, H, W)
    target: torch.Tensor  # (B, C, F, H, W)
    latents: torch.Tensor | None  # (B, C, F, H, W)
    flow_sign: int
    prior: torch.Tensor | None  # (B, C, F, H, W)
    mask: torch.Tensor | None  # (B or 1, Fm, Hm, Wm)
    weighting: torch.Tensor | None  # (B,)
    prior_weight: torch.Tensor | None  # (B,), in place of `prior_number`
    prior_number: float
    prior_gate: torch.Tensor | None  # (B,), bool or float
    mask_gate: torch.Tensor | None  # (B,), bool
    loss_delta: torch.Tensor | None  # (B,), in place of that of the config
    normalizer: tuple[Any, ...] | None  # one or two numbers or 0-d tensors
    process_group: ProcessGroup | None
    recording: Recording | None = None  # where the launches of this call are kept for the next one of its form
    patches: tuple[int, int] | None = None  # rows and columns of 2x2 patches: pred is (B, C, 1, T, 4), the mask is not

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Those of `TENSORS`."""
        return tuple([getattr(self, name) for name in TENSORS])

    @property
    def batch(self) -> int:
        return self.pred.shape[0]

    @property
    def channels(self) -> int:
        return self.pred.shape[1]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, H, W): the positions that carry a weight, as the mask has them."""
        if self.patches is not None:
            return 1, 2 * self.patches[0], 2 * self.patches[1]
        return (self.pred.shape[2], self.pred.shape[3], self.pred.shape[4])

    @property
    def positions(self) -> int:
        return self.pred.shape[2] * self.pred.shape[3] * self.pred.shape[4]

    def delta(self, config: MaskedLossConfig, dtype: torch.dtype) -> torch.Tensor | float:
        """`loss_delta` of each sample, (B, 1, 1, 1, 1), or that of the config for all."""
        return config.loss_delta if self.loss_delta is None else self.loss_delta.to(dtype).view(-1, 1, 1, 1, 1)


# The tensors of a call by their fields, in the order in which they travel together.
TENSORS = (
    "pred", "target", "latents", "prior", "mask", "weighting", "prior_gate", "mask_gate", "loss_delta", "prior_weight",
)  # fmt: skip


def _normalizer(value: Any, has_prior: bool, config: MaskedLossConfig, pred: torch.Tensor) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for item in values:
        if isinstance(item, torch.Tensor):
            if item.dim() != 0:
                raise ValueError(
                    f"normalizer must be a number or a 0-d tensor, got a tensor of shape {tuple(item.shape)}"
                )
            check_device("normalizer", item, pred)
        elif isinstance(item, bool) or not isinstance(item, (int, float)):
            raise TypeError(f"normalizer must be a number or a 0-d tensor, got {type(item).__name__}")
        elif not item > 0:
            raise ValueError(f"normalizer must be > 0, got {item!r}")
    wanted = 2 if has_prior and not config.per_sample and config.normalization != "mean" else 1
    if len(values) != wanted:
        expected = "a pair (sum of target weights, sum of prior weights)" if wanted == 2 else "one number"
        raise ValueError(f"normalizer must be {expected} for this call, got {len(values)} value(s)")
    if config.area_scale_beta and not config.per_sample:
        raise ValueError(
            "normalizer with area_scale_beta would scale by the area of one micro-batch: set per_sample=True or area_scale_beta=0"
        )
    return values


def describe(
    pred: Any,
    target: Any,
    mask: Any,
    config: MaskedLossConfig,
    *,
    layout: str = "channels_first",
    patches: Any = None,
    weighting: Any = None,
    prior: Any = None,
    prior_weight: Any = None,
    prior_gate: Any = None,
    mask_gate: Any = None,
    loss_delta: Any = None,
    normalizer: Any = None,
    process_group: Any = None,
    recording: Recording | None = None,
) -> LossInputs:
    """Validates one call of `masked_loss` and returns it in one form. See there for the arguments."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    pred = checked_tensor("pred", pred)
    if pred.dim() not in {"channels_first": (4, 5), "layered": (5,), "packed": (3,)}[layout]:
        raise ValueError(f"pred must be {PRED_SHAPES[layout]} with layout={layout!r}, got {tuple(pred.shape)}")
    if 0 in pred.shape:
        raise ValueError(f"pred has no elements: its shape is {tuple(pred.shape)}")
    check_dtype("pred", pred, FLOAT_DTYPES)
    patches = checked_patches(patches, pred, layout)
    canonical_pred = canonical(pred, layout)
    batch, _, frames, height, width = canonical_pred.shape
    grid = (frames, height, width) if patches is None else (1, 2 * patches[0], 2 * patches[1])

    latents, flow_sign = None, 1
    if isinstance(target, FlowTarget):
        latents = like_pred("target.latents", target.latents, pred, layout)
        canonical_target = like_pred("target.noise", target.noise, pred, layout)
        flow_sign = target.sign
    else:
        canonical_target = like_pred("target", target, pred, layout)

    canonical_prior = None if prior is None else like_pred("prior", prior, pred, layout)
    if mask is not None:
        mask = canonical_mask(mask, (batch, *grid), image=pred.dim() < 5, layered=layout == "layered")
        check_device("mask", mask, pred)
    if weighting is not None:
        weighting = per_sample_numbers("weighting", weighting, pred, batch, FLOAT_DTYPES)
    if prior_gate is not None:
        prior_gate = per_sample_numbers("prior_gate", prior_gate, pred, batch, (*FLOAT_DTYPES, torch.bool))
        if prior is None:
            raise ValueError(
                "prior_gate was given without prior, and has nothing to gate: give prior=, or drop prior_gate"
            )
    if mask_gate is not None:
        mask_gate = per_sample_numbers("mask_gate", mask_gate, pred, batch, (torch.bool,))
    if loss_delta is not None:
        loss_delta = per_sample_numbers("loss_delta", loss_delta, pred, batch, FLOAT_DTYPES)
    weight = _prior_weight(prior_weight, config, pred, batch, prior is not None)
    return LossInputs(
        pred=canonical_pred,
        target=canonical_target,
        latents=latents,
        flow_sign=flow_sign,
        prior=canonical_prior,
        mask=mask,
        weighting=weighting,
        prior_weight=weight if isinstance(weight, torch.Tensor) else None,
        prior_number=0.0 if isinstance(weight, torch.Tensor) else weight,
        prior_gate=prior_gate,
        mask_gate=mask_gate,
        loss_delta=loss_delta,
        normalizer=None if normalizer is None else _normalizer(normalizer, prior is not None, config, pred),
        process_group=_checked_group(process_group),
        recording=recording,
        patches=patches,
    )


def _prior_weight(
    value: Any, config: MaskedLossConfig, pred: torch.Tensor, batch: int, has_prior: bool
) -> torch.Tensor | float:
    checked = config.prior_weight
    if value is not None and not has_prior:
        raise ValueError("prior_weight was given without prior, and has no effect: give prior=, or drop prior_weight")
    if isinstance(value, torch.Tensor):
        if not config.per_sample and value.numel() != 1:
            raise ValueError("prior_weight with one value per sample needs a config with per_sample=True")
        return per_sample_numbers("prior_weight", value, pred, batch, FLOAT_DTYPES)
    if value is not None:
        checked = checked_prior_weight(value, config.per_sample)
    if isinstance(checked, tuple):
        if not has_prior:
            return 0.0
        if len(checked) != batch:
            raise ValueError(f"prior_weight has {len(checked)} values for a batch of {batch}: give one per sample")
        # Filled on the device: torch.tensor would wait for a copy from the host.
        numbers = [torch.full((), number, dtype=torch.float32, device=pred.device) for number in checked]
        return torch.stack(numbers)
    return checked


def _checked_group(value: Any) -> Any:
    if value is None:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup that this process is in, got {type(value).__name__}: "
            "give torch.distributed.group.WORLD after init_process_group, or None"
        )
    return value
