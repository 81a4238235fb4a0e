"""For trainers that multiply unreduced losses by a mask and average later: factors that make that average the masked loss.

    mean(losses * target) + prior_weight * mean(prior_losses * prior)  =  masked_loss of the same errors

What the trainer does between the two (its own loss functions, weights per timestep or sample) stays. This is not the fused loss:
the trainer has written the errors to memory already.
"""

from __future__ import annotations

import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.backend.denominators import loss_factors
from masked_loss_triton.backend.stages import call_weights
from masked_loss_triton.call import describe
from masked_loss_triton.errors import UserError


def check_config(config: MaskedLossConfig, trainer: str) -> None:
    """Refuses options that the trainer has itself, and that would do nothing here."""
    if config.loss_type != "mse":
        raise UserError(
            f"loss_type={config.loss_type!r} does nothing here: choose the loss in {trainer}'s own config", 2
        )


@torch.no_grad()
def unreduced_factors(
    like: torch.Tensor, mask: torch.Tensor, config: MaskedLossConfig, *, has_prior: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (target, prior) of unreduced losses.

    Args:
        like: the losses, or anything of their shape (B, C, F, H, W) or (B, C, H, W), dtype and device.
        mask: as `masked_loss` takes it.
        has_prior: whether there is a prior term; without one its factors are 0 and nothing is taken from the target.

    Returns:
        Two float32 tensors (B, 1, F, H, W) or (B, 1, H, W). 0 where nothing is weighted, never NaN. `config.prior_weight` is
        not in them: the weight of a prior is the trainer's.
    """
    inputs = describe(
        like, like, mask, config, prior=like if has_prior else None, prior_weight=1.0 if has_prior else None
    )
    raw, w, v = (value.expand(inputs.batch, *inputs.grid) for value in call_weights(inputs, config, torch.float32))
    sum_w, sum_v, sum_raw = (value.sum(dim=(1, 2, 3)) for value in (w, v, raw))
    s, r = loss_factors(sum_w, sum_v, sum_raw, inputs, config)
    # Times the number of elements: the trainer takes the mean over them.
    target, prior = (
        (weight * (factor * like.numel()).view(-1, 1, 1, 1)).unsqueeze(1) for weight, factor in ((w, s), (v, r))
    )
    return (target, prior) if like.dim() == 5 else (target.squeeze(2), prior.squeeze(2))
