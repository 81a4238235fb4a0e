"""The denominators of the weighted mean over more than one micro-batch of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from masked_loss_triton import MaskedLossConfig, mask_weights


class Window:
    """Whose weights share a denominator: "rank", "world" or "accumulation".

    Over accumulated micro-batches the whole denominator is known only at the last one. After micro-batch k the gradients so far
    are kept at (k / n) of the window's exact mean over its first k micro-batches, n being the trainer's number of accumulation
    steps: what was there is multiplied by the ratio of the denominators before the new gradient is added. After the last one it
    is the gradient of one large batch. No batch is looked at ahead of its time, and nothing waits for the device.

    Args:
        across: one of the three.
        accelerator: the trainer's.
        config: of the loss.
        parameters: what is trained, whose accumulated gradients are rescaled.
    """

    def __init__(
        self, across: str, accelerator: Any, config: MaskedLossConfig, parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        self.across, self.accelerator, self.config, self.parameters = across, accelerator, config, parameters
        self._count = 0
        self._total: torch.Tensor | None = None

    def denominators(
        self,
        pred: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[int, int, int],
        weights: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Arguments of `masked_loss` for this micro-batch; rescales accumulated gradients as needed.

        Args:
            pred: of this micro-batch, any layout.
            mask: its mask, or None where it is not masked.
            positions: (F, H, W) of the loss, F counting layers of layered pictures.
            weights: (B, F, H, W), where they are not those of the mask.
        """
        if self.across == "world" and self.accelerator.num_processes > 1:
            return {"process_group": torch.distributed.group.WORLD}
        if self.across != "accumulation":
            return {}
        total = self._amount(pred, mask, positions, weights)
        ranks = self.accelerator.num_processes
        if ranks > 1:
            torch.distributed.all_reduce(total)
        self._count += 1
        if self._total is not None:
            total = total + self._total
            shift = (self._total + self.config.eps) / (total + self.config.eps) * (self._count / (self._count - 1))
            gradients = [value.grad for value in self.parameters if value.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, shift)
        self._total = total
        # Ranks are averaged by the trainer, micro-batches divided by their number.
        normalizer = total / (self._count * ranks)
        if self.accelerator.sync_gradients:
            self._count, self._total = 0, None
        return {"normalizer": normalizer}

    def _amount(
        self,
        pred: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[int, int, int],
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """What this micro-batch adds to the denominator: elements, samples, or weights, 0-d float32."""
        batch = pred.shape[0]
        if self.config.per_sample:
            return torch.full((), float(batch), device=pred.device)
        if mask is None or self.config.normalization == "mean":
            return torch.full((), float(pred.numel()), device=pred.device)
        if weights is None:
            weights, _ = mask_weights(mask, self.config, shape=(batch, *positions), has_prior=False)
        return weights.sum() * (pred.numel() // (batch * positions[0] * positions[1] * positions[2]))
