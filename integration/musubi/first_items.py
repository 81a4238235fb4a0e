"""One picture of the first items of a run, with the weights that reach the loss: into the log folder and to the trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.caches import CacheReport, latents_sample
from masked_loss_triton.integration.musubi.label_masks import Shares

ITEMS = 6
TAG = "mask/first_items"
GREY = np.full((64, 64, 3), 128, np.uint8)  # where an item's picture is gone


class FirstItems:
    """Gathers items until there are `ITEMS`, and draws them: after the first micro-batch, and when they are all there.

    Args:
        args: the trainer's.
        accelerator: its own, with its log folder and trackers.
        report: of the caches, to find an item's picture.
    """

    def __init__(self, args: Any, accelerator: Any, report: CacheReport) -> None:
        self.file = Path(accelerator.project_dir or args.output_dir) / f"{args.output_name}_first_items.png"
        self.accelerator, self.report = accelerator, report
        self.images: list[Any] = []
        self.began: int | None = None  # step of the optimizer; not 0 where a run was resumed

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return len(self.images) >= ITEMS

    def add(
        self,
        latents: torch.Tensor,
        raw: torch.Tensor,
        w: torch.Tensor,
        v: torch.Tensor | None,
        labels: Shares,
        step: int,
    ) -> str:
        """Draws the items of one micro-batch, and returns what there is to say.

        Args:
            latents: (B, ...), as the caches hold them.
            raw: (B, F, H, W), the mask.
            w, v: (B, F, H, W), the weights of the target and of the prior; None where no prior applies.
            labels: the share of each label.
            step: of the optimizer, counted on where a run was resumed: such a picture has a name of its own.
        """
        if self.began is None:
            self.began = step
            if step:
                self.file = self.file.with_name(f"{self.file.stem}_{step}.png")
        first = not self.images
        for index in range(min(len(latents), ITEMS - len(self.images))):
            planes = [x[index].detach().float().cpu().numpy() for x in (raw, w, v) if x is not None]
            shares = {label: share[index, 0].float().cpu().numpy() for label, share in labels.items()}
            self._draw(latents[index], shares, *planes)
        if not first and not self.complete:
            return ""
        try:
            self._save()
            self._track(step - self.began)  # the trainer's own steps begin at 0 again
        except OSError as error:
            raise UserError(f"{self.file} cannot be written ({error.strerror})") from error
        return f"the first {len(self.images)} items and the weights that reach the loss: {self.file}"

    def _draw(
        self,
        latents: torch.Tensor,
        labels: dict[str, np.ndarray],
        raw: np.ndarray,
        w: np.ndarray,
        v: np.ndarray | None = None,
    ) -> None:
        from masked_loss_triton.cache.pictures import pictures_of_cache
        from masked_loss_triton.files.contact_sheet import Card, draw

        name, where = "not found in the caches", ""
        pictures: list[np.ndarray] = []
        if (found := self.report.items.get(latents_sample(latents))) is not None:
            dataset, path = found
            where = f", {dataset.name}"
            try:
                name, pictures = pictures_of_cache(path, dataset, self.report.family)
            except UserError as error:
                name = f"{path.name}: {error}"
        mean = f"coverage {raw.mean():.1%}, mean weight {w.mean():.3f} ({w.min():.2f} to {w.max():.2f})"
        share = "" if v is None else f", mean weight of the prior {v.mean():.3f}"
        facts = [f"latents {'x'.join(map(str, raw.shape))}{where}", mean + share]
        card = Card(
            name=name,
            facts=facts,
            picture_label="picture",
            pictures=pictures or [GREY],
            mask=raw[len(raw) // 2],
            raw=raw,
            weights=w,
            region=v,
            labels=labels,
        )
        self.images.append(draw(card))

    def _save(self) -> None:
        from masked_loss_triton.files.atomic import replace_file
        from masked_loss_triton.files.contact_sheet import sheet

        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.file, lambda file: sheet(self.images).save(file, "PNG"))

    def _track(self, step: int) -> None:
        from masked_loss_triton.files.contact_sheet import sheet

        pixels = np.asarray(sheet(self.images))
        for tracker in self.accelerator.trackers:
            if (
                getattr(tracker, "name", "") == "tensorboard"
            ):  # takes a stack (N, C, H, W), the others a list of pictures
                tracker.log_images({TAG: pixels.transpose(2, 0, 1)[None]}, step=step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({TAG: [pixels]}, step=step)
