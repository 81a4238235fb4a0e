"""What a zoom of a picture shows: a label (a face), the upper half of the subject, or all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.labels import parse_labels
from masked_loss_triton.masks.listing import PLAIN

HALF, FULL, FACE = "half", "full", "face"


def parse_zooms(given: str) -> tuple[str, ...]:
    """Reads a list of zooms, with blanks or commas between them.

    Raises:
        UserError: for what can be no label, and for one that stands twice.
    """
    try:
        return parse_labels(given)
    except ValueError as error:
        raise UserError(f"--zoom: {error}", 2) from error


def check_zooms(zooms: Iterable[str], labels: Iterable[str]) -> None:
    """Raises UserError for a zoom that is neither half, full nor a label that there is."""
    labels = tuple(labels)
    for zoom in zooms:
        if zoom not in (HALF, FULL, *labels):
            there = f"the labels are {', '.join(labels)}" if labels else "there are no masks of labels, NAME.LABEL.png"
            raise UserError(f"--zoom {zoom} is neither {HALF}, {FULL} nor a label: {there}", 2)


def zoomed(zoom: str, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns what a zoom has to show, (H, W) uint8; black where the picture has nothing of it.

    Args:
        zoom: "full" is what any of the masks covers, "half" the part of that above the middle of its height, and all of the face,
            which must not be cut in a picture that ends at the chest; else a label. "" is as "full".
        masks: by label, (H, W) uint8; the plain one is `PLAIN`.
    """
    subject = np.maximum.reduce(list(masks.values()))
    if zoom in (FULL, PLAIN):
        return subject
    if zoom == HALF:
        rows = np.flatnonzero(subject.any(axis=1))
        upper = subject.copy()
        if len(rows):
            upper[(rows[0] + rows[-1] + 2) // 2 :] = 0
        return np.maximum(upper, masks[FACE]) if FACE in masks else upper
    return masks.get(zoom, np.zeros_like(subject))
