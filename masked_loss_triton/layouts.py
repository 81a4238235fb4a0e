"""How a prediction comes: its axes as given, and the one form (B, C, F, H, W) that all backends take, a view of it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

Layout = Literal["channels_first", "layered", "packed"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
PRED_SHAPES = {
    "channels_first": "(B, C, F, H, W) or (B, C, H, W)",
    "layered": "(B, L, C, H, W)",
    "packed": "(B, T, 4 C)",
}


def canonical(value: torch.Tensor, layout: str) -> torch.Tensor:
    """The view (B, C, F, H, W); of packed tokens (B, C, 1, T, 4)."""
    if layout == "layered":
        return value.transpose(1, 2)
    if layout == "packed":  # a token holds the four values of a patch for channel 0, then for channel 1, ...
        return value.unflatten(2, (-1, 4)).transpose(1, 2).unsqueeze(2)
    return value.unsqueeze(2) if value.dim() == 4 else value


def checked_patches(patches: Any, pred: torch.Tensor, layout: str) -> tuple[int, int] | None:
    """(rows, columns) of the patches, None where pred is not packed; raises ValueError where they do not fit."""
    if layout != "packed":
        if patches is not None:
            raise ValueError(f'patches goes with layout="packed", got it with layout={layout!r}: drop it')
        return None
    if not isinstance(patches, (tuple, list)) or len(patches) != 2 or not all(type(n) is int for n in patches):
        raise ValueError(f'layout="packed" needs patches=(rows, columns) of the 2x2 patches, got {patches!r}')
    rows, columns = patches
    if rows < 1 or rows * columns != pred.shape[1] or pred.shape[2] % 4:
        raise ValueError(
            f"pred must be (B, rows * columns, 4 C) with layout='packed', got {tuple(pred.shape)} and patches={rows, columns}"
        )
    return rows, columns
