"""Everything that is wrong with the masks of a dataset, found without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.align import find_inputs
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX, Prepared, verify_tensors
from masked_loss_triton.cache.items import CacheItem, Source, latent_shape
from masked_loss_triton.cache.safetensors_file import read_header
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import (
    VIDEO_EXTENSIONS,
    clip_frame_count,
    clip_size,
    has_alpha_frames,
    read_frames,
    to_uint8,
)
from masked_loss_triton.masks.reading import has_alpha, opaque, open_image, read_alpha, read_mask_file
from masked_loss_triton.masks.sources import aspect_differs, exif_orientation

KINDS = {
    "unreadable": "a picture, clip or mask that cannot be decoded",
    "missing": "no mask: full weight",
    "empty": "a mask without any weight: nothing is learned",
    "full": "a mask that covers everything: it changes nothing",
    "size": "mask and picture differ in size: the mask is resized",
    "aspect": "mask and picture differ in shape by more than 1%: the cache command refuses it",
    "frames": "mask and clip differ in their number of frames",
    "rotated": "the picture has an EXIF rotation, which the trainer ignores",
    "unused": "a mask that belongs to no picture",
    "ambiguous": "two mask files for one picture: only the first is used",
    "uncached": "a picture or clip without latent cache",
    "cache": "a latent cache that is damaged or of another resolution",
    "damaged": "a latent cache whose tensors are not those that were masked",
    "orphan": "a latent cache whose picture is not in the dataset, but which the trainer will train on",
    "unmasked": "a latent cache without mask weights",
    "outdated": "the mask or its options changed after the cache was masked",
    "mixed": "only some caches have weights: the trainer would spread one item's mask over its whole batch",
}
# Lossy formats do not keep pure black and white.
NEARLY_BLACK, NEARLY_WHITE = 3, 252


@dataclasses.dataclass(frozen=True)
class Problem:
    """One line of the report: what kind, which file, and what about it."""

    kind: str
    file: str
    message: str
    dataset: int


def check_source(prepared: Prepared, source: Source) -> list[Problem]:
    """Decodes the pictures of a source and their masks. A clip's own frames are not decoded, those of its mask are."""
    found: list[Problem] = []
    for target in source.targets:
        try:
            found += _check_target(prepared, source, target)
        except UserError as error:
            message = str(error)
            named = next((path for path in _files(prepared, source, target) if str(path) in message), target)
            found.append(_problem(prepared, "unreadable", named, message))
    return found


def _files(prepared: Prepared, source: Source, target: Path) -> Iterator[Path]:
    mask = _mask_file(prepared, source, target)
    if mask is not None:
        yield mask
    yield target


def _mask_file(prepared: Prepared, source: Source, target: Path) -> Path | None:
    if source.mask is not None or prepared.masks is None:
        return source.mask
    video = prepared.dataset.is_video
    return prepared.masks.find(target.stem, video) or prepared.masks.find(source.stem, video)


def _check_target(prepared: Prepared, source: Source, target: Path) -> list[Problem]:
    dataset = prepared.dataset
    found: list[Problem] = []
    if dataset.is_video:
        size, mask = clip_size(target), None
        if dataset.alpha_mask and has_alpha_frames(target):
            return found
    else:
        with open_image(target) as image:
            image.load()
            size, alpha = image.size, dataset.alpha_mask and has_alpha(image)
        if exif_orientation(target) != 1:
            note = "the trainer sees it turned: save it upright and cache it again"
            found.append(_problem(prepared, "rotated", target, note))
        mask = read_alpha(target, exif=False) if alpha else None
        mask = None if mask is None or opaque(mask) else to_uint8(mask)
    path = target
    if mask is None:
        file = _mask_file(prepared, source, target) or dataset.default_mask
        if file is None:
            if dataset.has_mask_source:
                found.append(_problem(prepared, "missing", target, "no alpha channel, mask file or default mask"))
            return found
        path = file
        if dataset.is_video and (file.is_dir() or file.suffix.lower() in VIDEO_EXTENSIONS):
            return found + _check_frames(prepared, target, file, size)
        mask = to_uint8(read_mask_file(file, exif=False))
        found += _check_size(prepared, target, file, (mask.shape[1], mask.shape[0]), size)
    if path != dataset.default_mask:
        found += _check_values(prepared, path, int(mask.min()), int(mask.max()))
    return found


