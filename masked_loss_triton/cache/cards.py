"""The cards of inspect: made from the dataset's files, with or without caches, or from caches alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.cache.align import (
    compute_clip_weights,
    compute_weights,
    find_inputs,
)
from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import FAMILIES, Family, family_of
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX, Prepared
from masked_loss_triton.cache.items import (
    CACHE_NAME,
    LATENT_KEY,
    CacheItem,
    LatentShape,
    Source,
    bucket_size,
    cells_of,
    latent_shape,
)
from masked_loss_triton.cache.pictures import drawable, name_of, pictures_of, shrink
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header
from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.errors import UserError, problem_line
from masked_loss_triton.files.contact_sheet import Card, draw, save_sheet
from masked_loss_triton.masks.frames import clip_frame_count, clip_size
from masked_loss_triton.masks.geometry import resize_to_bucket
from masked_loss_triton.masks.labels import label_of, labels_in
from masked_loss_triton.masks.reading import open_image
from masked_loss_triton.masks.sources import align_to_picture, read_still

# Only for the preview of pictures that have no cache yet; with a cache the side of a cell comes from its latents.
PREVIEW_CELL, PREVIEW_STRIDE, PREVIEW_FRAMES = 8, 4, 81
SHEET = 48  # cards on one sheet: a PNG of about 1,900 x 8,300 pixels

Maker = Callable[[MaskedLossConfig], Card]


def find_cards(prepared: list[Prepared]) -> list[Maker]:
    """Lists what makes the card of each cache, and of each picture or clip that has no cache yet."""
    found: list[Maker] = []
    for dataset in prepared:
        found += [functools.partial(card_of_item, dataset, item) for item in dataset.items]
        uncached = (source for stem, source in dataset.sources.items() if not dataset.items_of(stem))
        found += [functools.partial(card_of_source, dataset, source) for source in uncached]
    return found


def find_cache_cards(paths: Iterable[Path]) -> list[Maker]:
    """Lists what makes the card of each latent cache among files and folders, without a dataset."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return [functools.partial(card_of_cache, file) for file in files if not file.name.endswith("_te.safetensors")]


def write_sheets(
    name: Path,
    title: str,
    makers: Sequence[Maker],
    config: MaskedLossConfig,
    notes: Sequence[str] = (),
    *,
    failed: Callable[[str], object] = lambda line: None,
    advance: Callable[[], object] = lambda: None,
    debug: bool = False,
) -> tuple[list[Path], int]:
    """Makes the cards and writes them as contact sheets of `SHEET` cards, NAME.png and .html, NAME_2.png and .html, ...

    One sheet of cards is in memory at a time.

    Args:
        name: of the files, without ending.
        title, notes: of the pages; the notes stand above the cards.
        makers: as `find_cards` gave them.
        config: the options of the loss.
        failed, advance: called with one line for each card that cannot be made; called after each.
        debug: raise what is no UserError, instead of making it such a line.

    Returns:
        The sheets, without ending, and the number of cards on them.

    Raises:
        UserError: naming the file that cannot be written.
    """
    names, shown = [name], 0
    names += [name.with_name(f"{name.name}_{number}") for number in range(2, math.ceil(len(makers) / SHEET) + 1)]
    written = []
    for number, sheet in enumerate(names):
        cards, images = [], []
        for make in makers[number * SHEET : (number + 1) * SHEET]:
            try:
                card = make(config)
                images.append(draw(card))
                cards.append(card)
            except Exception as error:
                failed(problem_line(error, _subject(make), debug))
            advance()
        if cards:
            place = (
                [f"Sheet {number + 1} of {len(names)}: {', '.join(one.name for one in names)}."] if names[1:] else []
            )
            save_sheet(sheet, title, cards, images, [*notes, *place])
            written.append(sheet)
        shown += len(cards)
    return written, shown


def _subject(make: Any) -> Path:
    given = make.args[-1]
    return given.path if isinstance(given, CacheItem) else given.targets[0] if isinstance(given, Source) else given


def card_of_source(prepared: Prepared, source: Source, config: MaskedLossConfig) -> Card:
    """Makes the card of a picture or clip that has no cache yet.

    Raises:
        UserError: naming the file that cannot be read.
    """
    item, shape = preview_item(prepared.dataset, prepared.family, source)
    return _card_from_files(prepared, item, shape, None, config)


