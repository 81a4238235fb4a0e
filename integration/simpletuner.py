"""SimpleTuner: exact weights for its `mask` and `segmentation` datasets, videos included. In a script of your own:

    from masked_loss_triton import MaskedLossConfig
    from masked_loss_triton.integration import simpletuner
    simpletuner.install(MaskedLossConfig(min_weight=0.05))

    import runpy
    runpy.run_module("simpletuner.train", run_name="__main__")

The trainer multiplies by its mask inside `ModelFoundation.loss` (models/common.py). That function is called as before, with the
config's weights in place of the mask picture, so its loss types, SNR weights and schedules stay. What changes: the config
normalises; one mask covers all frames of a clip, which is an error in the trainer; a mask that comes with a reference picture is
used in place of that picture; grey values of a segmentation count as they are, unless `binarize` is set (the trainer's "above 0"
grows a mask by up to a latent cell). `masked_loss_probability` decides per batch about segmentations, as in the trainer.

Models with a loss of their own (Sana, LTX2, Cosmos, ...) are given by class: `install(config, Sana)`.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.factors import check_config, unreduced_factors
from masked_loss_triton.integration.replace import replace

TESTED = "SimpleTuner of 2026-08 (bc8e6ab)"
PARAMETERS = ("self", "prepared_batch", "model_output", "apply_conditioning_mask")
KINDS = ("mask", "segmentation")
OURS = "masked_loss_pixels"  # our key in the trainer's batch


def kind_of(prepared_batch: dict[str, Any]) -> str | None:
    """ "mask", "segmentation" or None. Older batches have it in `conditioning_type`."""
    kind = prepared_batch.get("loss_mask_type") or prepared_batch.get("conditioning_type")
    return kind if kind in KINDS else None


def mask_of(prepared_batch: dict[str, Any]) -> torch.Tensor | None:
    """(B, 1, H, W) in [0, 1], or None where the batch has no mask: the red channel of a mask, the mean of a segmentation.

    Raises:
        UserError: for anything but one picture for each sample.
    """
    kind = kind_of(prepared_batch)
    pixels = prepared_batch.get(OURS)
    if pixels is None:
        pixels = prepared_batch.get("conditioning_pixel_values")
    if kind is None or pixels is None:
        return None
    if isinstance(pixels, (list, tuple)):
        if not pixels:
            return None
        pixels = pixels[-1]  # reference pictures come first
    if pixels.dim() != 4:
        raise UserError(
            f"conditioning_pixel_values must be one picture per sample, (B, 3, H, W), got {tuple(pixels.shape)}"
        )
    channel = pixels[:, :1] if kind == "mask" else pixels.mean(dim=1, keepdim=True)
    return channel.float() / 2 + 0.5


def install(config: MaskedLossConfig, *models: type) -> None:
    """Puts the config's weights in place of the trainer's masks, in `ModelFoundation` and in `models`.

    Raises:
        UserError: for a version whose functions are others, or an option that would do nothing.
    """
    check_config(config, "SimpleTuner")
    foundation = importlib.import_module("simpletuner.helpers.models.common").ModelFoundation
    for owner in (foundation, *models):
        replace(owner, "loss", PARAMETERS, TESTED, lambda original: wrap(original, config))
    replace(foundation, "prepare_batch_conditions", ("self", "batch", "state"), TESTED, _keep_the_mask)


def _keep_the_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the trainer's `prepare_batch_conditions`, which drops all but the first of several pictures: the mask is kept."""

    def prepare_batch_conditions(self: Any, batch: dict[str, Any], state: dict[str, Any]) -> Any:
        pixels = batch.get("conditioning_pixel_values")
        if kind_of(batch) and isinstance(pixels, (list, tuple)) and len(pixels) > 1:
            batch[OURS] = pixels[-1]
        return original(self, batch, state)

    return prepare_batch_conditions


def wrap(original: Callable[..., torch.Tensor], config: MaskedLossConfig) -> Callable[..., torch.Tensor]:
    """A `ModelFoundation.loss` with the config's weights where there is a mask, and the original where there is none."""

    def loss(
        self: Any, prepared_batch: dict[str, Any], model_output: dict[str, Any], apply_conditioning_mask: bool = True
    ) -> torch.Tensor:
        # A model's own loss may call the one of its base class: the mask is in place already.
        if not apply_conditioning_mask or prepared_batch.get(OURS) is False:
            return original(self, prepared_batch, model_output, apply_conditioning_mask)
        mask = mask_of(prepared_batch)
        if mask is None:
            return original(self, prepared_batch, model_output, apply_conditioning_mask)
        if kind_of(prepared_batch) == "segmentation" and random.random() >= self.config.masked_loss_probability:
            return original(self, prepared_batch, model_output, False)
        pred = model_output["model_prediction"]
        weights = unreduced_factors(pred, mask.to(pred.device), config)[0]
        # As a picture in [-1, 1] of the size of the loss, which the trainer turns back into these weights. 0 stays exactly 0.
        masked = {"loss_mask_type": "mask", "conditioning_pixel_values": weights * 2 - 1, OURS: False}
        return original(self, {**prepared_batch, **masked}, model_output, True)

    return loss
