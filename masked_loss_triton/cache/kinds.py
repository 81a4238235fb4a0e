"""The kinds of problems that masks and latent caches can have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from masked_loss_triton.cache.inject import Prepared

KINDS = {
    "unreadable": "a picture, clip or mask that cannot be decoded",
    "unread": "a picture or video in a format that is not read: it is not trained on, or its picture has no mask",
    "missing": "no mask: full weight",
    "empty": "a mask without any weight: nothing is learned",
    "full": "a mask that covers everything: it changes nothing",
    "size": "mask and picture differ in size: the mask is resized",
    "cut": "the trainer's crop cuts off more than a twentieth of the mask",
    "aspect": "mask and picture differ in shape by more than 1%: the cache command refuses it",
    "frames": "mask and clip differ in their number of frames",
    "order": "frames of a clip that the trainer reads in another order than that of their numbers",
    "rotated": "the picture has an EXIF rotation, which the trainer ignores",
    "unused": "a mask that belongs to no picture",
    "ambiguous": "two mask files for one picture: only the first is used",
    "uncached": "a picture or clip without latent cache",
    "cache": "a latent cache that is damaged or of another resolution",
    "damaged": "a latent cache whose tensors are not those that were masked",
    "orphan": "a latent cache whose picture is not in the dataset, but which the trainer will train on",
    "unmasked": "a latent cache without mask weights",
    "outdated": "the mask changed after the cache was masked",
    "options": "a latent cache that was masked with other options",
    "mixed": "only some caches have weights: the trainer would spread one item's mask over its whole batch",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of the report: what kind, which file, and what about it."""

    kind: str
    file: str
    message: str
    dataset: int


def problem(prepared: Prepared, kind: str, file: Path, message: str) -> Problem:
    """Makes the line of a file; the file's name at the beginning of the message is left out."""
    text = message.removeprefix(f"{file} ").removeprefix(f"{file}: ")
    return Problem(kind, str(file), text, prepared.dataset.index)