def card_of_item(prepared: Prepared, item: CacheItem, config: MaskedLossConfig) -> Card:
    """Makes the card of a cache, with its picture where the dataset has it.

    Raises:
        UserError: naming the file that cannot be read.
    """
    file = read_header(item.path)
    shape = latent_shape(file, item, prepared.dataset, prepared.family)
    return _card_from_files(prepared, item, shape, file, config)


def _card_from_files(
    prepared: Prepared, item: CacheItem, shape: LatentShape, file: TensorFile | None, config: MaskedLossConfig
) -> Card:
    raw, origin, labels = _raw_weights(prepared, item, shape, file)
    mask = _mask_pixels(prepared, item, shape)
    pictures = pictures_of(prepared, item, shape)
    label = "picture" if pictures else "latents"
    pictures = pictures or _latent_previews(file, shape)
    size = f"{item.size[0]}x{item.size[1]}, bucket {shape.bucket[0]}x{shape.bucket[1]}"
    cells = f"latents {shape.frames}x{shape.height}x{shape.width}"
    mask = raw[len(raw) // 2] if mask is None else mask
    return _card(name_of(item), [f"{size}, {cells}", origin], label, pictures, mask, raw, config, labels)


def _mask_pixels(prepared: Prepared, item: CacheItem, shape: LatentShape) -> np.ndarray | None:
    """The mask of a picture in the pixels of its bucket, (H, W) float32; None where there is none, and for clips."""
    if item.window is not None or item.source is None:
        return None
    dataset = prepared.dataset
    candidates = find_inputs(item, shape, dataset, prepared.family, prepared.masks).candidates[0]
    pixels, chosen = read_still(list(candidates))
    if pixels is None or chosen is None:
        return None
    aligned = align_to_picture(pixels, item.size, chosen.path, item.source.targets[0], chosen.kind == "default")
    edited = dataset.operations.apply(aligned, item.stem)
    return resize_to_bucket(edited, shape.bucket).astype(np.float32) / 255


def card_of_cache(path: Path, config: MaskedLossConfig) -> Card:
    """Makes the card of a cache alone: its latents stand in for the picture, their three main components as colours.

    Raises:
        UserError: naming the cache, when it is damaged, holds no latents or no weights.
    """
    file = read_header(path)
    if not any(LATENT_KEY.fullmatch(name) for name in file.tensors):
        raise UserError(f"{path} has no latents in it: give a latent cache")
    match = CACHE_NAME.fullmatch(path.name)
    name = family_of(match["suffix"]) if match else None
    frames, height, width = cells_of(file, FAMILIES[name or "wan"])
    shape = LatentShape(frames, height, width, PREVIEW_CELL)
    raw = _cached_weights(file, shape)
    if raw is None:
        raise UserError(f"{path} has no mask weights: run masked-loss cache")
    size = f"{file.metadata.get('width', '?')}x{file.metadata.get('height', '?')}"
    facts = [f"{size}, latents {frames}x{height}x{width}", _origin(file)]
    previews = _latent_previews(file, shape)
    return _card(path.name, facts, "latents", previews, raw[len(raw) // 2], raw, config, _cached_labels(file, shape))


def preview_item(dataset: Dataset, family: Family, source: Source) -> tuple[CacheItem, LatentShape]:
    """The cache that a picture or clip does not have yet, and the shape that its latents would have.

    Raises:
        UserError: naming the picture or clip that cannot be read.
    """
    target = source.targets[0]
    window, frames = None, len(source.targets)
    if dataset.is_video:
        size = bucket_size(clip_size(target), dataset, family)
        steps = max(0, min(clip_frame_count(target) or 1, PREVIEW_FRAMES) - 1) // PREVIEW_STRIDE
        window, frames = (0, steps * PREVIEW_STRIDE + 1), steps + 1
    else:
        with open_image(target) as image:
            size = image.size
    width, height = bucket_size(size, dataset, family)
    shape = LatentShape(frames, height // PREVIEW_CELL, width // PREVIEW_CELL, PREVIEW_CELL)
    return CacheItem(Path(f"(no cache of {source.stem})"), source.stem, size, window, source), shape


def _raw_weights(
    prepared: Prepared, item: CacheItem, shape: LatentShape, file: TensorFile | None
) -> tuple[np.ndarray, str, dict[str, np.ndarray]]:
    cached = _cached_weights(file, shape) if file is not None else None
    if cached is not None and file is not None:
        return cached, _origin(file), _cached_labels(file, shape)
    dataset, family = prepared.dataset, prepared.family
    inputs = find_inputs(item, shape, dataset, family, prepared.masks)
    if item.window is not None:
        result = compute_clip_weights([item], [shape], inputs, dataset, family)[0]
    else:
        header = file if file is not None else TensorFile(item.path, {}, {}, 0)
        result = compute_weights(item, header, shape, inputs, dataset)
    note = "not cached yet" if file is None else "not in the cache yet"
    source = "no mask, full weight" if result.source == "full" else f"mask from {result.source} {result.file}"
    return result.values[0], f"{source}; {note}", {label: part[0] for label, part in result.labels.items()}


def _cached_weights(file: TensorFile, shape: LatentShape) -> np.ndarray | None:
    names = [name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)]
    if not names:
        return None
    return _plane(file, names[0], shape)


def _cached_labels(file: TensorFile, shape: LatentShape) -> dict[str, np.ndarray]:
    names = {label_of(name): name for name in file.tensors}
    return {label: _plane(file, names[label], shape) for label in labels_in(file.metadata) if label in names}


def _plane(file: TensorFile, name: str, shape: LatentShape) -> np.ndarray:
    entry = file.tensors[name]
    if entry["dtype"] not in ("F16", "F32") or math.prod(entry["shape"]) != shape.frames * shape.height * shape.width:
        raise UserError(f"{file.path}: {name} is no mask of this program: run masked-loss cache --force")
    return file.read(name).astype(np.float32).reshape(shape.frames, shape.height, shape.width)


def _origin(file: TensorFile) -> str:
    source, name = file.metadata.get("mask_source", "unknown"), file.metadata.get("mask_file", "")
    if source == "full":
        return "weights in the cache: full, there was no mask"
    return f"weights in the cache, from {source} {name}".rstrip()


def _latent_previews(file: TensorFile | None, shape: LatentShape) -> list[np.ndarray]:
    """The three main components of the channels as colours, (h, w, 3) for each time step; grey without latents."""
    names = [name for name in file.tensors if LATENT_KEY.fullmatch(name)] if file is not None else []
    if file is None or not names or file.tensors[names[0]]["dtype"] not in ("F16", "F32", "BF16"):
        return [np.full((shape.height, shape.width, 3), 128, np.uint8)]
    latents = np.nan_to_num(file.read(names[0]).astype(np.float32), posinf=0, neginf=0).clip(-1e6, 1e6)
    if latents.shape[:2] == (shape.height, shape.width):  # patches of pixels, colour by colour: the mean of each
        latents = latents.reshape(shape.height, shape.width, 3, -1).mean(-1).transpose(2, 0, 1)
    channels = latents.reshape(latents.shape[0], -1)
    channels = channels - channels.mean(axis=1, keepdims=True)
    axes, _, _ = np.linalg.svd(channels @ channels.T)
    colours = axes[:, :3].T @ channels
    low, high = np.percentile(colours, (1, 99), axis=1)[..., None]
    scaled = np.clip((colours - low) / np.maximum(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    if len(scaled) < 3:
        scaled = np.repeat(scaled[:1], 3, axis=0)
    return list(scaled.reshape(3, -1, shape.height, shape.width).transpose(1, 2, 3, 0))


def _card(
    name: str,
    facts: list[str],
    label: str,
    pictures: list[np.ndarray],
    mask: np.ndarray,
    raw: np.ndarray,
    config: MaskedLossConfig,
    labels: dict[str, np.ndarray],
) -> Card:
    import torch

    from masked_loss_triton.loss import mask_weights

    w, _ = mask_weights(torch.from_numpy(np.array(raw))[None], config, shape=(1, *raw.shape))
    weights = w[0].numpy()
    coverage = (
        f"coverage {raw.mean():.1%}, mean weight {weights.mean():.3f} ({weights.min():.2f} to {weights.max():.2f})"
    )
    return Card(
        name=drawable(name),
        facts=[drawable(fact) for fact in [*facts, coverage]],
        picture_label=label,
        pictures=[shrink(picture) for picture in pictures],
        mask=shrink(mask),
        raw=raw,
        weights=weights,
        labels=labels,
    )
