"""Masks of labels in training: weighted into one mask, and looked at one by one for the log."""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.labels import UNLABELLED, label_of

Shares = dict[str, torch.Tensor]  # (B, 1, F, H, W) of each label


def shares_of(batch: dict[str, Any], mask: torch.Tensor, first_layer_dropped: bool) -> Shares:
    """The share of each label in each cell of a batch; none where its caches have a plain mask alone.

    Args:
        batch: the trainer's.
        mask: of the batch, (B, 1, F, H, W), as `mask_of` gives it.
        first_layer_dropped: the loss is over all layers but the first.

    Raises:
        UserError: for shares of another shape.
    """
    found = {label: value for name, value in batch.items() if (label := label_of(name))}
    if first_layer_dropped:
        found = {label: value[:, :, 1:] for label, value in found.items()}
    for label, value in found.items():
        if value.shape != mask.shape:
            raise UserError(
                f"label {label} of a batch is {tuple(value.shape)}, its mask {tuple(mask.shape)}: some of its items have other "
                "labels; run masked-loss cache on this dataset"
            )
    return found


def weighted(mask: torch.Tensor, shares: Shares, factors: dict[str, float]) -> torch.Tensor:
    """The mask that the weights of labels make: the sum of factor times share. A plain mask is `UNLABELLED`."""
    if not factors:
        return mask
    if not shares:
        return mask.float() * factors.get(UNLABELLED, 1.0)
    total = torch.zeros_like(mask, dtype=torch.float32)
    for label, share in shares.items():
        total.add_(share.float(), alpha=factors.get(label, 1.0))
    return total.clamp_(max=1)


@torch.no_grad()
def label_logs(
    pred: torch.Tensor, target: torch.Tensor, shares: Shares, config: MaskedLossConfig, layout: str, kept: Any
) -> dict[str, float]:
    """The coverage of each label in a batch, and the mean error where it is. Reads pred and target once for each.

    Args:
        pred, target: as for `masked_loss`.
        shares: of the batch.
        config: of the loss, for its kind of error.
        layout: of pred.
        kept: (B, F, H, W), what is not counted where it is False; or None.
    """
    plain, found = MaskedLossConfig(loss_type=config.loss_type, loss_delta=config.loss_delta), {}
    for label, share in shares.items():
        mean = float(share.float().mean())
        found[f"mask/coverage_{label}"] = mean
        counted = share.float() if kept is None else share.float() * kept.unsqueeze(1)
        if bool(counted.any()):
            loss = masked_loss(pred.detach(), target, counted, plain, layout=layout)  # type: ignore[call-overload]
            found[f"mask/error_inside_{label}"] = float(loss)
    return found
