"""sd-scripts: exact weights for `--masked_loss` and `--alpha_mask`. In a script beside the trainer's, for instance train_masked.py:

    from masked_loss_triton import MaskedLossConfig
    from masked_loss_triton.integration import sd_scripts
    sd_scripts.install(MaskedLossConfig(min_weight=0.05))

    import runpy
    runpy.run_path("flux_train_network.py", run_name="__main__")

and `accelerate launch train_masked.py` with the trainer's own flags. Every script of the trainer takes the mask from the same
function, `apply_masked_loss(loss, batch)` of library/custom_train_functions.py. The trainer's mask is multiplied and never
divided by its area; here the config says how to normalise. Its loss types, loss weights and SNR factors stay. There is no
prior: the trainer makes no teacher's prediction.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.integration.factors import check_config, unreduced_factors
from masked_loss_triton.integration.replace import replace

TESTED = "sd-scripts of 2026-02 (48d368f)"


def mask_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """(B, 1, H, W) in [0, 1] at the size of the pictures: the red channel of mask pictures in [-1, 1], else alpha, else None."""
    pictures = batch.get("conditioning_images")
    if pictures is not None:
        return pictures[:, :1].float() / 2 + 0.5
    alpha = batch.get("alpha_masks")
    return None if alpha is None else alpha.float().unsqueeze(1)


def install(config: MaskedLossConfig) -> None:
    """Puts the config's weights in place of the trainer's, in its library and in scripts that are imported already.

    Raises:
        UserError: for a version whose function is another, or an option that would do nothing.
    """
    check_config(config, "sd-scripts")
    library = importlib.import_module("library.custom_train_functions")
    before = library.apply_masked_loss

    def make(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def apply_masked_loss(loss: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
            mask = mask_of(batch)
            return loss if mask is None else loss * unreduced_factors(loss, mask.to(loss.device), config)[0]

        return apply_masked_loss

    replace(library, "apply_masked_loss", ("loss", "batch"), TESTED, make)
    for module in list(sys.modules.values()):
        if vars(module).get("apply_masked_loss") is before:
            module.apply_masked_loss = library.apply_masked_loss  # type: ignore[attr-defined]
