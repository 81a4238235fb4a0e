"""The masks of a clip's frames, as the trainer keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.items import CacheItem, LatentShape
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import (
    MASK_EXTENSIONS,
    clip_frame_count,
    clip_size,
    kept_frames,
    mask_frame_count,
    read_frames,
    refuse_animation,
)
from masked_loss_triton.masks.geometry import group_frames
from masked_loss_triton.masks.sources import Candidate, align_to_picture, read_still

FRAMES_PER_LATENT = 4  # of the models that cut clips into sections


def length_differs(mask: Path, clip: Path | None) -> str:
    """Returns what to tell of a mask and a clip of different numbers of frames; nothing where they are equal or a video is
    damaged."""
    if clip is None or not clip.exists():
        return ""
    frames, wanted = mask_frame_count(mask), clip_frame_count(clip)
    if not frames or not wanted or frames == wanted:
        return ""
    return f"{mask} has {frames} frames, but {clip} has {wanted}: frame 0 of one is taken for frame 0 of the other"


def is_still(chosen: Candidate) -> bool:
    """Whether the mask of a clip is one picture for all its frames."""
    return chosen.kind != "alpha" and chosen.path.suffix.lower() in MASK_EXTENSIONS and not chosen.path.is_dir()


def kept_masks(chosen: Candidate, clip: Path | None, dataset: Dataset, family: Family) -> Iterator[np.ndarray]:
    """Yields the mask of each frame of a clip that the trainer keeps, (H, W) uint8 in the pixels of the clip; of a still, one.

    Raises:
        UserError: naming the mask that cannot be read, does not fit, or has no frames.
    """
    size = clip_size(clip) if clip is not None and clip.exists() else None

    def fit(mask: np.ndarray) -> np.ndarray:
        own = (mask.shape[1], mask.shape[0])
        return align_to_picture(mask, size or own, chosen.path, clip, shared=chosen.kind == "default")

    if is_still(chosen):
        refuse_animation(chosen.path)
        mask, _ = read_still([chosen])
        assert mask is not None
        yield fit(mask)
        return
    fps = family.fps if dataset.source_fps is not None else None
    keep = iter(kept_frames(None, dataset.source_fps, fps))
    wanted, empty = next(keep), True
    for index, mask in enumerate(read_frames(chosen.path, chosen.kind == "alpha", clip)):
        if index == wanted:
            wanted, empty = next(keep), False
            yield fit(mask)
    if empty and chosen.kind != "alpha":
        raise UserError(f"{chosen.path} has no frames in it: add them, or remove it")


def grouped(planes: np.ndarray, item: CacheItem, shape: LatentShape, dataset: Dataset) -> np.ndarray:
    """Brings the frames of a clip, (T, ...) or one still, to the F latent frames of one of its windows.

    Raises:
        UserError: naming the cache, when they cannot be.
    """
    assert item.window is not None
    start, count, first = *item.window, 0
    if item.section is not None:
        first, count = section_span(item, shape)
    frames = planes if len(planes) == 1 else planes[start : start + count]
    try:
        return group_frames(frames, first + shape.frames, dataset.operations.mask_time)[first:]
    except ValueError as error:
        raise UserError(f"{item.path}: {error}; run the caching script again") from error


def section_span(item: CacheItem, shape: LatentShape) -> tuple[int, int]:
    """Returns the first latent frame of a section within its window, and how many frames of the window reach to its end.

    Latent frame 0 is the start that every section is given; section s has the latent frames 1 + sF to (s + 1)F, of 4 frames each.
    Source: musubi-tuner 0.3.4, fpack_cache_latents.py.

    Raises:
        UserError: naming the cache, when its window is too short for it.
    """
    assert item.window is not None
    assert item.section is not None
    count = 1 + FRAMES_PER_LATENT * shape.frames * (item.section + 1)
    if count > item.window[1]:
        raise UserError(
            f"{item.path}: section {item.section} of {shape.frames} latent frames ends at frame {count}, and its window has "
            f"{item.window[1]}; run the caching script again"
        )
    return 1 + shape.frames * item.section, count
