"""Stage 9: from the sums of the weights to the factor of each sample, in plain torch.

The loss is  sum_b s_b sum(w e)  +  sum_b r_b sum(v e'),  with e the error to the target, e' the error to the prior, and all
normalisation, weighting and prior weights inside the factors s and r, which depend on the mask alone. The gradient is therefore
known as soon as the error is.
"""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.inputs import LossInputs


def needs_exchange(inputs: LossInputs) -> bool:
    """True when the denominators come from more than the batch at hand."""
    return inputs.normalizer is not None or inputs.process_group is not None


def loss_factors(
    sum_w: torch.Tensor, sum_v: torch.Tensor, sum_raw: torch.Tensor, inputs: LossInputs, config: MaskedLossConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (s, r) of one call, each (B,), in the dtype of the sums.

    Args:
        sum_w, sum_v, sum_raw: (B,), sums over the positions of each sample, not over channels.
    """
    batch, channels, positions = inputs.batch, inputs.channels, inputs.positions
    elements = channels * positions  # of one sample
    group_size = 1
    eps: Any
    if config.per_sample:
        if config.normalization == "mean":
            denominators = torch.full_like(sum_w, elements), torch.full_like(sum_v, elements)
        else:
            eps = config.eps * (elements if config.normalization == "mean_one" else 1)
            denominators = channels * sum_w + eps, channels * sum_v + eps
        samples = torch.full_like(sum_w[:1], batch)
        if inputs.normalizer is not None:
            samples = _constant(inputs.normalizer[0], sum_w).reshape(1)
        samples, group_size = _all_reduce(samples, inputs)
        denominators = denominators[0] * samples, denominators[1] * samples
        mean_raw = sum_raw / positions
    else:
        totals = torch.stack(
            [
                channels * sum_w.sum(),
                channels * sum_v.sum(),
                torch.full_like(sum_w[0], batch * elements),
                sum_raw.sum(),
                torch.full_like(sum_w[0], batch * positions),
            ]
        )
        if inputs.normalizer is not None:
            given = [_constant(value, sum_w) for value in inputs.normalizer]
            if config.normalization == "mean":
                totals = torch.cat([totals[:2], given[0].reshape(1), totals[3:]])
            else:
                totals = torch.cat([torch.stack([given[0], given[-1]]), totals[2:]])
        totals, group_size = _all_reduce(totals, inputs)
        total_w, total_v, total_elements, total_raw, total_positions = totals.unbind()
        if config.normalization == "mean":
            pair = total_elements, total_elements
        else:
            eps = config.eps * (total_elements if config.normalization == "mean_one" else 1)
            pair = total_w + eps, total_v + eps
        denominators = pair[0].expand(batch), pair[1].expand(batch)
        mean_raw = (total_raw / total_positions).expand(batch)

    weighting = torch.ones_like(sum_w) if inputs.weighting is None else inputs.weighting.to(sum_w.dtype)
    # Data parallel training averages the gradients of its ranks; times the number of ranks, that average is the sum.
    s = weighting * group_size / denominators[0]
    r = weighting * group_size / denominators[1] * inputs.prior_weight
    if config.area_scale_beta:
        s = s * mean_raw**config.area_scale_beta
    return s, r.to(s.dtype)


def _constant(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    return torch.full_like(like[0], value)


def _all_reduce(totals: torch.Tensor, inputs: LossInputs) -> tuple[torch.Tensor, int]:
    if inputs.process_group is None:
        return totals, 1
    import torch.distributed as dist

    if totals.requires_grad:
        raise ValueError(
            "mask, prior_gate or normalizer requires grad, but process_group exchanges the denominators without a gradient: "
            "detach it, or drop process_group"
        )
    totals = totals.clone()
    dist.all_reduce(totals, group=inputs.process_group)
    return totals, dist.get_world_size(inputs.process_group)
