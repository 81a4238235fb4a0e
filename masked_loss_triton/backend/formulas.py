"""The error of one element and its slope, for each kind of loss: stage 8 of docs/formula.md as a table.

The reference and the torch backend compute with it, the kernel has a branch for each name, and tests compare the two. In the
reference autograd differentiates the error: both sides of a `torch.where` in it must be finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
Delta = torch.Tensor | float  # of all elements, or broadcastable
Out = torch.Tensor | None  # where the slope may go: the difference itself, once the error is known


def _mse(d: torch.Tensor, delta: Delta, out: Out) -> Pair:
    return d * d, torch.add(d, d, out=out)


def _l1(d: torch.Tensor, delta: Delta, out: Out) -> Pair:
    return d.abs(), torch.sign(d, out=out)


def _huber(d: torch.Tensor, delta: Delta, out: Out) -> Pair:
    slope = d.clamp(-delta, delta)  # type: ignore[arg-type]
    return slope * (d - 0.5 * slope), slope


def _smooth_l1(d: torch.Tensor, delta: Delta, out: Out) -> Pair:
    slope = (d / delta).clamp(-1, 1)
    return slope * (d - (0.5 * delta) * slope), slope


def _pseudo_huber(d: torch.Tensor, delta: Delta, out: Out) -> Pair:
    root = ((d / delta) ** 2 + 1).sqrt()
    return d * d / (root + 1), d / root  # delta^2 (root - 1), without the cancellation for small d


ERROR_AND_SLOPE: dict[str, Callable[[torch.Tensor, Delta, Out], Pair]] = {
    "mse": _mse,
    "l1": _l1,
    "huber": _huber,
    "smooth_l1": _smooth_l1,
    "pseudo_huber": _pseudo_huber,
}


def error_and_slope(difference: torch.Tensor, kind: str, delta: Delta, *, overwrite: bool = False) -> Pair:
    """(rho(d), rho'(d)), each of the shape and dtype of the difference.

    Args:
        overwrite: the slope may be written over the difference, where the formula needs it no more: a buffer less to fetch.

    Raises:
        ValueError: for a kind that is not in the table.
    """
    if kind not in ERROR_AND_SLOPE:
        raise unknown("loss_type", kind)
    return ERROR_AND_SLOPE[kind](difference, delta, difference if overwrite else None)


def unknown(field: str, word: str) -> ValueError:
    """The error for a word that a config accepts and a backend has no formula for."""
    return ValueError(f"{field}={word!r} has no formula in this backend: add it beside docs/formula.md")
