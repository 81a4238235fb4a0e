"""What a call of the loss can tell about itself, as 0-d tensors on the device: nothing waits until somebody reads one."""

from __future__ import annotations

from typing import NamedTuple

import torch


class MaskedLossStats(NamedTuple):
    """Each field is a 0-d tensor on the device of pred, float32 (float64 from the reference in float64), without gradient.

    Means, minima and maxima are over the positions of the batch. "raw" is the mask at the size of the loss after inversion,
    before blur and gamma; "target_weight" is w, "prior_weight" is v. "error" is rho(pred - target) and "drift" rho(pred - prior),
    without weights or `weighting`: "inside" is their mean weighted by the raw mask m, "outside" by 1 - m, 0 where that is 0
    everywhere (m within 1e-6 of 0 or 1 is taken for it). Without a prior the drift is 0. Reading a value (`float(stats.loss)`)
    synchronises, and so do `to_dict` and printing, which shows a table.
    """

    loss: torch.Tensor
    target_term: torch.Tensor
    prior_term: torch.Tensor
    raw_mean: torch.Tensor
    raw_min: torch.Tensor
    raw_max: torch.Tensor
    target_weight_mean: torch.Tensor
    target_weight_min: torch.Tensor
    target_weight_max: torch.Tensor
    prior_weight_mean: torch.Tensor
    prior_weight_min: torch.Tensor
    prior_weight_max: torch.Tensor
    overlap: torch.Tensor  # mean over the positions of min(w, v): how much both terms claim
    prior_share: torch.Tensor  # prior_term / loss, 0 where the loss is 0
    error_inside: torch.Tensor
    error_outside: torch.Tensor
    drift_inside: torch.Tensor
    drift_outside: torch.Tensor
    mask_max: (
        torch.Tensor
    )  # of the mask as it was given: above 1 for bytes in a floating mask, which are clamped to ones

    @classmethod
    def from_weights(
        cls,
        target_term: torch.Tensor,
        prior_term: torch.Tensor,
        raw: torch.Tensor,
        w: torch.Tensor,
        v: torch.Tensor,
        errors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> MaskedLossStats:
        """From the two terms of the loss and the weights that made them, (B or 1, F, H, W) each.

        Args:
            errors: (error_inside, error_outside, drift_inside, drift_outside). mask: as it was given.
        """
        weights = [number for x in (raw, w, v) for number in (x.mean(), x.amin(), x.amax())]
        numbers = [*weights, torch.minimum(w, v).mean()]
        target_term, prior_term = target_term.detach(), prior_term.detach()
        loss = target_term + prior_term
        share = prior_term / torch.where(loss == 0, torch.ones_like(loss), loss)
        largest = loss.new_ones(()) if mask is None else mask.detach().amax().to(loss.dtype)
        if mask is not None and mask.dtype == torch.uint8:
            largest = largest / 255
        numbers = [loss, target_term, prior_term, *numbers, share, *errors, largest]
        return cls._make(number.detach() for number in numbers)

    def to_dict(self) -> dict[str, float]:
        """The fields as floats. Waits for the device once."""
        return dict(zip(self._fields, torch.stack(tuple(self)).tolist(), strict=True))

    def __str__(self) -> str:
        """A table: one row per number, or per mean, minimum and maximum of the same thing."""
        values = self.to_dict()
        rows = [f"{'':<16}{'mean':>12}{'min':>12}{'max':>12}"]
        for name, value in values.items():
            thing, _, which = name.rpartition("_")
            if which not in ("min", "max") or f"{thing}_mean" not in values:
                numbers = [value, *(values[f"{thing}_{w}"] for w in ("min", "max") if which == "mean")]
                title = (thing if which == "mean" else name).replace("_", " ")
                rows.append(f"{title:<16}" + "".join(f"{number:>12.5g}" for number in numbers))
        return "\n".join(rows)
