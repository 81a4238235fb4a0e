"""Routing: what the mask does not train is not computed.

Between two blocks of a transformer only some tokens are computed: those that the loss weights, and a random part of the others for
context. The others pass by, and weigh nothing in the loss of the step (TREAD, arXiv 2501.04765).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.routing.diffusers import layout_of
from masked_loss_triton.routing.lanes import Layout, rerouted
from masked_loss_triton.routing.loss import RoutedWeights
from masked_loss_triton.routing.router import Kept, Router

__all__ = ["Kept", "Layout", "RoutedWeights", "Router", "plan_routing", "routed", "through"]


def plan_routing(
    model: Any,
    mask: torch.Tensor | None,
    keep: float = 0.5,
    *,
    config: MaskedLossConfig | None = None,
    shape: tuple[int, int, int, int] | None = None,
    background: float = 0.25,
    grow: int = 1,
    seed: Any = 0,
    step: int = 0,
    has_prior: bool = False,
    prior_gate: torch.Tensor | None = None,
    mask_gate: torch.Tensor | None = None,
) -> RoutedWeights:
    """Returns the tokens that one step keeps, and the weights of its loss; for `through`. The arguments are those of `routed`."""
    router = Router(keep=keep, background=background, grow=grow)
    if shape is None:
        if mask is None:
            raise ValueError("shape must be (B, F, H, W) of the latents where mask is None")
        shape = (mask.shape[0], 1 if mask.dim() == 3 else mask.shape[-3], *mask.shape[-2:])
    config, layout = config or MaskedLossConfig(), layout_of(model)
    gates = {"prior_gate": prior_gate, "mask_gate": mask_gate}
    weights = RoutedWeights(mask, config, shape, has_prior=has_prior, **gates)
    if keep < 1:
        draw = random.Random(f"routing {seed} {step}")
        weights.drop(router.choose(weights.target, layout.patch, draw, floor=config.min_weight, shared=layout.shared))
    return weights


def through(
    model: Any, weights: RoutedWeights | None, blocks: tuple[int, int] | None = None
) -> contextlib.AbstractContextManager[None]:
    """Makes the model compute, while a `with` block runs, only the tokens in its middle blocks that `plan_routing` keeps."""
    if weights is None or weights.kept is None:
        return contextlib.nullcontext()
    return rerouted(model, layout_of(model), weights.kept, blocks)


@contextlib.contextmanager
def routed(
    model: Any,
    mask: torch.Tensor | None,
    keep: float = 0.5,
    *,
    blocks: tuple[int, int] | None = None,
    **options: Any,
) -> Iterator[RoutedWeights]:
    """Makes the model compute, while a `with` block runs, only some tokens in its middle blocks; gives the weights of the loss.

        with routed(transformer, mask, keep=0.5, seed=seed, step=step) as weights:
            pred = transformer(noisy, timestep, text, return_dict=False)[0]
        loss = weights.loss(pred, FlowTarget(noise, latents))

    Kept are the tokens that the loss weights, grown by `grow` patches, then a random part of the others; when more carry weight
    than fit, a random part of them sits the step out. Dropped tokens weigh nothing in either term. Text and control pictures are
    always kept. With keep=1 nothing is changed. A teacher's pass belongs outside: within, it would be routed like the student's.

    Args:
        model: a WanTransformer3DModel, HunyuanVideoTransformer3DModel or QwenImageTransformer2DModel of diffusers, itself.
        mask, config, prior_gate, mask_gate: as for `masked_loss`.
        keep, background, grow: as for `Router`.
        shape: (B, F, H, W) of the latents; by default the mask's own, which is then at their size.
        blocks: the first and the last routed block, counted from 0 over all kinds of blocks; by default all but two at either end.
        seed, step: what the random order is drawn from; torch's generators are left alone.
        has_prior: whether `weights.loss` will be given a prior.

    Raises:
        ValueError: naming the argument and what it takes; for models that cannot be routed, with the reason.
    """
    weights = plan_routing(model, mask, keep, **options)
    with through(model, weights, blocks):
        yield weights
