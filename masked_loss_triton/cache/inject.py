"""Adds mask weights to latent caches, in parallel, with one outcome for each cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from masked_loss_triton.cache.align import (
    Inputs,
    Weights,
    check_not_required,
    compute_clip_weights,
    compute_weights,
    find_inputs,
)
from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.items import CacheItem, LatentShape, Source, find_caches, find_sources, latent_shape
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header, rewrite
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.sources import MaskDirectory

WEIGHTS_PREFIX = "mask_weights_"
METADATA_PREFIX = "mask_"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to one cache.

    `status` is "written", "unchanged", "removed" or "problem"; in a dry run the first and third are what would happen.
    `source` is "alpha", "file", "default" or "full", several with commas for layered caches; `message` the problem.
    """

    item: CacheItem
    status: str
    source: str = ""
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dataset with its pictures, masks and caches looked up."""

    dataset: Dataset
    family: Family
    masks: MaskDirectory | None
    sources: dict[str, Source]
    items: list[CacheItem]

    def jobs(self) -> Iterator[list[CacheItem]]:
        """Items that share one decoding: a picture alone, all windows of a clip together."""
        clips: dict[str, list[CacheItem]] = {}
        for item in self.items:
            if item.window is None:
                yield [item]
            else:
                clips.setdefault(item.stem, []).append(item)
        yield from clips.values()


def prepare(dataset: Dataset, family: Family) -> Prepared:
    """Lists the pictures, masks and caches of a dataset.

    Raises:
        UserError: naming the folder that cannot be read, or a dataset of clips where the model family has none.
    """
    if dataset.is_video and family.fps is None:
        raise UserError(f"{dataset.name} has clips, which this model family is not trained on: check --arch", 2)
    masks = MaskDirectory(dataset.mask_directory) if dataset.mask_directory is not None else None
    sources = find_sources(dataset)
    return Prepared(dataset, family, masks, sources, find_caches(dataset, family, sources))


def inject(
    prepared: Prepared, job: list[CacheItem], *, dtype: str = "float16", dry_run: bool = False, force: bool = False
) -> list[Outcome]:
    """Writes the weights of the caches of one job, where they are missing or their inputs have changed.

    Args:
        prepared: the dataset.
        job: one of its jobs.
        dtype: "float16" or "float32".
        dry_run: decide, decode and write nothing.
        force: write also what is up to date.
    """
    outcomes: list[Outcome] = []
    due: list[tuple[CacheItem, TensorFile, LatentShape, Inputs]] = []
    for item in job:
        try:
            file = read_header(item.path)
            shape = latent_shape(file, item, prepared.dataset, prepared.family)
            inputs = find_inputs(item, shape, prepared.dataset, prepared.family, prepared.masks)
            kinds = {group[0].kind if group else "full" for group in inputs.candidates}
            current = not force and _is_current(file, shape, inputs, dtype)
            if (current and "full" in file.metadata["mask_source"].split(",")) or (dry_run and "full" in kinds):
                check_not_required(item, prepared.dataset)
        except UserError as error:
            outcomes.append(Outcome(item, "problem", message=str(error)))
            continue
        if current:
            outcomes.append(Outcome(item, "unchanged", file.metadata["mask_source"]))
        elif dry_run:
            outcomes.append(Outcome(item, "written", ",".join(sorted(kinds))))
        else:
            due.append((item, file, shape, inputs))
    return outcomes + _write(prepared, due, dtype)


def _write(
    prepared: Prepared, due: list[tuple[CacheItem, TensorFile, LatentShape, Inputs]], dtype: str
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    by_plane: dict[tuple[int, int], list[tuple[CacheItem, TensorFile, LatentShape, Inputs]]] = {}
    for one in due:
        by_plane.setdefault((one[2].height, one[2].width), []).append(one)
    for group in by_plane.values():
        items, files, shapes, inputs = (list(column) for column in zip(*group, strict=True))
        try:
            if items[0].window is not None:
                results = compute_clip_weights(items, shapes, inputs[0], prepared.dataset, prepared.family)
            else:
                results = [
                    compute_weights(item, file, shape, one, prepared.dataset)
                    for item, file, shape, one in zip(items, files, shapes, inputs, strict=True)
                ]
        except UserError as error:
            # One mask serves all windows of a clip: its fault is named once.
            outcomes.append(Outcome(items[0], "problem", message=str(error)))
            outcomes += [Outcome(item, "problem") for item in items[1:]]
            continue
        for item, file, shape, one, weights in zip(items, files, shapes, inputs, results, strict=True):
            try:
                save_weights(file, shape, weights, one.digest, prepared.dataset, dtype)
                outcomes.append(Outcome(item, "written", weights.source))
            except UserError as error:
                outcomes.append(Outcome(item, "problem", message=str(error)))
    return outcomes


def weights_key(shape: LatentShape, dtype: str) -> str:
    """The name of the weights in a cache."""
    return f"{WEIGHTS_PREFIX}{shape.frames}x{shape.height}x{shape.width}_{dtype}"


def is_mask_metadata(key: str) -> bool:
    """Whether a metadata key of a cache is ours."""
    return key.startswith(METADATA_PREFIX)


def save_weights(
    file: TensorFile, shape: LatentShape, weights: Weights, digest: str, dataset: Dataset, dtype: str
) -> None:
    """Puts weights and their provenance into a cache in place of older ones; all else keeps its bytes."""
    from masked_loss_triton import __version__

    provenance = {
        "mask_source": weights.source,
        # A file name may hold bytes that are no text; a header has to be UTF-8.
        "mask_file": weights.file.encode("utf-8", "backslashreplace").decode(),
        "mask_hash": digest,
        "mask_operations": json.dumps(dataclasses.asdict(dataset.operations), separators=(",", ":")),
        "mask_version": f"masked_loss_triton {__version__}",
    }
    metadata = {key: value for key, value in file.metadata.items() if not is_mask_metadata(key)}
    old = {name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)}
    array = weights.values.astype(np.float16 if dtype == "float16" else np.float32)
    rewrite(file, drop=old, add={weights_key(shape, dtype): array}, metadata={**metadata, **provenance})


def remove_weights(item: CacheItem, dry_run: bool = False) -> Outcome:
    """Takes weights and provenance out of a cache; it is then as the trainer's script wrote it."""
    try:
        file = read_header(item.path)
        ours = {name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)}
        metadata = {key: value for key, value in file.metadata.items() if not is_mask_metadata(key)}
        if not ours and metadata == file.metadata:
            return Outcome(item, "unchanged")
        if not dry_run:
            rewrite(file, drop=ours, metadata=metadata)
        return Outcome(item, "removed")
    except UserError as error:
        return Outcome(item, "problem", message=str(error))


def _is_current(file: TensorFile, shape: LatentShape, inputs: Inputs, dtype: str) -> bool:
    names = [name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)]
    return names == [weights_key(shape, dtype)] and file.metadata.get("mask_hash") == inputs.digest
