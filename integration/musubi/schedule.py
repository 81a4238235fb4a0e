"""When masks and the prior apply, and how strongly."""

from __future__ import annotations

import math
import random

import torch


def this_time(what: str, probability: float, seed: int, step: int) -> bool:
    """Whether something applies to the batch of this step: the same on every process, and no other random number is touched.

    Args:
        what: "masked_loss" or "prior"; each is drawn apart.
        probability: in [0, 1].
        seed, step: of the run.
    """
    if probability in (0.0, 1.0):
        return probability == 1.0
    return random.Random(f"{what} {seed} {step}").random() < probability


def warmup(step: int, max_steps: int, ratio: float) -> float:
    """0 at the first optimizer step, rising in a line to 1 after `ratio * max_steps`."""
    steps = ratio * max_steps
    return min(1.0, step / steps) if steps > 0 else 1.0


def decay(timesteps: torch.Tensor, schedule: str, start: float) -> torch.Tensor | None:
    """(B,) float32 in [0, 1]: 1 at and above `start`, falling to 0 at timestep 0; None for "constant".

    "linear" is t / start; "cosine" is half a cosine wave, flat at both ends.
    """
    if schedule == "constant":
        return None
    share = (timesteps.float() / start).clamp(0, 1)
    return share if schedule == "linear" else 0.5 - 0.5 * torch.cos(math.pi * share)
