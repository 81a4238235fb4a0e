"""diffusion-pipe: the fused masked loss in place of a pipeline's own. In a script beside train.py, for instance train_masked.py:

    from masked_loss_triton import MaskedLossConfig
    from masked_loss_triton.integration import diffusion_pipe
    diffusion_pipe.install(MaskedLossConfig(min_weight=0.05))

    import runpy
    runpy.run_path("train.py", run_name="__main__")

and `deepspeed train_masked.py --deepspeed --config ...`. In the trainer, `get_loss_fn(self)` returns `loss_fn(output, label)` with
label = (target, mask); the mask has the size of the latents already, or no elements where a batch has none (models/base.py). Its
`huber_delta` and `smooth_l1_beta` stay. Models with a loss of their own (sdxl, ltx_video, ltx2, cosmos, minimax_h3) keep it. There
is no prior: pipeline parallel training runs the network once per step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.replace import replace

TESTED = "diffusion-pipe of 2026-08 (8f83dbf)"
LossFunction = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]


def install(config: MaskedLossConfig) -> None:
    """Puts the masked loss in place of the default one of the trainer's pipelines.

    Raises:
        UserError: for a version whose functions are others.
    """
    module = importlib.import_module("models.base")
    for owner in (module.BasePipeline, module.ComfyPipeline):
        replace(owner, "get_loss_fn", ("self",), TESTED, lambda _: get_loss_fn(config))


def get_loss_fn(config: MaskedLossConfig) -> Callable[[Any], LossFunction]:
    """A `get_loss_fn` for the trainer's pipeline class; the loss type is that of the trainer's config where it has one."""

    def of(self: Any) -> LossFunction:
        for key, loss_type in (("huber_delta", "huber"), ("smooth_l1_beta", "smooth_l1")):
            if key in self.config:
                return loss_function(config.replace(loss_type=loss_type, loss_delta=self.config[key]))
        return loss_function(config)

    return of


def loss_function(config: MaskedLossConfig) -> LossFunction:
    """`loss_fn(output, label)` as the trainer calls it.

    Args of the returned function:
        output: (B, C, F, H, W) or (B, C, H, W), or packed tokens (B, S, D), any floating dtype.
        label: (target of the same shape, mask (B, 1, F, H, W), (B, 1, H, W) or, packed, of the shape of output; or no elements).

    Raises:
        UserError: for packed tokens whose mask is not packed the same way, or with a blur.
    """

    def loss_fn(output: torch.Tensor, label: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        target, weights = (value.to(output.device) for value in label)
        mask = weights if weights.numel() else None
        if output.dim() == 3:
            if config.blur_kernel_size > 1:
                raise UserError(
                    "blur_kernel_size cannot be used with packed tokens, whose neighbours are none: set it to 0"
                )
            # Packed 2 x 2 patches: each of the 4 C features has its own position, so a token's features are positions here.
            if mask is not None and mask.shape != output.shape:
                raise UserError(
                    f"mask of packed tokens must have the shape of the output, {tuple(output.shape)}, got {tuple(mask.shape)}"
                )
            output, target = output.unsqueeze(1), target.unsqueeze(1)
            mask = None if mask is None else mask.unsqueeze(1)
        return masked_loss(output, target, mask, config)

    return loss_fn
