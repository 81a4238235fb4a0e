"""The pictures that latent caches were made from, for whoever shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from masked_loss_triton.cache.clip_masks import FRAMES_PER_LATENT, section_span
from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.inject import Prepared
from masked_loss_triton.cache.items import CacheItem, LatentShape, find_sources, latent_shape, parse_cache
from masked_loss_triton.cache.safetensors_file import read_header
from masked_loss_triton.masks.frames import kept_frames, read_clip
from masked_loss_triton.masks.geometry import resize_to_bucket
from masked_loss_triton.masks.reading import read_picture

SIDE = 448  # longest side of what is kept of a picture, pixels: twice a panel


def pictures_of(prepared: Prepared, item: CacheItem, shape: LatentShape) -> list[np.ndarray]:
    """The pixels of a cache's picture or clip, one (H, W, 3) uint8 for each time step; none where it is gone."""
    if item.source is None or not item.source.targets[0].exists():
        return []
    if item.window is None:
        targets = item.source.targets
        return [resize_to_bucket(read_picture(target, exif=False).rgb, shape.bucket) for target in targets]
    dataset = prepared.dataset
    fps = prepared.family.fps if dataset.source_fps is not None else None
    start, count = item.window
    stride = (count - 1) // (shape.frames - 1) if shape.frames > 1 else 1
    if item.section is not None:
        stride = FRAMES_PER_LATENT
        start += stride * section_span(item, shape)[0]
    kept = kept_frames(None, dataset.source_fps, fps)
    pictures: list[np.ndarray] = []
    wanted, position = next(kept), 0
    for index, frame in enumerate(read_clip(item.source.targets[0])):
        if index < wanted:
            continue
        if position >= start and (position - start) % stride == 0:
            pictures.append(resize_to_bucket(frame, shape.bucket))
        if len(pictures) == shape.frames:
            break
        wanted, position = next(kept), position + 1
    return pictures


def pictures_of_cache(path: Path, dataset: Dataset, family: Family) -> tuple[str, list[np.ndarray]]:
    """Returns the name of a cache's picture or clip, and its pixels, one (H, W, 3) uint8 for each time step; none where it is gone.

    Raises:
        UserError: naming the file that cannot be read.
    """
    sources = find_sources(dataset)
    item = parse_cache(path, dataset, family, sources)
    assert item is not None
    shape = latent_shape(read_header(path), item, dataset, family)
    pictures = pictures_of(Prepared(dataset, family, None, sources, [item]), item, shape)
    return drawable(name_of(item)), [shrink(picture) for picture in pictures]


def name_of(item: CacheItem) -> str:
    if item.window is None:
        return item.stem
    section = f", section {item.section}" if item.section is not None else ""
    return f"{item.stem}  frames {item.window[0]} to {sum(item.window) - 1}{section}"


def shrink(pixels: np.ndarray) -> np.ndarray:
    """A picture or mask with sides of at most `SIDE` pixels."""
    import cv2

    scale = SIDE / max(pixels.shape[:2])
    return pixels if scale >= 1 else cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def drawable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
