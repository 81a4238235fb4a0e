"""OneTrainer: right weights for its masked training. In a script beside scripts/train.py, for instance scripts/train_masked.py:

    from util.import_util import script_imports
    script_imports()  # as every script of the trainer begins

    from masked_loss_triton.integration import onetrainer
    onetrainer.install()

    import runpy
    runpy.run_path("scripts/train.py", run_name="__main__")

and `python scripts/train_masked.py` with the trainer's own flags.

Without a config the trainer's own settings hold (Unmasked Weight, Normalize Masked Area Loss, Masked Prior Preservation Weight),
computed as they are meant: videos are normalised over the whole mask and not per column, and a picture without mask with
normalisation and prior gives no NaN. With `install(MaskedLossConfig(...))` the config decides in place of the first two. The
weight of the prior stays the trainer's, which also switches its teacher on. Its loss functions and weights stay.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.integration.factors import check_config, unreduced_factors
from masked_loss_triton.integration.replace import replace

TESTED = "OneTrainer of 2026-08 (23df383)"
MODULE = "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin"
PARAMETERS = ("losses", "mask", "unmasked_weight", "normalize_masked_area_loss")
PRIOR_PARAMETERS = (
    "losses",
    "prior_losses",
    "mask",
    "unmasked_weight",
    "normalize_masked_area_loss",
    "masked_prior_preservation_weight",
)


def trainers_config(unmasked_weight: float, normalize_masked_area_loss: bool) -> MaskedLossConfig:
    """The trainer's settings as a config. A weight of 1, which the config refuses, is not asked for: it is no mask at all."""
    return MaskedLossConfig.preset(
        "onetrainer",
        min_weight=unmasked_weight,
        per_sample=normalize_masked_area_loss,
        normalization="mean_one" if normalize_masked_area_loss else "mean",
    )


def install(config: MaskedLossConfig | None = None) -> None:
    """Puts our weights in place of the trainer's masked losses.

    Raises:
        UserError: for a version whose functions are others, or an option that would do nothing.
    """
    if config is not None:
        check_config(config, "OneTrainer")
    module = importlib.import_module(MODULE)

    def with_prior(
        losses: torch.Tensor,
        prior_losses: torch.Tensor | None,
        mask: torch.Tensor,
        unmasked_weight: float,
        normalize_masked_area_loss: bool,
        masked_prior_preservation_weight: float,
    ) -> torch.Tensor:
        if config is None and unmasked_weight >= 1:
            return losses
        chosen = config or trainers_config(unmasked_weight, normalize_masked_area_loss)
        has_prior = prior_losses is not None and masked_prior_preservation_weight != 0
        target, prior = unreduced_factors(losses, mask, chosen, has_prior=has_prior)
        if prior_losses is None or not has_prior:
            return losses * target
        return losses * target + prior_losses * prior * masked_prior_preservation_weight

    def masked_losses_with_prior(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return with_prior

    def masked_losses(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def without_prior(
            losses: torch.Tensor, mask: torch.Tensor, unmasked_weight: float, normalize_masked_area_loss: bool
        ) -> torch.Tensor:
            return with_prior(losses, None, mask, unmasked_weight, normalize_masked_area_loss, 0)

        return without_prior

    replace(module, "masked_losses", PARAMETERS, TESTED, masked_losses)
    replace(module, "masked_losses_with_prior", PRIOR_PARAMETERS, TESTED, masked_losses_with_prior)
