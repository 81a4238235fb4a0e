"""What a run shows of itself: numbers for the trainer's log, a picture of its first items, and lines when masks do not work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from masked_loss_triton import MaskedLossConfig, mask_weights
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.caches import CacheReport
from masked_loss_triton.integration.musubi.first_items import FirstItems
from masked_loss_triton.integration.musubi.label_masks import label_logs
from masked_loss_triton.integration.musubi.watch import NOTHING, Watch
from masked_loss_triton.stats import MaskedLossStats

if TYPE_CHECKING:
    from masked_loss_triton.integration.musubi.training import Step


class Proof:
    """The proof of one run.

    Args:
        config: of the loss.
        report: of the caches, or None where nobody looked at them: then there is no picture.
        say: prints a line.
    """

    def __init__(self, config: MaskedLossConfig, report: CacheReport | None, say: Callable[[str], None]) -> None:
        self.config, self.report, self.say = config, report, say
        self.watch: Watch | None = None
        self._first: FirstItems | None = None
        self._last: tuple[Step, MaskedLossStats] | None = None
        self._saved: dict[str, Any] | None = None
        self._coverage: dict[str, float] = {}
        self._labels: dict[str, float] = {}
        self._tracked = False

    def start(self, args: Any, accelerator: Any) -> None:
        """Before the first micro-batch."""
        self._tracked = bool(accelerator.trackers)
        self.watch = Watch(args.max_train_steps * accelerator.gradient_accumulation_steps)
        if self._saved:
            self.watch.load(self._saved)
        if self.report is not None and accelerator.is_main_process:
            self._first = FirstItems(args, accelerator, self.report)
            for one in self.report.datasets:
                self._coverage[f"mask/coverage_dataset_{one.dataset.index}"] = one.coverage

    def show(self, latents: torch.Tensor, step: Step, optimizer_step: int) -> None:
        """Draws the items of a micro-batch while they are among the first. A picture that fails stops no training."""
        if self._first is None:
            return
        shape = (len(latents), *step.positions)
        raw = torch.ones(shape, device=latents.device) if step.mask is None else step.mask.squeeze(1)
        raw = 1 - raw.float() if self.config.invert and step.mask is not None else raw
        if step.routed is not None:
            w, v = step.routed.target, step.routed.prior
        else:
            region = step.needs_teacher or step.keeps_region
            gate = step.prior_gate if region else None
            w, v = mask_weights(step.mask, self.config, shape=shape, has_prior=region, prior_gate=gate)
        labels = step.labels
        if step.frames is not None:  # the others do not count
            raw, w, v = (_spread(x, step.frames, latents.shape[2]) for x in (raw, w, v))
            labels = {
                label: _spread(x.squeeze(1), step.frames, latents.shape[2])[:, None] for label, x in labels.items()
            }
        try:
            line = self._first.add(latents, raw, w, v if step.needs_teacher else None, labels, optimizer_step)
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.say(f"the first items are not shown: {line}")
            self._first = None
            return
        if line:
            self.say(line)
        if self._first.complete:
            self._first = None

    def note(self, step: Step, stats: MaskedLossStats, pred: torch.Tensor, target: torch.Tensor) -> None:
        """Keeps the numbers of a micro-batch, and says what goes wrong."""
        self._last, self._labels = (step, stats), {}
        if self._tracked and step.labels and step.mask is not None:
            kept = step.routed.kept.positions if step.routed is not None and step.routed.kept is not None else None
            self._labels = label_logs(pred, target, step.labels, self.config, step.layout, kept)
        if step.mask is not None:
            assert self.watch is not None
            for line in self.watch.add(step.timesteps, stats):
                self.say(line)

    @property
    def last_stats(self) -> MaskedLossStats | None:
        """Of the last micro-batch."""
        return None if self._last is None else self._last[1]

    def logs(self) -> dict[str, float]:
        """The numbers of the last micro-batch; what it does not have is left out. Waits for the device once."""
        if self._last is None:
            return {}
        (step, stats), coverage = self._last, self._coverage
        self._coverage = {}
        values = stats.to_dict()
        found = {"mask/target_loss": values["target_term"], **coverage}
        if step.mask is None:
            return found
        found.update(self._labels)
        found["mask/coverage"] = mean = values["raw_mean"]
        found["mask/weight"] = values["target_weight_mean"]
        names = ("error", "drift") if step.prior is not None else ("error",)
        for name in names:
            for side, share in (("inside", mean), ("outside", 1 - mean)):
                if share > NOTHING and not math.isnan(values[f"{name}_{side}"]):
                    found[f"mask/{name}_{side}"] = values[f"{name}_{side}"]
        if step.prior is not None:
            for name, field in (("loss", "prior_term"), ("share", "prior_share"), ("region", "prior_weight_mean")):
                found[f"mask/prior_{name}"] = values[field]
        return found

    def state(self) -> dict[str, Any] | None:
        """What `load` takes."""
        return self.watch.state() if self.watch is not None else None

    def load(self, state: dict[str, Any] | None) -> None:
        """Goes on where a saved run stopped."""
        self._saved = state


def _spread(values: torch.Tensor, frames: list[int], count: int) -> torch.Tensor:
    """(B, F, H, W) at some of `count` frames, 0 at the others."""
    whole = values.new_zeros((len(values), count, *values.shape[2:]))
    whole[:, frames] = values
    return whole
