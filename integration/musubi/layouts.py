"""How a model family's latents, and what its loss compares, lie in the trainer's batches."""

from __future__ import annotations

from typing import Any

import torch


def grid_of(latents: torch.Tensor, axes: str) -> tuple[int, int, int]:
    """(F, H, W): time steps or layers, and cells, of a batch of latents.

    Args:
        latents: (B, ...), its axes after the batch in the order of `axes`.
        axes: of C, F, H and W; without F there is one time step.
    """
    sizes = dict(zip(axes, latents.shape[1:], strict=True))
    return sizes.get("F", 1), sizes["H"], sizes["W"]


def times_watermark(
    mask: torch.Tensor | None, batch: dict[str, Any], grid: tuple[int, int, int], invert: bool
) -> torch.Tensor | None:
    """The mask with what the trainer itself leaves out of the loss, `watermark_mask` of its batches, multiplied in.

    Args:
        mask: (B, 1, F, H, W), or None where this batch is not masked.
        batch: the trainer's; its `watermark_mask`, where there is one, is (B, h, w) in [0, 1], 0 on the watermark.
        grid: (F, H, W).
        invert: the loss inverts the mask; the watermark stays out nevertheless.

    Source: musubi-tuner, pull request 1062, which averages it over the cells of the loss.
    """
    watermark = batch.get("watermark_mask")
    if watermark is None:
        return mask
    frames, height, width = grid
    cells = torch.nn.functional.interpolate(watermark[:, None].float(), size=(height, width), mode="area")
    clean = cells[:, :, None].expand(-1, -1, frames, -1, -1)
    if mask is None:
        return 1 - clean if invert else clean
    return 1 - (1 - mask) * clean if invert else mask * clean


def masked_loss_layout(axes: str) -> str:
    """The layout of `masked_loss` for tensors whose axes after the batch are these; those of tokens are first brought `on_grid`."""
    return "layered" if axes == "FCHW" else "channels_first"


def on_grid(tensor: torch.Tensor, axes: str, grid: tuple[int, int, int]) -> torch.Tensor:
    """A view of tokens (B, N, C), N = F H W row by row, as (B, C, F, H, W); of anything else the tensor itself."""
    return tensor.transpose(1, 2).unflatten(2, grid) if axes == "NC" else tensor
