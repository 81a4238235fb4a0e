"""What the loss sees of a mask that is being drawn: the numbers that `cache` would write, and the weights made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from masked_loss_triton.cache.align import to_cells
from masked_loss_triton.cache.cards import PREVIEW_STRIDE, preview_item
from masked_loss_triton.cache.items import CacheItem, LatentShape, Source, latent_shape
from masked_loss_triton.cache.safetensors_file import read_header
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.edit.entries import Entry
from masked_loss_triton.edit.library import Library
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.crops import cut_share, kept_box
from masked_loss_triton.masks.frames import kept_frames
from masked_loss_triton.masks.geometry import group_frames

BINS = 32  # of the histogram
# The trainer's flag of each field of the config that the page shows.
FLAGS = {
    "invert": "--invert_mask",
    "blur_kernel_size": "--mask_blur_kernel_size",
    "gamma": "--mask_gamma",
    "min_weight": "--mask_min_weight",
    "prior_threshold": "--prior_mask_threshold",
}


@dataclasses.dataclass(frozen=True)
class Preview:
    """The weights of a picture, or of the latent frame that a clip's frame is part of.

    Attributes:
        cells: (h, w) float16, what `cache` writes.
        weights: (h, w) float32, what the loss multiplies the error with.
        prior: (h, w) float32, where the prior counts; zeros without one.
        bucket: (width, height) of the picture as it is trained on, pixels.
        crop: left, top, right, bottom of the part of the picture that the trainer keeps, its pixels.
        cut: share of the mask that the trainer's crop cuts away, 0 to 1.
    """

    cells: np.ndarray
    weights: np.ndarray
    prior: np.ndarray
    bucket: tuple[int, int]
    crop: tuple[float, float, float, float]
    cut: float

    def histogram(self) -> list[int]:
        """Counts the weights in `BINS` equal parts of 0 to 1."""
        return np.histogram(self.weights, BINS, (0, 1))[0].tolist()


def read_config(values: dict[str, Any]) -> MaskedLossConfig:
    """Returns the config of settings that the page sent.

    Raises:
        UserError: naming the setting that is out of its range or unknown.
    """
    known = {*FLAGS, "binarize", "floor"}
    if unknown := sorted(set(values) - known):
        raise UserError(f"unknown setting {unknown[0]!r}")
    try:
        return MaskedLossConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def flags_of(config: MaskedLossConfig, prior: bool) -> str:
    """The trainer's flags that give this config, to be copied."""
    default, words = MaskedLossConfig(), ["--use_mask_loss"]
    for field, flag in FLAGS.items():
        value = getattr(config, field)
        if field == "prior_threshold" and not prior:
            continue
        if value != getattr(default, field):
            words += [flag] if value is True else [flag, f"{value:g}"]
    return " ".join([*words, "--inverted_mask_prior"] if prior else words)


def preview(
    library: Library, entry: Entry, pixels: np.ndarray, config: MaskedLossConfig, prior: bool, frame: int = 0
) -> Preview:
    """Computes the weights of a mask that is not saved yet.

    Args:
        library: for the other frames of a clip.
        entry: the picture or clip.
        pixels: (H, W) uint8, the mask of the picture or of one frame.
        config: the options of the loss.
        prior: whether there is a prior.
        frame: of the clip.

    Raises:
        UserError: for a picture that the dataset file does not fit any more.
    """
    import torch

    from masked_loss_triton.loss import mask_weights

    item, shape = latents_of(entry)
    planes = [to_cells(mask, item, shape, entry.dataset) for mask in _masks_of_step(library, entry, pixels, frame)]
    grouped = group_frames(np.stack(planes), 2 if len(planes) > 1 else 1, entry.dataset.operations.mask_time)[-1]
    cells = entry.dataset.operations.bake(grouped).astype(np.float16)
    given = torch.from_numpy(cells.astype(np.float32))[None, None, None]
    w, v = mask_weights(given, config, shape=(1, 1, *cells.shape), has_prior=prior)
    crop = kept_box(pixels.shape[::-1], shape.bucket)
    return Preview(cells, w[0, 0].numpy(), v[0, 0].numpy(), shape.bucket, crop, cut_share(pixels, shape.bucket))


def _masks_of_step(library: Library, entry: Entry, pixels: np.ndarray, frame: int) -> list[np.ndarray]:
    """The masks of the frames that become one latent frame, with one more in front where it is not the first: that of the
    first latent, which `group_frames` keeps apart."""
    if not entry.is_clip:
        return [pixels]
    rate = entry.family.fps if entry.dataset.source_fps is not None else None
    kept = list(kept_frames(library.frame_count(entry), entry.dataset.source_fps, rate))
    position = max(index for index, number in enumerate(kept) if number <= frame)
    if position == 0:
        return [pixels]
    first = (position - 1) // PREVIEW_STRIDE * PREVIEW_STRIDE + 1
    group = kept[first : first + PREVIEW_STRIDE]
    group += [group[-1]] * (PREVIEW_STRIDE - len(group))  # at the end of a clip, which the trainer leaves out
    masks = [pixels if number == kept[position] else library.mask(entry, number).pixels for number in group]
    return [masks[0], *masks]


def latents_of(entry: Entry) -> tuple[CacheItem, LatentShape]:
    """The cache of a picture or clip and the shape of its latents; without a cache those it would have.

    Raises:
        UserError: naming the cache that does not fit the dataset file.
    """
    items = entry.prepared.items_of(entry.stem) if entry.prepared is not None else []
    if items:
        return items[0], latent_shape(read_header(items[0].path), items[0], entry.dataset, entry.family)
    return preview_item(entry.dataset, entry.family, Source(entry.stem, (entry.source,)))
