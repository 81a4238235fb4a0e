"""SimpleTuner: the masked loss in place of a model's own.

In the trainer, `ModelFoundation.loss(self, prepared_batch, model_output, apply_conditioning_mask=True)` (models/common.py:6217)
finds the mask in prepared_batch["conditioning_pixel_values"], (B, 3, H, W) in [-1, 1], when prepared_batch["loss_mask_type"] is
"mask" or "segmentation". To switch it on, before the trainer starts:

    from masked_loss_triton.integration import simpletuner
    ModelFoundation.loss = simpletuner.wrap(ModelFoundation.loss, MaskedLossConfig.preset("blissful"))

Models with a loss of their own (Sana, LTX2, Cosmos, flux, sd3, qwen_image) need the same line for their own class. The trainer's
`masked_loss_probability` is not read here.

A batch without a mask keeps the trainer's own loss. The trainer's SNR weighting applies to its own loss only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, masked_loss


def mask_of(prepared_batch: dict[str, Any]) -> torch.Tensor | None:
    """(B, 1, H, W) in [0, 1], or None where the batch has no mask: the red channel of a mask, the mean of a segmentation."""
    kind = prepared_batch.get("loss_mask_type")
    pixels = prepared_batch.get("conditioning_pixel_values")
    if kind not in ("mask", "segmentation") or pixels is None:
        return None
    if isinstance(pixels, (list, tuple)):
        if not pixels:
            return None
        # With a reference picture in the same batch the mask comes last; the trainer's own loss takes the first.
        pixels = pixels[-1]
    if pixels.dim() != 4:
        raise ValueError(
            f"conditioning_pixel_values must be one picture per sample, (B, 3, H, W), got {tuple(pixels.shape)}"
        )
    channel = pixels[:, :1] if kind == "mask" else pixels.mean(dim=1, keepdim=True)
    return channel.float() / 2 + 0.5


def wrap(original: Callable[..., torch.Tensor], config: MaskedLossConfig) -> Callable[..., torch.Tensor]:
    """A `ModelFoundation.loss` that masks where there is a mask, and calls the original where there is none."""

    def loss(
        self: Any, prepared_batch: dict[str, Any], model_output: dict[str, Any], apply_conditioning_mask: bool = True
    ) -> torch.Tensor:
        mask = mask_of(prepared_batch) if apply_conditioning_mask else None
        if mask is None:
            return original(self, prepared_batch, model_output, apply_conditioning_mask)
        pred = model_output["model_prediction"]
        target = self.get_prediction_target(prepared_batch)
        return masked_loss(pred, target.to(pred.device), mask.to(pred.device), config)

    return loss
