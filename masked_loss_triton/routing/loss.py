"""The loss of a routed step: dropped tokens weigh nothing in either term, and the denominators know it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from masked_loss_triton.backend import stages
from masked_loss_triton.checks import canonical_mask
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.loss import mask_weights, masked_loss
from masked_loss_triton.routing.router import Kept
from masked_loss_triton.stats import MaskedLossStats

# What makes weights of a mask, at the values that leave weights as they are.
_DONE: dict[str, Any] = {
    "binarize": None,
    "invert": False,
    "blur_kernel_size": 0,
    "gamma": 1.0,
    "min_weight": 0.0,
    "prior_threshold": None,
    "area_scale_beta": 0.0,
}


class RoutedWeights:
    """The weights of one routed step: `target` and `prior`, (B, F, H, W) float32, and `kept`, None where nothing is dropped.

    Args:
        mask, config, shape, prior_gate, mask_gate: as for `mask_weights`.
        has_prior: whether the loss will have a prior term.

    Raises:
        ValueError: for options that a routed loss cannot have, and as `mask_weights`.
    """

    def __init__(
        self,
        mask: torch.Tensor | None,
        config: MaskedLossConfig,
        shape: tuple[int, int, int, int],
        *,
        has_prior: bool = False,
        prior_gate: torch.Tensor | None = None,
        mask_gate: torch.Tensor | None = None,
    ) -> None:
        self.mask, self.config = mask, config
        self.kept: Kept | None = None
        self.gates = {"prior_gate": prior_gate, "mask_gate": mask_gate}
        self.target, self.prior = mask_weights(mask, config, shape=shape, has_prior=has_prior, **self.gates)

    def drop(self, kept: Kept) -> None:
        """Takes all weight from the positions that are not kept."""
        if self.config.area_scale_beta:
            raise ValueError(
                "area_scale_beta scales by the whole mask, and a routed step sees a part: drop one of the two"
            )
        self.target, self.prior, self.kept = self.target * kept.positions, self.prior * kept.positions, kept

    def loss(
        self,
        pred: torch.Tensor,
        target: Any,
        *,
        prior: torch.Tensor | None = None,
        prior_weight: torch.Tensor | float | None = None,
        weighting: torch.Tensor | None = None,
        normalizer: Any = None,
        return_stats: bool = False,
        **call: Any,
    ) -> Any:
        """`masked_loss` with these weights; the arguments are its own. Without dropped tokens it is that very call."""
        if self.kept is None:
            given = {"prior": prior, "prior_weight": prior_weight, "weighting": weighting, "normalizer": normalizer}
            call.update(given, return_stats=return_stats, mask_gate=self.gates["mask_gate"])
            call["prior_gate"] = None if prior is None else self.gates["prior_gate"]
            return masked_loss(pred, target, self.mask, self.config, **call)
        config = dataclasses.replace(self.config, **_DONE)
        target_normalizer, prior_normalizer = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
        common = {"config": config, **call}
        total = target_term = masked_loss(
            pred, target, self.target, weighting=weighting, normalizer=target_normalizer, **common
        )
        prior_term = torch.zeros_like(target_term)
        if prior is not None:
            factor = config.prior_weight if prior_weight is None else prior_weight
            if isinstance(factor, (torch.Tensor, tuple)):
                factor = torch.as_tensor(factor, device=pred.device).reshape(-1)
                weighting, factor = (
                    factor if weighting is None else factor * weighting.reshape(len(weighting), -1)[:, 0],
                    1.0,
                )
            prior_term = factor * masked_loss(
                pred, prior, self.prior, weighting=weighting, normalizer=prior_normalizer, **common
            )
            total = target_term + prior_term
        if not return_stats:
            return total
        return total, self._stats(target_term, prior_term, pred.detach(), target, prior, call)

    @torch.no_grad()
    def _stats(
        self,
        target_term: torch.Tensor,
        prior_term: torch.Tensor,
        pred: torch.Tensor,
        target: Any,
        prior: torch.Tensor | None,
        call: dict[str, Any],
    ) -> MaskedLossStats:
        """The stats of a routed step: means of errors are over the kept positions."""
        assert self.kept is not None
        batch, frames, height, width = self.target.shape
        mask = None if self.mask is None else canonical_mask(self.mask, (batch, frames, height, width))
        raw = stages.raw_mask(mask, (frames, height, width), self.config, self.target, torch.float32)
        config = MaskedLossConfig(loss_type=self.config.loss_type, loss_delta=self.config.loss_delta)
        options = {name: value for name, value in call.items() if name in ("layout", "backend", "loss_delta")}
        means = []
        for other in (target, prior):
            for where in (raw, 1 - raw):
                if other is None:
                    means.append(target_term.new_zeros(()))
                else:
                    kept = where * self.kept.positions
                    means.append(masked_loss(pred, other, kept, config, return_stats=True, **options)[1].error_inside)
        errors = (means[0], means[1], means[2], means[3])
        return MaskedLossStats.from_weights(target_term, prior_term, raw, self.target, self.prior, errors, mask)
