"""ai-toolkit: exact weights and a right inverted mask prior. In the file extensions/masked_loss/__init__.py of the trainer:

    from masked_loss_triton import MaskedLossConfig
    from masked_loss_triton.integration import ai_toolkit
    ai_toolkit.install(MaskedLossConfig(min_weight=0.05))

The trainer imports its extensions at the start. Its masks (`mask_path`, `alpha_mask`) and switches stay, also
`inverted_mask_prior` and the multiplier of the prior. What changes: masks are averaged over each latent cell instead of picked at
a point, in float32, and the prior's region is each sample's own, in [0, 1], where the trainer takes that of the first sample for
the whole batch. An item without a mask counts as masked out completely, as the trainer fills it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, mask_weights, masked_loss
from masked_loss_triton.config import LossType
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.factors import check_config, unreduced_factors
from masked_loss_triton.integration.replace import replace

TESTED = "ai-toolkit 0.12.26 (27a03a9)"
MODULE = "extensions_built_in.sd_trainer.SDTrainer"
PARAMETERS = (
    "self",
    "noise_pred",
    "noise",
    "noisy_latents",
    "timesteps",
    "batch",
    "mask_multiplier",
    "prior_pred",
    "kwargs",
)
# These change the prediction or the loss between the two terms, so that a prior added afterwards would be another one.
NOT_WITH_PRIOR = (
    "match_noise_norm",
    "correct_pred_norm",
    "do_prior_divergence",
    "learnable_snr_gos",
    "snr_gamma",
    "min_snr_gamma",
)


def install(config: MaskedLossConfig, trainer: type | None = None) -> None:
    """Puts our weights in place of those that `calculate_loss` gets.

    Args:
        config: how masks become weights; the loss function and the weight of the prior stay the trainer's.
        trainer: the class, `SDTrainer` when None. Subclasses without a `calculate_loss` of their own inherit it.

    Raises:
        UserError: for a version whose function is another, or an option that would do nothing.
    """
    check_config(config, "ai-toolkit")
    owner = trainer or importlib.import_module(MODULE).SDTrainer

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def calculate_loss(
            self: Any,
            noise_pred: torch.Tensor,
            noise: torch.Tensor,
            noisy_latents: torch.Tensor,
            timesteps: torch.Tensor,
            batch: Any,
            mask_multiplier: Any = 1.0,
            prior_pred: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            rest = (noise, noisy_latents, timesteps, batch)
            if batch.mask_tensor is None or not self.sd.do_masked_loss:
                return original(self, noise_pred, *rest, mask_multiplier, prior_pred, **kwargs)
            options = self.train_config
            has_prior = bool(options.inverted_mask_prior) and prior_pred is not None
            _check(options, batch, noise_pred, has_prior)
            mask = batch.mask_tensor.to(noise_pred.device)
            target = unreduced_factors(noise_pred, mask, config, has_prior=has_prior)[0]
            # The trainer repeats a mask over the frames of a clip itself; it has one mask for all of them.
            target = target[:, :, 0] if target.dim() == 5 else target
            if not has_prior:
                return original(self, noise_pred, *rest, target, prior_pred, **kwargs)
            weight = options.inverted_mask_prior_multiplier
            options.inverted_mask_prior_multiplier = 0.0  # its own prior term; the target it chooses is that of a prior
            try:
                loss = original(self, noise_pred, *rest, target, prior_pred, **kwargs)
            finally:
                options.inverted_mask_prior_multiplier = weight
            loss_type: LossType = "l1" if options.loss_type == "mae" else "mse"
            return loss + weight * _prior_term(noise_pred, prior_pred, mask, config, loss_type)

        return calculate_loss

    replace(owner, "calculate_loss", PARAMETERS, TESTED, make)


def _prior_term(
    pred: torch.Tensor, prior: torch.Tensor | None, mask: torch.Tensor, config: MaskedLossConfig, loss_type: LossType
) -> torch.Tensor:
    assert prior is not None
    frames = pred.shape[2] if pred.dim() == 5 else 1
    region = mask_weights(mask, config, shape=(pred.shape[0], frames, *pred.shape[-2:]))[1]
    own = MaskedLossConfig(
        loss_type=loss_type, normalization=config.normalization, per_sample=config.per_sample, eps=config.eps
    )
    return masked_loss(pred, prior.detach().to(pred.device), region, own)


def _check(options: Any, batch: Any, noise_pred: torch.Tensor, has_prior: bool) -> None:
    if options.train_turbo:
        raise UserError(
            "train_turbo reads other channels of the mask, which this drop-in does not make: switch it off", 2
        )
    if len(batch.mask_tensor) != len(noise_pred):
        raise UserError(
            f"a batch of {len(batch.mask_tensor)} masks came with {len(noise_pred)} predictions: "
            "switch single_item_batching off, it separates samples from their masks",
            2,
        )
    if has_prior:
        used = [name for name in NOT_WITH_PRIOR if getattr(options, name, None)]
        if used or options.pred_scaler != 1.0:
            raise UserError(f"inverted_mask_prior cannot be combined with {', '.join(used) or 'pred_scaler'} here", 2)
