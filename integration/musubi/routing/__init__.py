"""Routing in the trainer: which micro-batches are routed, and what the log says of it. See `masked_loss_triton.routing`."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.cache.families import family_of
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.routing.models import layout_of
from masked_loss_triton.routing import RoutedWeights, Router
from masked_loss_triton.routing.lanes import rerouted

ROUTED, WITH_CROSS_ATTENTION = ("wan", "hv", "qwen"), ("wan",)


def check_routing(options: MaskOptions, architecture: str, args: Any) -> None:
    """Refuses what the models of a family, or the trainer's other flags, leave no room for, before a model is loaded.

    Args:
        architecture: the trainer's short name, which also ends its cache files.
        args: the trainer's own arguments.

    Raises:
        UserError: naming the flag and the families that take it.
    """
    family = family_of(architecture) or architecture
    if options.mask_routing < 1 and family not in ROUTED:
        raise UserError(f"--mask_routing can be had for {', '.join(ROUTED)}, not for {family}: drop the flag", 2)
    if options.mask_cross_attention and family not in WITH_CROSS_ATTENTION:
        raise UserError(
            f"--mask_cross_attention needs a cross-attention to the text, which {family} has not: use it with wan, or drop it",
            2,
        )
    if options.mask_cross_attention and getattr(args, "compile", False):
        raise UserError("--mask_cross_attention cannot be had with --compile: drop one", 2)
    if options.mask_routing < 1 and (getattr(args, "rope_func", None) or "default") != "default":
        raise UserError(f"--mask_routing needs --rope_func default, not {args.rope_func}: drop one", 2)


class Routing:
    """The routing of one run.

    Args:
        options: of the run.
        model: the trainer's transformer.
        seed: of the run; with the step it decides which tokens are kept, also after resuming.

    Raises:
        UserError: for a model, or blocks, that cannot be routed.
    """

    def __init__(self, options: MaskOptions, model: Any, seed: int) -> None:
        self.router = Router(
            keep=options.mask_routing, background=options.mask_routing_background, grow=options.mask_routing_grow
        )
        self.until, self.blocks, self.seed = options.mask_routing_until, options.routed_blocks, seed
        self.layout = layout_of(model)
        try:
            self.layout.routed_blocks(self.blocks)
        except ValueError as error:
            raise UserError(f"--mask_routing_blocks: {error}", 2) from error

    def weights(
        self,
        mask: torch.Tensor,
        config: MaskedLossConfig,
        shape: tuple[int, int, int, int],
        prior_gate: torch.Tensor | None,
        *,
        has_prior: bool,
        step: int,
        rank: int,
        progress: float,
    ) -> RoutedWeights | None:
        """The weights and the kept tokens of a micro-batch, or None once `progress`, 0 to 1, has passed --mask_routing_until."""
        if progress >= self.until:
            return None
        weights = RoutedWeights(mask, config, shape, has_prior=has_prior, prior_gate=prior_gate)
        draw = random.Random(f"routing {self.seed} {step} {rank}")
        floor, shared = config.min_weight, self.layout.shared
        weights.drop(self.router.choose(weights.target, self.layout.patch, draw, floor=floor, shared=shared))
        return weights

    def through(self, model: Any, weights: RoutedWeights | None) -> contextlib.AbstractContextManager[None]:
        """Makes the routed blocks of the model compute the kept tokens alone while a `with` block runs."""
        if weights is None or weights.kept is None:
            return contextlib.nullcontext()
        return rerouted(model, self.layout, weights.kept, self.blocks)

    def logs(self, weights: RoutedWeights | None) -> dict[str, float]:
        """Of one micro-batch: the share of tokens computed in routed blocks, the share that carries weight, and about how much
        of the model's computation is saved. Waits for the device."""
        kept = None if weights is None else weights.kept
        if kept is None:
            return {"mask/routing_kept": 1.0, "mask/routing_saved": 0.0}
        return {
            "mask/routing_kept": kept.index.shape[1] / kept.tokens,
            "mask/routing_weighted": float(kept.weighted),
            "mask/routing_saved": self.layout.saved(kept, self.blocks),
        }
