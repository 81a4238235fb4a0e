"""The weights of one latent cache whose masks have labels: the share of each label in each latent cell, and their sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.align import (
    Inputs,
    Weights,
    aligned_still,
    check_not_required,
    place,
)
from masked_loss_triton.cache.clip_masks import grouped, is_still, kept_masks
from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.items import CacheItem, LatentShape
from masked_loss_triton.cache.safetensors_file import TensorFile
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent
from masked_loss_triton.masks.labels import UNLABELLED, split, within_one
from masked_loss_triton.masks.sources import Candidate, read_still

Masks = Sequence[np.ndarray | None]  # of each label, then the plain one


def labelled_weights(
    item: CacheItem, file: TensorFile, shape: LatentShape, inputs: Inputs, dataset: Dataset
) -> Weights:
    """`compute_weights` where the dataset has labels."""
    planes, used = [], []
    for index, (candidates, labels) in enumerate(zip(inputs.candidates, inputs.labels, strict=True)):
        target = item.source.targets[index] if item.source is not None else None
        found = [read_still([one] if one is not None else []) for one in labels] + [read_still(list(candidates))]
        masks = [
            aligned_still(mask, chosen, item, index, target) if mask is not None and chosen is not None else None
            for mask, chosen in found
        ]
        used += [chosen for _, chosen in found if chosen is not None]
        if not any(mask is not None for mask in masks):
            check_not_required(item, dataset)
        planes.append(_shares(masks, item, shape, dataset))
    parts = np.stack(planes, axis=1)
    # Control frames of a one-frame cache are trained as they are without a mask, and have no label.
    values = [
        place(part, item, file, shape, dataset, control=float(number == len(parts) - 1))
        for number, part in enumerate(parts)
    ]
    return _labelled(np.stack(values), used, dataset)


def labelled_clip_weights(
    items: list[CacheItem], shapes: list[LatentShape], inputs: Inputs, dataset: Dataset, family: Family
) -> list[Weights]:
    """`compute_clip_weights` where the dataset has labels."""
    first, labels = items[0], inputs.labels[0]
    needed = max(item.window[0] + item.window[1] for item in items if item.window)
    clip = first.source.targets[0] if first.source is not None else None
    layers = [*labels, _plain(inputs, clip, dataset, family)]
    used = [one for one in layers if one is not None]
    if not used:
        check_not_required(first, dataset)
    streams = [_stream(one, clip, dataset, family) for one in layers]
    count = 1 if all(one is None or is_still(one) for one in layers) else needed
    planes = [
        _shares(masks, first, shapes[0], dataset) for masks in itertools.islice(zip(*streams, strict=False), count)
    ]
    if len(planes) < count:
        raise UserError(
            f"{', '.join(str(one.path) for one in used)}: only {len(planes)} frames of the {needed} that {clip or first.stem} "
            "needs at the trainer's frame rate: make a mask for every frame, or one still"
        )
    frames = np.stack(planes)
    windows = [grouped(frames, item, shape, dataset) for item, shape in zip(items, shapes, strict=True)]
    return [_labelled(values.swapaxes(0, 1), used, dataset) for values in windows]


def _plain(inputs: Inputs, clip: Path | None, dataset: Dataset, family: Family) -> Candidate | None:
    """The plain mask of a clip; an alpha channel that hides nothing is passed over."""
    for one in inputs.candidates[0]:
        if one.kind != "alpha" or any(mask.min() < 255 for mask in kept_masks(one, clip, dataset, family)):
            return one
    return None


def _stream(
    chosen: Candidate | None, clip: Path | None, dataset: Dataset, family: Family
) -> Iterator[np.ndarray | None]:
    """The masks of the frames of a clip; one that stands still, or is none, without end."""
    if chosen is None:
        return itertools.repeat(None)
    masks = kept_masks(chosen, clip, dataset, family)
    return itertools.repeat(next(masks)) if is_still(chosen) else masks


def _shares(masks: Masks, item: CacheItem, shape: LatentShape, dataset: Dataset) -> np.ndarray:
    """(labels and one, h, w) float32: the share of each label and of `UNLABELLED`, which has all where there is no mask."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        shares = np.zeros((len(masks), shape.height, shape.width), np.float32)
        shares[-1] = 1
        return shares
    edited = [
        np.zeros(present[0].shape, np.uint8) if mask is None else dataset.operations.apply(mask, item.stem)
        for mask in masks
    ]
    size = (shape.height, shape.width)
    cells = [to_latent(resize_to_bucket(part, shape.bucket), size) for part in split(edited, plain=True)]
    return within_one(np.stack(cells))


def _labelled(parts: np.ndarray, used: list[Candidate], dataset: Dataset) -> Weights:
    """Args: parts: (labels and one, F, h, w)."""
    parts = np.ascontiguousarray(within_one(parts)[:, None], np.float32)
    kinds = sorted({one.kind for one in used}) or ["full"]
    return Weights(
        np.minimum(parts.sum(axis=0), np.float32(1)),
        ",".join(kinds),
        ",".join(one.path.name for one in used),
        labels=dict(zip((*dataset.mask_labels, UNLABELLED), parts, strict=True)),
    )
