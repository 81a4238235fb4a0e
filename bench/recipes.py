"""The masked losses that people train with today, written from their formulas, and the call of ours that replaces each.

Every recipe takes (pred, target, mask, prior) and computes in float32 (float64 for float64), as its trainer does in a LoRA run; the
mask is (B, Fm, Hm, Wm) in [0, 1], at the size of the pictures or of the latents. Image trainers are written for frames too: one
mask broadcast over them. What a trainer does to the mask file before the loss is not here. `MaskedLossConfig.preset` names the
differences that are meant; tests/test_presets.py holds both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from masked_loss_triton import MaskedLossConfig, masked_loss

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One trainer's loss.

    Args:
        function: (pred, target, mask, prior) -> 0-d loss.
        config: with it `masked_loss` computes the same.
        takes_prior: the recipe needs a prior; the others get None.
    """

    name: str
    function: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    config: MaskedLossConfig
    takes_prior: bool = False

    def __call__(self, pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
        return self.function(pred, target, mask, prior)

    def ours(self, pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None, **call: Any) -> Tensor:
        """The same loss from this project."""
        return masked_loss(pred, target, mask, self.config, prior=prior if self.takes_prior else None, **call)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _squared_error(pred: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(_wide(pred), _wide(target), reduction="none")


def _resized(mask: Tensor, like: Tensor, mode: str, **options: Any) -> Tensor:
    """The mask at the size of the latents, (B, 1, F or 1, H, W) or (B, 1, H, W)."""
    mask = F.interpolate(_wide(mask), size=like.shape[-2:], mode=mode, **options)
    return mask.unsqueeze(1) if like.dim() == 5 else mask


def _mean_of_samples(loss: Tensor) -> Tensor:
    return loss.mean(dim=list(range(1, loss.dim()))).mean()


def sd_scripts(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """mean(area(m) (p - t)^2)."""
    loss = _squared_error(pred, target)
    return _mean_of_samples(loss * _resized(mask, pred, "area"))


def simpletuner_mask(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """mean(area(m) (p - t)^2), the mask coming as a picture in [-1, 1]."""
    picture = _resized(mask * 2 - 1, pred, "area")
    return _mean_of_samples(_squared_error(pred, target) * (picture / 2 + 0.5))


def simpletuner_segmentation(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """mean([area(m) > 0] (p - t)^2)."""
    region = _resized(mask, pred, "area") > 0
    loss = _squared_error(pred, target)
    return _mean_of_samples(loss * region.to(loss.dtype))


def ai_toolkit(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """mean(m / mean(m) (p - t)^2), nearest; the weights are expanded over the channels before their mean is taken.

    With a prior: + mean(n / mean(n) (p - q)^2) / 2 with n = 1 - bicubic(m) of the first sample of the batch, dropped when it is not
    finite.
    """
    weights = _resized(mask, pred, "nearest").expand_as(pred)
    weights = weights / weights.mean()
    loss = (_squared_error(pred, target) * weights).mean(dim=list(range(1, pred.dim())))
    if prior is not None:
        outside = 1 - _resized(mask[:1], pred, "bicubic").expand_as(pred)
        outside = outside / outside.mean()
        prior_loss = _squared_error(pred, prior) * outside * 0.5
        if torch.isfinite(prior_loss).all():
            loss = loss + prior_loss.mean(dim=list(range(1, pred.dim())))
    return loss.mean()


def onetrainer(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    prior: Tensor | None = None,
    *,
    normalized: bool = False,
    prior_weight: float = 0.5,
    unmasked_weight: float = 0.1,
    antialias: bool = True,
) -> Tensor:
    """mean(max(m, u) (p - t)^2), bilinear; `normalized` divides by the mean of the weights over axes 1 to 3.

    With a prior: + prior_weight mean((1 - max(m, u)) (p - q)^2), its weights divided likewise.
    """
    weights = _resized(mask, pred, "bilinear", antialias=antialias).clamp(unmasked_weight, 1)
    loss = _squared_error(pred, target) * weights
    if normalized:
        loss = loss / weights.mean(dim=(1, 2, 3), keepdim=True)
    if prior is not None:
        outside = 1 - weights
        prior_loss = _squared_error(pred, prior) * (outside * prior_weight)
        if normalized:
            prior_loss = prior_loss / outside.mean(dim=(1, 2, 3), keepdim=True)
        loss = loss + prior_loss
    return _mean_of_samples(loss)


def diffusion_pipe(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """mean(nearest-exact(m) (p - t)^2)."""
    loss = _squared_error(pred, target) * _resized(mask, pred, "nearest-exact")
    return loss.mean()


def blissful(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    prior: Tensor | None = None,
    *,
    min_weight: float = 0.0,
    gamma: float = 1.0,
    prior_weight: float = 0.5,
) -> Tensor:
    """sum(w (p - t)^2) / (sum(w) + 1e-8) with w = area(m)^gamma (1 - u) + u, expanded over the channels and the batch.

    With a prior: + prior_weight sum(v (p - q)^2) / (sum(v) + 1e-8) with v = 1 - w.
    """
    weights = _resized(mask, pred, "area")
    if gamma != 1:
        weights = weights**gamma
    if min_weight:
        weights = weights * (1 - min_weight) + min_weight

    def weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
        weight = weight.expand_as(error)
        return (error * weight).sum() / (weight.sum() + 1e-8)

    loss = weighted_mean(_squared_error(pred, target), weights)
    if prior is not None:
        loss = loss + prior_weight * weighted_mean(_squared_error(pred, prior), 1 - weights)
    return loss


def onetrainer_normalized(pred: Tensor, target: Tensor, mask: Tensor, prior: Tensor | None = None) -> Tensor:
    """`onetrainer` with its option normalize_masked_area_loss."""
    return onetrainer(pred, target, mask, prior, normalized=True)


_preset = MaskedLossConfig.preset
_NORMALIZED = {"normalization": "mean_one", "per_sample": True}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("sd-scripts", sd_scripts, _preset("sd-scripts")),
        Recipe("SimpleTuner mask", simpletuner_mask, _preset("simpletuner")),
        Recipe("SimpleTuner segmentation", simpletuner_segmentation, _preset("simpletuner", binarize=0.0)),
        Recipe("ai-toolkit", ai_toolkit, _preset("ai-toolkit")),
        Recipe("OneTrainer", onetrainer, _preset("onetrainer")),
        Recipe("OneTrainer normalized", onetrainer_normalized, _preset("onetrainer", **_NORMALIZED)),
        Recipe("diffusion-pipe", diffusion_pipe, _preset("diffusion-pipe")),
        Recipe("blissful", blissful, _preset("blissful")),
        Recipe("ai-toolkit + prior", ai_toolkit, _preset("ai-toolkit"), takes_prior=True),
        Recipe("OneTrainer + prior", onetrainer, _preset("onetrainer", prior_weight=0.5), takes_prior=True),
        Recipe(
            "OneTrainer normalized + prior",
            onetrainer_normalized,
            _preset("onetrainer", prior_weight=0.5, **_NORMALIZED),
            takes_prior=True,
        ),
        Recipe("blissful + prior", blissful, _preset("blissful"), takes_prior=True),
    )
}
