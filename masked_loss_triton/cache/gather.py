"""What inspect shows of each item: from the dataset's files, with or without caches, or from caches alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from masked_loss_triton.cache.align import compute_clip_weights, compute_weights, find_inputs
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX, Prepared
from masked_loss_triton.cache.items import LATENT_KEY, CacheItem, LatentShape, Source, bucket_size, latent_shape
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.contact_sheet import Card
from masked_loss_triton.masks.frames import clip_frame_count, clip_size, kept_frames, read_clip
from masked_loss_triton.masks.geometry import resize_to_bucket
from masked_loss_triton.masks.reading import open_image, read_picture
from masked_loss_triton.masks.sources import align_to_picture, read_still

# Only for the preview of pictures that have no cache yet; with a cache the side of a cell comes from its latents.
PREVIEW_CELL, PREVIEW_STRIDE, PREVIEW_FRAMES = 8, 4, 81


def card_from_files(prepared: Prepared, thing: CacheItem | Source, config: MaskedLossConfig) -> Card:
    """The card of a cache whose picture is in the dataset, or of a picture that has no cache yet.

    Raises:
        UserError: naming the file that cannot be read.
    """
    dataset = prepared.dataset
    file: TensorFile | None = None
    if isinstance(thing, CacheItem):
        item = thing
        file = read_header(item.path)
        shape = latent_shape(file, item, dataset, prepared.family)
    else:
        item, shape = _preview(prepared, thing)
    raw, origin = _raw_weights(prepared, item, shape, file)
    mask = raw[len(raw) // 2]
    if item.window is None and item.source is not None:
        candidates = find_inputs(item, shape, dataset, prepared.family, prepared.masks).candidates[0]
        pixels, chosen = read_still(list(candidates))
        if pixels is not None and chosen is not None:
            aligned = align_to_picture(pixels, item.size, chosen.path, item.source.targets[0], chosen.kind == "default")
            edited = dataset.operations.apply(aligned, item.stem)
            mask = resize_to_bucket(edited, shape.bucket).astype(np.float32) / 255
    pictures = _pictures(prepared, item, shape)
    label = "picture" if pictures else "latents"
    pictures = pictures or _latent_previews(file, shape)
    size = f"{item.size[0]}x{item.size[1]}, bucket {shape.bucket[0]}x{shape.bucket[1]}"
    cells = f"latents {shape.frames}x{shape.height}x{shape.width}"
    return _card(_name(item), [f"{size}, {cells}", origin], label, pictures, mask, raw, config)


def card_from_cache(path: Path, config: MaskedLossConfig) -> Card:
    """The card of a cache alone: its latents stand in for the picture, their three main components as colours.

    Raises:
        UserError: naming the cache, when it is damaged, holds no latents or no weights.
    """
    file = read_header(path)
    keys = [match for name in file.tensors if (match := LATENT_KEY.fullmatch(name))]
    if not keys:
        raise UserError(f"{path} has no latents in it: give a latent cache")
    frames, height, width = (int(keys[0][group]) for group in ("frames", "height", "width"))
    shape = LatentShape(frames, height, width, PREVIEW_CELL)
    raw = _cached_weights(file, shape)
    if raw is None:
        raise UserError(f"{path} has no mask weights: run masked-loss cache")
    size = f"{file.metadata.get('width', '?')}x{file.metadata.get('height', '?')}"
    facts = [f"{size}, latents {frames}x{height}x{width}", _origin(file)]
    return _card(path.name, facts, "latents", _latent_previews(file, shape), raw[len(raw) // 2], raw, config)


def _name(item: CacheItem) -> str:
    return item.stem if item.window is None else f"{item.stem}  frames {item.window[0]} to {sum(item.window) - 1}"


def _preview(prepared: Prepared, source: Source) -> tuple[CacheItem, LatentShape]:
    target, dataset = source.targets[0], prepared.dataset
    window, frames = None, len(source.targets)
    if dataset.is_video:
        size = bucket_size(clip_size(target), dataset, prepared.family)
        steps = max(0, min(clip_frame_count(target) or 1, PREVIEW_FRAMES) - 1) // PREVIEW_STRIDE
        window, frames = (0, steps * PREVIEW_STRIDE + 1), steps + 1
    else:
        with open_image(target) as image:
            size = image.size
    width, height = bucket_size(size, dataset, prepared.family)
    shape = LatentShape(frames, height // PREVIEW_CELL, width // PREVIEW_CELL, PREVIEW_CELL)
    return CacheItem(Path(f"(no cache of {source.stem})"), source.stem, size, window, source), shape


def _raw_weights(
    prepared: Prepared, item: CacheItem, shape: LatentShape, file: TensorFile | None
) -> tuple[np.ndarray, str]:
    cached = _cached_weights(file, shape) if file is not None else None
    if cached is not None and file is not None:
        return cached, _origin(file)
    dataset, family = prepared.dataset, prepared.family
    inputs = find_inputs(item, shape, dataset, family, prepared.masks)
    if item.window is not None:
        result = compute_clip_weights([item], [shape], inputs, dataset, family)[0]
    else:
        header = file if file is not None else TensorFile(item.path, {}, {}, 0)
        result = compute_weights(item, header, shape, inputs, dataset)
    note = "not cached yet" if file is None else "not in the cache yet"
    source = "no mask, full weight" if result.source == "full" else f"mask from {result.source} {result.file}"
    return result.values[0], f"{source}; {note}"


def _cached_weights(file: TensorFile, shape: LatentShape) -> np.ndarray | None:
    names = [name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)]
    if not names:
        return None
    return file.read(names[0]).astype(np.float32).reshape(shape.frames, shape.height, shape.width)


def _origin(file: TensorFile) -> str:
    source, name = file.metadata.get("mask_source", "unknown"), file.metadata.get("mask_file", "")
    if source == "full":
        return "weights in the cache: full, there was no mask"
    return f"weights in the cache, from {source} {name}".rstrip()


def _pictures(prepared: Prepared, item: CacheItem, shape: LatentShape) -> list[np.ndarray]:
    if item.source is None or not item.source.targets[0].exists():
        return []
    if item.window is None:
        targets = item.source.targets
        return [resize_to_bucket(read_picture(target, exif=False).rgb, shape.bucket) for target in targets]
    dataset = prepared.dataset
    fps = prepared.family.fps if dataset.source_fps is not None else None
    start, count = item.window
    stride = (count - 1) // (shape.frames - 1) if shape.frames > 1 else 1
    kept = kept_frames(None, dataset.source_fps, fps)
    wanted = {index for position, index in zip(range(start + count), kept, strict=False) if position >= start}
    order = sorted(wanted)[::stride]
    pictures = []
    for index, frame in enumerate(read_clip(item.source.targets[0])):
        if index in order:
            pictures.append(resize_to_bucket(frame, shape.bucket))
        if len(pictures) == len(order):
            break
    return pictures


def _latent_previews(file: TensorFile | None, shape: LatentShape) -> list[np.ndarray]:
    """The three main components of the channels as colours, (h, w, 3) for each time step; grey without latents."""
    names = [name for name in file.tensors if LATENT_KEY.fullmatch(name)] if file is not None else []
    if file is None or not names or file.tensors[names[0]]["dtype"] not in ("F16", "F32", "BF16"):
        return [np.full((shape.height, shape.width, 3), 128, np.uint8)]
    latents = np.nan_to_num(file.read(names[0]).astype(np.float32))
    channels = latents.reshape(latents.shape[0], -1)
    channels = channels - channels.mean(axis=1, keepdims=True)
    axes, _, _ = np.linalg.svd(channels @ channels.T)
    colours = axes[:, :3].T @ channels
    low, high = np.percentile(colours, (1, 99), axis=1)[..., None]
    scaled = np.clip((colours - low) / np.maximum(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    if len(scaled) < 3:
        scaled = np.repeat(scaled[:1], 3, axis=0)
    return list(scaled.reshape(3, *latents.shape[1:]).transpose(1, 2, 3, 0))


def _card(
    name: str,
    facts: list[str],
    label: str,
    pictures: list[np.ndarray],
    mask: np.ndarray,
    raw: np.ndarray,
    config: MaskedLossConfig,
) -> Card:
    import torch

    from masked_loss_triton.loss import mask_weights

    w, _ = mask_weights(torch.from_numpy(np.array(raw))[None], config, shape=(1, *raw.shape))
    weights = w[0].numpy()
    coverage = (
        f"coverage {raw.mean():.1%}, mean weight {weights.mean():.3f} ({weights.min():.2f} to {weights.max():.2f})"
    )
    return Card(
        name=_drawable(name),
        facts=[_drawable(fact) for fact in [*facts, coverage]],
        picture_label=label,
        pictures=pictures,
        mask=mask,
        raw=raw,
        weights=weights,
    )


def _drawable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
