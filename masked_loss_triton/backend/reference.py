"""The loss as docs/formula.md says it, differentiated by autograd: what every other backend is compared with.

    e = rho(pred - target);   loss = sum_b s_b sum(w e) + sum_b r_b sum(v e')

Float64 when pred is float64, else float32. Differentiable in everything that is a tensor. Uses as much memory as it likes.
"""

from __future__ import annotations

import torch

from masked_loss_triton.backend import stages
from masked_loss_triton.backend.denominators import loss_factors
from masked_loss_triton.backend.formulas import error_and_slope
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.stats import MaskedLossStats


def loss(
    inputs: LossInputs, config: MaskedLossConfig, return_stats: bool
) -> tuple[torch.Tensor, MaskedLossStats | None]:
    """The loss, 0-d, and the stats if asked for."""
    dtype = torch.float64 if inputs.pred.dtype == torch.float64 else torch.float32
    pred = inputs.pred.to(dtype)
    target = inputs.target.to(dtype)
    if inputs.latents is not None:
        target = inputs.flow_sign * (target - inputs.latents.to(dtype))

    raw, w, v = stages.call_weights(inputs, config, dtype)
    sums = [x.sum(dim=(1, 2, 3)).expand(inputs.batch) for x in (w, v, raw)]
    s, r = loss_factors(sums[0], sums[1], sums[2], inputs, config)

    def term(factor: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error, _ = error_and_slope(pred - other, config.loss_type, inputs.delta(config, dtype))
        return (factor.view(-1, 1, 1, 1, 1) * weight.unsqueeze(1) * error).sum(), error.detach().sum(dim=1)

    target_term, errors = term(s, w, target)
    prior_term, drift = torch.zeros_like(target_term), torch.zeros_like(errors)
    if inputs.prior is not None:
        prior_term, drift = term(r, v, inputs.prior.to(dtype))
    stats = None
    if return_stats:
        inside = raw.detach()
        sums = [(where * x).sum() for x in (errors, drift) for where in (inside, 1 - inside)]
        means = stages.mean_errors(sums, inside, inputs.batch * inputs.channels)
        stats = MaskedLossStats.from_weights(target_term, prior_term, raw, w, v, means, inputs.mask)
    return target_term + prior_term, stats
