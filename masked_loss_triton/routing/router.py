"""Which tokens go through the routed blocks: those that the loss weights, then their neighbours, then a random part of the rest.

Plain torch; knows no model.
"""

from __future__ import annotations

import dataclasses
import math
import random

import torch
import torch.nn.functional as F

SUBJECT, NEAR, BACKGROUND = 0, 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that one step keeps.

    Attributes:
        index: (B, K) int64 in ascending order, or (1, K) where the samples of a batch share them.
        positions: (B, F, H, W) bool, True where a position of the loss belongs to a kept token.
        tokens: how many there are in all.
        weighted: share of them that the loss weights above its floor, 0-d float32.
    """

    index: torch.Tensor
    positions: torch.Tensor
    tokens: int
    weighted: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """Chooses the tokens that are computed.

    Args:
        keep: share of the tokens that go through the routed blocks, in (0, 1]. Their number is fixed by it, whatever the mask.
        background: share of the kept tokens that is drawn from the background even where the mask could fill them all, in [0, 1).
        grow: by how many patches, over height and width, the mask is widened before the background begins; >= 0.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """

    keep: float = 0.5
    background: float = 0.25
    grow: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep!r}")
        if not 0 <= self.background < 1:
            raise ValueError(f"background must be in [0, 1), got {self.background!r}")
        if not isinstance(self.grow, int) or self.grow < 0:
            raise ValueError(f"grow must be a whole number >= 0, got {self.grow!r}")

    def count(self, tokens: int) -> int:
        """How many of so many tokens are kept."""
        return min(tokens, max(1, math.ceil(self.keep * tokens - 1e-6)))

    def choose(
        self,
        weights: torch.Tensor,
        patch: tuple[int, int, int],
        draw: random.Random,
        *,
        floor: float = 0.0,
        shared: bool = False,
    ) -> Kept:
        """The kept tokens of a batch.

        First the tokens with a position whose weight is above the floor, then those around them, then the others, in random order
        within each kind; the last `background` of the places goes to the background first. Does not wait for the device.

        Args:
            weights: (B, F, H, W), what the target term of the loss is weighted with.
            patch: positions of one token, (frames, height, width).
            draw: where the random order comes from; torch's own generators are left alone.
            floor: the weight that every position has, whatever its mask.
            shared: choose one set for the whole batch, by the union of its masks.

        Raises:
            ValueError: where the positions are no whole number of patches.
        """
        grid = weights.shape[1:]
        if any(size % step for size, step in zip(grid, patch, strict=True)):
            raise ValueError(f"weights of {tuple(grid)} positions cannot be cut into tokens of {patch}")
        subject = F.max_pool3d((weights > floor).float().unsqueeze(1), patch)
        near = F.max_pool3d(subject, (1, 2 * self.grow + 1, 2 * self.grow + 1), 1, (0, self.grow, self.grow))
        kind = BACKGROUND - near - subject
        weighted, shape = subject.mean(), subject.shape[2:]
        kind = kind.flatten(1).amin(0, keepdim=True) if shared else kind.flatten(1)
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        order = torch.rand(kind.shape, generator=generator).to(kind.device)
        tokens, kept = kind.shape[1], self.count(kind.shape[1])
        taken = torch.zeros_like(kind, dtype=torch.bool)
        first = (kind + order).argsort(1)[:, : kept - int(self.background * kept)]
        taken.scatter_(1, first, True)
        # Background (2 -> 0) before subject (0 -> 1) before what is near it (1 -> 2).
        again = torch.where(taken, -1.0, order + (kind + 1) % 3)
        index = again.argsort(1)[:, :kept].sort(1).values
        on = torch.zeros_like(taken).scatter_(1, index, True).view(-1, *shape)
        for axis, step in enumerate(patch, 1):
            on = on.repeat_interleave(step, axis) if step > 1 else on
        return Kept(index, on.expand(weights.shape), tokens, weighted)
