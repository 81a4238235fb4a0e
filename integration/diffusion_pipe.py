"""diffusion-pipe: the masked loss in place of a pipeline's own.

In the trainer, `BasePipeline.get_loss_fn(self)` returns `loss_fn(output, label)` with label = (target, mask); the mask has the
size of the latents, or no elements where a batch has none (models/base.py:417-436). To switch it on, before the pipeline is built:

    from masked_loss_triton.integration import diffusion_pipe
    BasePipeline.get_loss_fn = diffusion_pipe.get_loss_fn(MaskedLossConfig(min_weight=0.05))

There is no prior: pipeline parallel training runs the network once per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, masked_loss


def loss_function(
    config: MaskedLossConfig,
) -> Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """`loss_fn(output, label)` as the trainer calls it.

    Args of the returned function:
        output: (B, C, F, H, W) or (B, C, H, W), or packed tokens (B, S, D), any floating dtype.
        label: (target of the same shape, mask (B, 1, F, H, W), (B, 1, H, W) or, packed, of the shape of output; or no elements).

    Raises:
        ValueError: for packed tokens whose mask is not packed the same way, or with a blur.
    """

    def loss_fn(output: torch.Tensor, label: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        target, weights = label
        mask = weights if weights.numel() else None
        if output.dim() == 3:
            if config.blur_kernel_size > 1:
                raise ValueError(
                    "blur_kernel_size cannot be used with packed tokens, whose neighbours are no neighbours: set it to 0"
                )
            # Packed 2 x 2 patches: each of the 4 C features has its own position, so a token's features are positions here.
            if mask is not None and mask.shape != output.shape:
                raise ValueError(
                    f"mask of packed tokens must have the shape of the output, {tuple(output.shape)}, got {tuple(mask.shape)}"
                )
            output, target = output.unsqueeze(1), target.unsqueeze(1)
            mask = None if mask is None else mask.unsqueeze(1)
        return masked_loss(output, target, mask, config)

    return loss_fn


def get_loss_fn(config: MaskedLossConfig) -> Callable[[Any], Callable[..., torch.Tensor]]:
    """A `get_loss_fn` to assign to the trainer's pipeline class."""
    return lambda pipeline: loss_function(config)
