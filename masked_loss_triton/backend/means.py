"""The mean error inside and outside a mask, for the stats: plain torch, in a pass of its own over what the loss read."""

from __future__ import annotations

import torch

from masked_loss_triton.backend.formulas import error_and_slope
from masked_loss_triton.call import LossInputs
from masked_loss_triton.config import MaskedLossConfig

BLOCK = 1 << 20  # elements at once: what is made on the way stays small beside pred


@torch.no_grad()
def error_means(
    inputs: LossInputs, config: MaskedLossConfig, raw: torch.Tensor, counted: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Returns error_inside, error_outside, drift_inside and drift_outside of `MaskedLossStats`, 0-d, in the dtype of `raw`.

        inside = sum(m rho(d)) / sum(m),   outside = sum((1 - m) rho(d)) / sum(1 - m),   0 where nothing is summed

    Args:
        inputs: of the call.
        config: its options.
        raw: m, (B or 1, F, H, W) float32 or float64.
        counted: of that shape, 0 at positions that are left out, 1 elsewhere.
    """
    inside, outside = raw, 1 - raw
    if counted is not None:
        inside, outside = inside * counted, outside * counted
    weights = [weight.unsqueeze(1).expand(inputs.pred.shape) for weight in (inside, outside)]
    rows = max(1, BLOCK // max(1, inputs.pred[:, :, :, :1].numel()))
    step = inputs.pred.shape[3] if torch.compiler.is_compiling() else rows
    sums = []
    for row in range(0, inputs.pred.shape[3], step):
        tensors = (inputs.pred, inputs.target, inputs.pred if inputs.prior is None else inputs.prior, *weights)
        pred, target, prior, *parts = (x[:, :, :, row : row + step].to(raw.dtype) for x in tensors)
        if inputs.latents is not None:
            target = inputs.flow_sign * (target - inputs.latents[:, :, :, row : row + step].to(raw.dtype))
        errors = [error_and_slope(pred - other, config.loss_type, config.loss_delta)[0] for other in (target, prior)]
        sums.append(torch.stack([(error * part).sum() for error in errors for part in parts]))
    total = [weight.sum() for weight in weights]
    below = torch.stack([torch.where(number == 0, torch.ones_like(number), number) for number in total * 2])
    return list((torch.stack(sums).sum(0) / below).unbind())
