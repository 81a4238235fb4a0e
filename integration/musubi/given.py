"""Frames that the model is given and does not generate: image-to-video's first frame, the control frames of one-frame training."""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.cache.families import Family
from masked_loss_triton.errors import UserError


def generated_frames(batch: dict[str, Any], family: Family, image_to_video: bool) -> list[int] | None:
    """The latent frames of a batch that are generated, or None where all are, or none is. Waits for the device.

    Args:
        batch: the trainer's.
        family: says where the trainer's conditioning marks what is given.
        image_to_video: whether the trainer conditions on frames.

    Raises:
        UserError: when the items of the batch are given different frames.
    """
    if not image_to_video or (family.given_mask is None and not family.given_first):
        return None
    frames = batch["latents"].shape[2]
    given = [[frame == 0 for frame in range(frames)]]
    if family.given_mask is not None:
        marks = batch["latents_image"][:, slice(*family.given_mask)]
        given = (marks.float().amin(dim=(1, 3, 4)) >= 1).tolist()
    if any(row != given[0] for row in given):
        raise UserError("--mask_given_frames ignore: the items of a batch are given different frames; use keep", 2)
    kept = [frame for frame, there in enumerate(given[0]) if not there]
    return kept if 0 < len(kept) < frames else None


def at_frames(tensor: torch.Tensor, frames: list[int] | None, layout: str = "channels_first") -> torch.Tensor:
    """Those frames of a tensor: a view where they follow each other."""
    if frames is None:
        return tensor
    axis = 1 if layout == "layered" else 2
    if frames[-1] - frames[0] == len(frames) - 1:
        return tensor.narrow(axis, frames[0], len(frames))
    return tensor.index_select(axis, torch.tensor(frames, device=tensor.device))
