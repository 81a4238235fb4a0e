"""How a model family's latents, and what its loss compares, lie in the trainer's batches."""

from __future__ import annotations

import torch


def grid_of(latents: torch.Tensor, axes: str) -> tuple[int, int, int]:
    """(F, H, W): time steps or layers, and cells, of a batch of latents.

    Args:
        latents: (B, ...), its axes after the batch in the order of `axes`.
        axes: of C, F, H and W; without F there is one time step.
    """
    sizes = dict(zip(axes, latents.shape[1:], strict=True))
    return sizes.get("F", 1), sizes["H"], sizes["W"]


def masked_loss_layout(axes: str) -> str:
    """The layout of `masked_loss` for tensors whose axes after the batch are these; those of tokens are first brought `on_grid`."""
    return "layered" if axes == "FCHW" else "channels_first"


def on_grid(tensor: torch.Tensor, axes: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """A view of tokens (B, N, C), N = F H W row by row, as (B, C, F, H, W); of anything else the tensor itself."""
    return tensor.transpose(1, 2).unflatten(2, grid) if axes == "NC" else tensor
