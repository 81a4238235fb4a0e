"""Labels of masks: what a part of a picture is called (face, body, logo), and its share of each latent cell in a cache.

Masks of labels stand beside the plain mask of a picture, as NAME.LABEL.png. A pixel belongs to one label: where masks overlap, to
the first in the order of `mask_labels`; what only the plain mask covers is `UNLABELLED`. Shares are averages over pixels, so a
weighted sum of them is the average of the weighted pixels: weights may change without caching again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from masked_loss_triton.errors import UserError

UNLABELLED = "unlabelled"
LABELS_PREFIX = "mask_label_"
LABELS_METADATA = "mask_labels"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,30}")
_KEY = re.compile(LABELS_PREFIX + r"(?P<label>.+?)_\d+x\d+x\d+(_float16|_float32)?")


def parse_labels(given: object) -> tuple[str, ...]:
    """Reads a list of labels, or text with blanks or commas between them.

    Raises:
        ValueError: saying what is wrong with it.
    """
    names = given if isinstance(given, (list, tuple)) else str(given).replace(",", " ").split()
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == UNLABELLED:
            raise ValueError(f"a label is made of letters, digits, - and _, and is not {UNLABELLED!r}; got {name!r}")
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"a label stands twice in {' '.join(names)}")
    return tuple(names)


def label_of(key: str) -> str | None:
    """The label of a tensor in a cache or in the trainer's batch, or None where it is something else."""
    match = _KEY.fullmatch(key)
    return match["label"] if match else None


def labels_key(label: str, weights_key: str) -> str:
    """The name of a label's shares in a cache whose weights are under `weights_key`."""
    return LABELS_PREFIX + label + "_" + weights_key.split("_", 2)[2]


def labels_in(metadata: dict[str, str]) -> tuple[str, ...]:
    """The labels that a cache says it holds, `UNLABELLED` among them; none where it has a plain mask alone."""
    try:
        found = json.loads(metadata.get(LABELS_METADATA, "[]"))
    except ValueError:
        return ()
    return tuple(found) if isinstance(found, list) and all(isinstance(name, str) for name in found) else ()


def split(masks: Sequence[np.ndarray], plain: bool = False) -> list[np.ndarray]:
    """Gives each pixel to one mask: what the earlier ones leave of it.

    Args:
        masks: (H, W) uint8 each, of one size, the first in the order first; grey edges are shares of a pixel.
        plain: the last one is that of the whole, which the others are parts of: it has what it covers more than they do, so that
            edges that it shares with a part stay as they are.

    Returns:
        Masks of the same shapes whose sum is nowhere above 255.
    """
    left = np.full(masks[0].shape, 255, np.uint8)
    parts = []
    for number, mask in enumerate(masks):
        if plain and number == len(masks) - 1:
            covered = 255 - left
            parts.append(np.where(mask > covered, mask - covered, 0).astype(np.uint8))
        else:
            parts.append(np.minimum(mask, left))
        left = left - parts[-1]
    return parts


def within_one(shares: np.ndarray) -> np.ndarray:
    """(labels, ...) float32 with sums of at most 1: the rounding of resized edges may have passed it."""
    return shares / np.maximum(shares.sum(axis=0, keepdims=True), np.float32(1))


def parse_weights(text: str) -> dict[str, float]:
    """Reads LABEL=WEIGHT or LABEL:WEIGHT, several with blanks or commas between them.

    Raises:
        ValueError: saying what is wrong with it.
    """
    weights: dict[str, float] = {}
    for one in text.replace(",", " ").split():
        label, equals, number = one.partition("=" if "=" in one else ":")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not label or not equals or not 0 <= weight < float("inf"):
            raise ValueError(f"must be LABEL=WEIGHT with weights >= 0, as face=1.5 body=0.7, got {one!r}")
        if label in weights:
            raise ValueError(f"has {label} twice")
        weights[label] = weight
    return weights


def complete_weights(given: dict[str, float], known: Iterable[str], absent: Collection[str] = ()) -> dict[str, float]:
    """A factor for each label that there is, the largest 1; a label without a weight weighs as much as the weight 1.

    Labels that are `absent`, known but nowhere covering anything, are no measure of the others.

    Raises:
        UserError: for a label that there is not, and where everything weighs 0.
    """
    known = list(known)
    for label in given:
        if label not in known:
            there = (
                f"there are {', '.join(known)}"
                if known
                else "the caches have no labels: run masked-loss cache --mask_labels"
            )
            raise UserError(f"--mask_weights: no label {label!r}; {there}", 2)
    weights = {label: given.get(label, 1.0) for label in known}
    largest = max((weight for label, weight in weights.items() if label not in absent), default=1.0)
    if not largest:
        raise UserError("--mask_weights gives every label the weight 0: nothing would be learned", 2)
    return {label: weight / largest for label, weight in weights.items()}
