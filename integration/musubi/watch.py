"""Is the subject learned, and the rest left alone? The errors inside and outside the masks over a run, at like timesteps."""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.stats import MaskedLossStats

BINS = 10  # of the timesteps: errors differ more between timesteps than between the begin and the end of a training
WINDOWS = 10  # of a training
SMALLEST, LARGEST = 20, 500  # micro-batches of a window
RUNS_AWAY = 1.5  # times the error outside of the first window
NOTHING = 1e-6  # of a mask that is nowhere 1, or everywhere

Sums = dict[
    str, list[list[float]]
]  # "inside" and "outside": for each bin the number of batches and the sum of their errors


class Watch:
    """Compares windows of micro-batches with the first one; says once what goes wrong.

    Args:
        total: micro-batches of the whole training.
    """

    def __init__(self, total: int) -> None:
        self.size = min(LARGEST, max(SMALLEST, total // WINDOWS))
        self.windows: list[Sums] = []
        self.said: list[str] = []
        self._rows: list[torch.Tensor] = []

    def add(self, timesteps: torch.Tensor, stats: MaskedLossStats) -> list[str]:
        """Takes in one masked micro-batch and returns what there is to say. Waits for the device once for each window."""
        numbers = (
            timesteps.float().mean().to(stats.raw_mean.device),
            stats.raw_mean,
            stats.error_inside,
            stats.error_outside,
        )
        self._rows.append(torch.stack([number.float() for number in numbers]))
        if len(self._rows) < self.size:
            return []
        self.windows.append(_sums(torch.stack(self._rows).tolist()))
        self._rows.clear()
        return self._judge()

    def _judge(self) -> list[str]:
        seen = len(self.windows)
        inside, outside = (self._ratio(side) for side in ("inside", "outside"))
        found = {}
        if seen > WINDOWS // 2 and inside is not None and inside >= 1:
            found["inside"] = (
                f"the error inside the masks does not fall: it is {inside:.2f} times that of the first {self.size} batches, at "
                "like timesteps; is the learning rate too low or too high, and do the masks show the subject?"
            )
        if seen > 1 and outside is not None and outside > RUNS_AWAY and outside > (inside or 0):
            found["outside"] = (
                f"the error outside the masks runs away: it is {outside:.2f} times that of the first {self.size} batches, at like "
                "timesteps; --inverted_mask_prior or --mask_min_weight holds it"
            )
        lines = [line for side, line in found.items() if side not in self.said]
        self.said += [side for side in found if side not in self.said]
        return lines

    def _ratio(self, side: str) -> float | None:
        """The mean error of the later half of the windows to that of the first, over the timesteps that both have seen."""
        first, later = self.windows[0][side], self.windows[max(1, len(self.windows) // 2) :]
        now = before = 0.0
        for index, (count, error) in enumerate(first):
            number = sum(window[side][index][0] for window in later)
            if count and number:
                now += sum(window[side][index][1] for window in later)
                before += number * error / count
        return now / before if before else None

    def state(self) -> dict[str, Any]:
        """What `load` takes; a window that is not full is lost."""
        return {"size": self.size, "windows": self.windows, "said": self.said}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on where a saved run stopped."""
        self.size, self.windows, self.said = int(state["size"]), list(state["windows"]), list(state["said"])


def _sums(rows: list[list[float]]) -> Sums:
    sums: Sums = {side: [[0, 0.0] for _ in range(BINS)] for side in ("inside", "outside")}
    for timestep, mean, *errors in rows:
        index = min(BINS - 1, max(0, int(timestep * BINS / 1000)))
        for side, share, error in zip(sums, (mean, 1 - mean), errors, strict=True):
            if share > NOTHING and error == error:
                sums[side][index][0] += 1
                sums[side][index][1] += error
    return sums
