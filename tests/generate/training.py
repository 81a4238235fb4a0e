"""What the trainings of the tiny models have in common."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch


def fit(
    model: torch.nn.Module,
    learning_rate: float,
    steps: int,
    lessons: Callable[[], tuple[torch.Tensor, Mapping[str, Sequence[float]]]],
    beside: Iterable[torch.nn.Parameter] = (),
) -> None:
    """Trains by AdamW in one cycle, and prints thirty times how far it is.

    Args:
        lessons: the loss of a new batch, and by name the numbers whose means are printed.
        beside: what is trained with the model and thrown away.
    """
    optimizer = torch.optim.AdamW([*model.parameters(), *beside], lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    recent, started = collections.defaultdict(list), time.process_time()
    for step in range(1, steps + 1):
        loss, numbers = lessons()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, values in numbers.items():
            recent[name] += values
        if step % max(1, steps // 30) == 0:
            means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in recent.items())
            print(f"{step}: {means}, {time.process_time() - started:.0f} CPU s", flush=True)
            recent.clear()
