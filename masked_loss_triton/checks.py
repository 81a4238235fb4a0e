"""Tensors of a call, one by one: of a type, device and shape that the loss takes, and as views of one form.

Nothing here waits for a device. Errors name the argument, what it got and what it takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from masked_loss_triton.layouts import canonical

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (*FLOAT_DTYPES, torch.uint8, torch.bool)

_MASK_SHAPES = "(B, 1, Fm, Hm, Wm), (B, Fm, Hm, Wm), (B, 1, Hm, Wm) or (B, Hm, Wm), where B may be 1"


def checked_tensor(name: str, value: Any) -> torch.Tensor:
    """Returns a tensor as kernels can read it.

    Raises:
        TypeError: for what is no tensor.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    # A view of an imaginary part may say "negate me", which kernels do not read.
    return value.resolve_neg() if not torch.compiler.is_compiling() and value.is_neg() else value


def check_dtype(name: str, value: torch.Tensor, accepted: tuple[torch.dtype, ...], hint: str = "") -> None:
    """Raises a TypeError for a dtype that is not accepted; `hint` ends the message."""
    if value.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{name} must be one of {names}, got {str(value.dtype).removeprefix('torch.')}{hint}")


def check_device(name: str, value: torch.Tensor, pred: torch.Tensor) -> None:
    """Raises a ValueError for a tensor on another device than pred."""
    if value.device != pred.device:
        raise ValueError(f"{name} is on {value.device} and pred on {pred.device}: move {name} to {pred.device}")


def like_pred(name: str, value: Any, pred: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns a tensor of the shape and device of pred as a view (B, C, F, H, W).

    Raises:
        TypeError, ValueError: for another shape, dtype or device.
    """
    tensor = checked_tensor(name, value)
    if tensor.shape != pred.shape:
        raise ValueError(f"{name} must have the shape of pred, {tuple(pred.shape)}, got {tuple(tensor.shape)}")
    check_dtype(name, tensor, FLOAT_DTYPES)
    check_device(name, tensor, pred)
    return canonical(tensor, layout)


def canonical_mask(
    mask: Any, shape: tuple[int, int, int, int], *, image: bool = False, layered: bool = False
) -> torch.Tensor:
    """A mask as a view (B or 1, Fm, Hm, Wm).

    Args:
        mask: see `masked_loss`.
        shape: (B, F, H, W) of the loss.
        image: pred has no frame axis, so the mask may have only one frame.
        layered: the frame axis of the loss counts layers; a mask has one entry per layer, or one for all.

    Raises:
        TypeError, ValueError: naming the shape, dtype or values it got and those that are accepted.
    """
    mask = checked_tensor("mask", mask)
    check_dtype("mask", mask, MASK_DTYPES, hint=": use float in [0, 1], uint8 in [0, 255] or bool")
    got = tuple(mask.shape)
    if mask.dim() not in (3, 4, 5) or (mask.dim() == 5 and got[1] != 1):
        raise ValueError(f"mask must be {_MASK_SHAPES}, got {got}")
    if mask.dim() == 5:
        mask = mask.squeeze(1)
    elif mask.dim() == 3:
        mask = mask.unsqueeze(1)
    batch, frames = shape[0], shape[1]
    if 0 in got:
        raise ValueError(f"mask has no elements: its shape is {got}")
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"mask must have batch size {batch} as pred, or 1, got {mask.shape[0]} in {got}")
    if image and mask.shape[1] != 1:
        raise ValueError(
            f"mask has {mask.shape[1]} frames or channels in {got}, but pred is an image batch (B, C, H, W): "
            "give one mask per image, (B, 1, Hm, Wm) or (B, Hm, Wm)"
        )
    if layered and mask.shape[1] not in (1, frames):
        raise ValueError(
            f"mask has {mask.shape[1]} layers in {got}, pred has {frames}: give one mask per layer, or one for all"
        )
    refuse_bytes_as_floats("mask", mask)
    return mask


def refuse_bytes_as_floats(name: str, mask: torch.Tensor) -> None:
    """Raises when a floating mask holds values of 0 to 255, where they can be seen without waiting: on a CPU, not traced.

    Clamped to [0, 1] they would be a mask of ones.
    """
    if mask.device.type != "cpu" or not mask.dtype.is_floating_point or torch.compiler.is_compiling():
        return
    if type(mask) is not torch.Tensor or torch._C._are_functorch_transforms_active():
        return
    largest = mask.amax().item()
    if 1.5 < largest < math.inf:
        raise ValueError(
            f"{name} is floating with a largest value of {largest:g}, but floating masks are in [0, 1]: divide it by 255, or give "
            "the bytes as uint8"
        )


def per_sample_numbers(
    name: str, value: Any, pred: torch.Tensor, batch: int, accepted: tuple[torch.dtype, ...]
) -> torch.Tensor:
    """A view (B,) of a tensor that holds one number per sample, or one for all, on pred's device."""
    tensor = checked_tensor(name, value)
    check_dtype(name, tensor, accepted)
    check_device(name, tensor, pred)
    shape = tuple(tensor.shape)
    if tensor.numel() == 1:
        return tensor.reshape(1).expand(batch)
    if not shape or shape[0] != batch or tensor.numel() != batch:
        raise ValueError(
            f"{name} must hold one number per sample, ({batch},) or ({batch}, 1, ...), or a single number, got {shape}"
        )
    return tensor.reshape(batch)
