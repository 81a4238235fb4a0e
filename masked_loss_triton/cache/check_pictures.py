"""What is wrong with the pictures and clips of a dataset and with their masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.clip_masks import length_differs
from masked_loss_triton.cache.inject import Prepared
from masked_loss_triton.cache.items import Source, bucket_size
from masked_loss_triton.cache.kinds import Problem, problem
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.crops import cut_share
from masked_loss_triton.masks.frames import (
    VIDEO_EXTENSIONS,
    clip_size,
    frame_files,
    has_alpha_frames,
    kept_frames,
    mask_frame_files,
    read_frames,
    refuse_animation,
    to_uint8,
)
from masked_loss_triton.masks.reading import has_alpha, opaque, open_image, read_alpha, read_mask_file
from masked_loss_triton.masks.sources import aspect_differs, exif_orientation

# Lossy formats do not keep pure black and white.
NEARLY_BLACK, NEARLY_WHITE = 3, 252
MOST_CUT = 0.05  # of a mask's weight: less is an edge


def check_source(prepared: Prepared, source: Source) -> list[Problem]:
    """Decodes the pictures of a source and their masks. A clip's own frames are not decoded, those of its mask are."""
    found: list[Problem] = []
    for target in source.targets:
        try:
            found += _check_target(prepared, source, target)
        except UserError as error:
            message = str(error)
            named = next((path for path in _files(prepared, source, target) if str(path) in message), target)
            found.append(problem(prepared, "unreadable", named, message))
    return found


def _files(prepared: Prepared, source: Source, target: Path) -> Iterator[Path]:
    mask = _mask_file(prepared, source, target)
    if mask is not None:
        yield mask
    yield from _label_files(prepared, target)
    yield target


def _mask_file(prepared: Prepared, source: Source, target: Path) -> Path | None:
    if source.mask is not None or prepared.masks is None:
        return source.mask
    video = prepared.dataset.is_video
    return prepared.masks.find(target.stem, video) or prepared.masks.find(source.stem, video)


def _label_files(prepared: Prepared, target: Path) -> list[Path]:
    if prepared.masks is None:
        return []
    video = prepared.dataset.is_video
    found = (prepared.masks.find(f"{target.stem}.{label}", video) for label in prepared.dataset.mask_labels)
    return [path for path in found if path is not None]


def _check_target(prepared: Prepared, source: Source, target: Path) -> list[Problem]:
    dataset = prepared.dataset
    found: list[Problem] = []
    if dataset.is_video:
        size, mask = clip_size(target), None
        found += _check_order(prepared, target)
        if dataset.alpha_mask and has_alpha_frames(target):
            return found + _check_frames(prepared, source, target, target, size, alpha=True)
    else:
        with open_image(target) as image:
            image.load()
            size, alpha = image.size, dataset.alpha_mask and has_alpha(image)
        if exif_orientation(target) != 1:
            note = "the trainer sees it turned: save it upright and cache it again"
            found.append(problem(prepared, "rotated", target, note))
        mask = read_alpha(target, exif=False) if alpha else None
        mask = None if mask is None or opaque(mask) else to_uint8(mask)
    labels = _label_files(prepared, target)
    for label in labels:
        found += _check_mask(prepared, source, target, label, size)
    if mask is None:
        file = _mask_file(prepared, source, target) or dataset.default_mask
        if file is None:
            if dataset.has_mask_source and not labels:
                found.append(problem(prepared, "missing", target, "no alpha channel, mask file or default mask"))
            return found
        return found + _check_mask(prepared, source, target, file, size)
    found += _check_values(prepared, target, int(mask.min()), int(mask.max()))
    return found + _check_cut(prepared, target, size, mask)


def _check_mask(prepared: Prepared, source: Source, target: Path, file: Path, size: tuple[int, int]) -> list[Problem]:
    """Decodes a mask file of a picture or clip of this size."""
    if prepared.dataset.is_video and (file.is_dir() or file.suffix.lower() in VIDEO_EXTENSIONS):
        return _check_frames(prepared, source, target, file, size)
    if prepared.dataset.is_video:
        refuse_animation(file)
    mask = to_uint8(read_mask_file(file, exif=False))
    found = _check_size(prepared, target, file, (mask.shape[1], mask.shape[0]), size)
    if file != prepared.dataset.default_mask:
        found += _check_values(prepared, file, int(mask.min()), int(mask.max()))
        if not any(one.kind == "aspect" for one in found):
            found += _check_cut(prepared, target, size, mask)
    return found