def _check_size(
    prepared: Prepared, target: Path, file: Path, mask: tuple[int, int], picture: tuple[int, int]
) -> list[Problem]:
    if mask == picture or file == prepared.dataset.default_mask:
        return []
    sizes = f"{mask[0]}x{mask[1]}, but {target} is {picture[0]}x{picture[1]}"
    if not aspect_differs(mask, picture):
        return [_problem(prepared, "size", file, f"{sizes}; it is resized")]
    if exif_orientation(target) >= 5 and not aspect_differs(mask[::-1], picture):
        return []  # named as "rotated"; the cache command turns the mask back
    return [_problem(prepared, "aspect", file, f"{sizes}; make the mask from the same picture, uncropped")]


def _check_frames(prepared: Prepared, target: Path, file: Path, size: tuple[int, int]) -> list[Problem]:
    found: list[Problem] = []
    count, low, high = 0, 255, 0
    for frame in read_frames(file, clip=target):
        if count == 0:
            found += _check_size(prepared, target, file, (frame.shape[1], frame.shape[0]), size)
        count, low, high = count + 1, min(low, int(frame.min())), max(high, int(frame.max()))
    frames = clip_frame_count(target)
    if count == 0:
        return [_problem(prepared, "empty", file, "no frames in it")]
    if count > 1 and frames and frames != count:
        found.append(_problem(prepared, "frames", file, f"{count} frames, but {target} has {frames}"))
    return found + _check_values(prepared, file, low, high)


def _check_values(prepared: Prepared, path: Path, low: int, high: int) -> list[Problem]:
    if high <= NEARLY_BLACK:
        return [_problem(prepared, "empty", path, "black everywhere")]
    if low >= NEARLY_WHITE:
        return [_problem(prepared, "full", path, "white everywhere")]
    return []


def check_cache(prepared: Prepared, item: CacheItem, verify: bool = True) -> tuple[list[Problem], bool]:
    """The problems of one cache, and whether it has weights; `verify` reads it whole, to see damage."""
    found: list[Problem] = []
    if item.source is None:
        found.append(_problem(prepared, "orphan", item.path, "delete it, or put its picture back"))
    try:
        file = read_header(item.path)
        shape = latent_shape(file, item, prepared.dataset, prepared.family)
        if verify and verify_tensors(file) is False:
            note = "delete it and run the caching script again"
            found.append(_problem(prepared, "damaged", item.path, note))
    except UserError as error:
        return [*found, _problem(prepared, "cache", item.path, str(error))], True
    names = [name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)]
    if not names:
        return [*found, _problem(prepared, "unmasked", item.path, "run masked-loss cache")], False
    if not np.any(file.read(names[0])):
        found.append(_problem(prepared, "empty", item.path, "its weights are 0 everywhere: the crop left the mask out"))
    if prepared.dataset.has_mask_source:
        try:
            inputs = find_inputs(item, shape, prepared.dataset, prepared.family, prepared.masks)
        except UserError:
            return found, True  # the mask's own problem is named with its picture
        if file.metadata.get("mask_hash") != inputs.digest:
            found.append(_problem(prepared, "outdated", item.path, "run masked-loss cache again with the same options"))
    return found, True


def check_lists(prepared: Prepared) -> list[Problem]:
    """What can be seen from the names alone: unused and ambiguous masks, pictures that were not cached."""
    dataset, found = prepared.dataset, []
    if prepared.masks is not None:
        known = {target.stem for source in prepared.sources.values() for target in source.targets}
        known |= {item.stem for item in prepared.items}
        for stem, path in sorted(prepared.masks.stems(dataset.is_video).items()):
            if stem not in known:
                found.append(_problem(prepared, "unused", path, f"no picture or clip is called {stem}"))
        for first, second in prepared.masks.ambiguous:
            found.append(_problem(prepared, "ambiguous", second, f"{first.name} is used"))
    cached = {item.stem for item in prepared.items}
    for stem, source in sorted(prepared.sources.items()):
        if cached and stem not in cached:
            found.append(_problem(prepared, "uncached", source.targets[0], "run the trainer's caching script"))
    return found


def check_mixed(prepared: Prepared, masked: list[bool]) -> list[Problem]:
    """One line when some caches of a dataset have weights and others have none."""
    if not any(masked) or all(masked):
        return []
    counts = f"{sum(masked)} of {len(masked)} caches have weights: run masked-loss cache"
    return [_problem(prepared, "mixed", prepared.dataset.cache_directory, counts)]


def _problem(prepared: Prepared, kind: str, file: Path, message: str) -> Problem:
    text = message.removeprefix(f"{file} ").removeprefix(f"{file}: ")
    return Problem(kind, str(file), text, prepared.dataset.index)
