"""Stage 9 of docs/formula.md: from the sums of the weights to the factor of each sample, in plain torch.

The loss is  sum_b s_b sum(w e)  +  sum_b r_b sum(v e'),  with e the error to the target, e' the error to the prior, and all
normalisation, weighting and prior weights inside the factors s and r, which depend on the mask alone. The gradient is therefore
known as soon as the error is.
"""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.backend.formulas import unknown
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig

Factor = torch.Tensor | float  # of each sample, (B,), or one of all, 0-d or a number


def loss_factors(
    sum_w: torch.Tensor, sum_v: torch.Tensor, sum_raw: torch.Tensor, inputs: LossInputs, config: MaskedLossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (s, r) of one call, each (B,), in the dtype of the sums; see `unexpanded_factors`."""
    s, r = unexpanded_factors(sum_w, sum_v, sum_raw, inputs, config)
    return _per_sample(s, sum_w), _per_sample(r, sum_w)


def unexpanded_factors(
    sum_w: torch.Tensor, sum_v: torch.Tensor, sum_raw: torch.Tensor, inputs: LossInputs, config: MaskedLossConfig
) -> tuple[Factor, Factor]:
    """The factors (s, r) of one call, in the dtype of the sums, not expanded to the batch where they are the same for all.

    Args:
        sum_w, sum_v, sum_raw: (B,), sums over the positions of each sample, not over channels.
    """
    batch, channels, positions = inputs.batch, inputs.channels, inputs.positions
    has_prior = inputs.prior is not None
    count: Any
    samples: Any = 1
    mean_raw: Any = 1.0
    total_v: Any = 0.0
    given = None  # in the dtype of the sums: a quotient of bfloat16 would have two digits
    if inputs.normalizer is not None:
        given = [x.to(sum_w.dtype) if isinstance(x, torch.Tensor) else x for x in inputs.normalizer]
    # Numbers stay numbers as long as they can: each tensor of one element costs an operation, or a launch.
    if config.per_sample:
        samples = batch if given is None else given[0]
        (samples,), group_size = _exchanged([samples], sum_w, inputs)
        total_w, count = channels * sum_w, channels * positions
        total_v = channels * sum_v if has_prior else total_v
        mean_raw = sum_raw / positions if config.area_scale_beta else mean_raw
    else:
        total_w, count = channels * _over_batch(sum_w), batch * channels * positions
        total_v = channels * _over_batch(sum_v) if has_prior else total_v
        total_raw = _over_batch(sum_raw) if config.area_scale_beta else 0.0
        if given is not None and config.normalization == "mean":
            count = given[0]
        elif given is not None:
            total_w, total_v = given[0], given[-1]
        totals = [total_w, total_v, count, total_raw, batch * positions]
        (total_w, total_v, count, total_raw, count_raw), group_size = _exchanged(totals, sum_w, inputs)
        mean_raw = total_raw / count_raw if config.area_scale_beta else mean_raw

    denominator_w: Any = count
    denominator_v: Any = count
    if config.normalization != "mean":
        if config.normalization not in ("weighted_mean", "mean_one"):
            raise unknown("normalization", config.normalization)
        eps = config.eps * (count if config.normalization == "mean_one" else 1)
        denominator_w, denominator_v = total_w + eps, total_v + eps
    # Data parallel training averages the gradients of its ranks; times the number of ranks, that average is the sum.
    s: Any = _quotient(group_size, denominator_w)
    prior_weight: Any = inputs.prior_number if inputs.prior_weight is None else inputs.prior_weight.to(sum_w.dtype)
    r: Any = prior_weight * _quotient(group_size, denominator_v) if has_prior else 0.0
    if config.per_sample:
        s, r = s / samples, r / samples
    if inputs.weighting is not None:
        weighting = inputs.weighting.to(sum_w.dtype)
        s, r = s * weighting, r * weighting
    if config.area_scale_beta:
        s = s * mean_raw**config.area_scale_beta
    return s, r


def _quotient(numerator: int, denominator: Any) -> Any:
    if numerator == 1 and isinstance(denominator, torch.Tensor):
        return denominator.reciprocal()  # torch divides a number by a tensor in two operations
    return numerator / denominator


def _over_batch(sums: torch.Tensor) -> torch.Tensor:
    return sums.sum() if sums.shape[0] > 1 else sums.view(())


def _constant(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    return torch.full((), value, dtype=like.dtype, device=like.device)  # not torch.tensor, which copies from the host


def _per_sample(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    return _constant(value, like).expand(like.shape)


def _exchanged(numbers: list[Any], like: torch.Tensor, inputs: LossInputs) -> tuple[list[Any], int]:
    """The sums of each number over the ranks of the process group, and how many ranks there are."""
    if inputs.process_group is None:
        return numbers, 1
    import torch.distributed as dist

    totals = torch.stack([_constant(number, like) for number in numbers])
    if totals.requires_grad:
        raise ValueError(
            "mask, prior_gate or normalizer requires grad, but process_group exchanges the denominators without a gradient: "
            "detach it, or drop process_group"
        )
    dist.all_reduce(totals, group=inputs.process_group)
    return list(totals.unbind()), dist.get_world_size(inputs.process_group)