def _check_size(
    prepared: Prepared, target: Path, file: Path, mask: tuple[int, int], picture: tuple[int, int]
) -> list[Problem]:
    if mask == picture or file == prepared.dataset.default_mask:
        return []
    sizes = f"{mask[0]}x{mask[1]}, but {target} is {picture[0]}x{picture[1]}"
    if not aspect_differs(mask, picture):
        return [problem(prepared, "size", file, f"{sizes}; it is resized")]
    if exif_orientation(target) >= 5 and not aspect_differs(mask[::-1], picture):
        return []  # named as "rotated"; the cache command turns the mask back
    return [problem(prepared, "aspect", file, f"{sizes}; make the mask from the same picture, uncropped")]


def _check_cut(prepared: Prepared, target: Path, size: tuple[int, int], mask: np.ndarray) -> list[Problem]:
    """How much of a mask the trainer's crop cuts off. A mask that covers everything is cut wherever the picture is."""
    if mask.min() >= NEARLY_WHITE / 255 * mask.max() or prepared.dataset.operations.mask_bake_invert:
        return []
    bucket = bucket_size(size, prepared.dataset, prepared.family)
    # A mask of half the picture's size is cut as one of its size is.
    scale = np.array(size) / mask.shape[::-1]
    share = cut_share(mask, bucket, (float(scale[0]), float(scale[1])))
    if share <= MOST_CUT:
        return []
    note = (
        f"{share:.0%} of its mask is cut off by the crop to {bucket[0]}x{bucket[1]}: masked-loss crop keeps all of it"
    )
    return [problem(prepared, "cut", target, note)]


def _check_order(prepared: Prepared, clip: Path) -> list[Problem]:
    if clip.is_dir():
        names, ordered = frame_files(clip), mask_frame_files(clip)
        if [file.name for file in names] != [file.name for file in ordered]:
            note = (
                f"the trainer reads {names[0].name}, {names[1].name}, {names[2].name}, ...: pad the numbers with zeros"
            )
            return [problem(prepared, "order", clip, note)]
    return []


def _check_frames(
    prepared: Prepared, source: Source, target: Path, file: Path, size: tuple[int, int], alpha: bool = False
) -> list[Problem]:
    found: list[Problem] = []
    count, low, high, sizes = 0, 255, 0, {size}
    whole: np.ndarray | None = None  # the sum of all frames of the clip's size: its crop is that of each of them
    for frame in read_frames(file, alpha, target):
        shape = (frame.shape[1], frame.shape[0])
        if shape not in sizes:
            sizes.add(shape)
            found += _check_size(prepared, target, file, shape, size)
        elif shape == size:
            whole = frame.astype(np.uint32) if whole is None else whole + frame
        count, low, high = count + 1, min(low, int(frame.min())), max(high, int(frame.max()))
    if count == 0:
        return [problem(prepared, "empty", file, "no frames in it")]
    if count > 1 and not alpha:
        note = length_differs(file, target)
        short = _too_short(prepared, source, count)
        if short or note:
            found.append(problem(prepared, "frames", file, short or note))
    if whole is not None:
        found += _check_cut(prepared, target, size, whole)
    return found + _check_values(prepared, file, low, high)


def _too_short(prepared: Prepared, source: Source, count: int) -> str:
    """Returns the words for a mask with fewer frames than the caches of its clip need; empty where it has enough."""
    windows = (item.window for item in prepared.items_of(source.stem) if item.window is not None)
    needed = max((start + length for start, length in windows), default=0)
    fps = prepared.family.fps if prepared.dataset.source_fps is not None else None
    kept = sum(1 for _ in kept_frames(count, prepared.dataset.source_fps, fps))
    return f"only {kept} frames of the {needed} that its caches need" if kept < needed else ""


def _check_values(prepared: Prepared, path: Path, low: int, high: int) -> list[Problem]:
    if high <= NEARLY_BLACK:
        return [problem(prepared, "empty", path, "black everywhere")]
    if low >= NEARLY_WHITE:
        return [problem(prepared, "full", path, "white everywhere")]
    return []
