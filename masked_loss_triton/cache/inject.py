"""Adds mask weights to latent caches, in parallel, with one outcome for each cache."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

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
from masked_loss_triton.cache.items import (
    CacheItem,
    LatentShape,
    Source,
    find_caches,
    find_sources,
    latent_shape,
    unread_files,
)
from masked_loss_triton.cache.safetensors_file import NUMPY_NAMES, TensorFile, read_header, rewrite
from masked_loss_triton.errors import UserError, problem_line
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.files.shard import Shard
from masked_loss_triton.masks.labels import LABELS_METADATA, label_of, labels_in, labels_key
from masked_loss_triton.masks.sources import MaskDirectory

WEIGHTS_PREFIX = "mask_weights_"
WEIGHTS_NAME = re.compile(WEIGHTS_PREFIX + r"\d+x\d+x\d+_(float16|float32)")
VERSION, FINGERPRINT = "mask_version", "mask_tensors_sha256"
METADATA_KEYS = ("mask_source", "mask_file", "mask_hash", "mask_operations", LABELS_METADATA, VERSION, FINGERPRINT)
PROGRAM = "masked_loss_triton"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to one cache.

    `status` is "written", "unchanged", "removed" or "problem"; in a dry run the first and third are what would happen.
    `source` is "alpha", "file", "default" or "full", several with commas for layered caches; `message` the problem, or
    what the user should know of weights that were written.
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

    @functools.cached_property
    def _by_stem(self) -> dict[str, list[CacheItem]]:
        items: dict[str, list[CacheItem]] = {}
        for item in self.items:
            items.setdefault(item.stem, []).append(item)
        return items

    def items_of(self, stem: str) -> list[CacheItem]:
        """The caches of one picture or clip."""
        return self._by_stem.get(stem, [])

    def part(self, shard: Shard) -> Prepared:
        """Those of its pictures, clips and caches that are in a shard; a clip and all its windows are in the same one."""
        sources = {stem: source for stem, source in self.sources.items() if stem in shard}
        return dataclasses.replace(self, sources=sources, items=[item for item in self.items if item.stem in shard])

    def jobs(self) -> Iterator[list[CacheItem]]:
        """Items that share one decoding: a picture alone, all windows of a clip together."""
        for items in self._by_stem.values():
            yield from [[item] for item in items] if items[0].window is None else [items]


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


def unread_of(prepared: Prepared) -> list[Path]:
    """Pictures, videos and masks of a dataset in formats that nobody reads."""
    return unread_files(prepared.dataset) + (prepared.masks.unread if prepared.masks is not None else [])


def inject_all(
    prepared: Sequence[Prepared],
    *,
    remove: bool = False,
    dtype: str = "float16",
    dry_run: bool = False,
    force: bool = False,
    workers: int | None = None,
    debug: bool = False,
) -> Iterator[Outcome]:
    """Masks all caches of datasets in parallel, or takes their masks out, and yields what happened to each as it happens.

    Args:
        prepared: the datasets.
        remove: take our weights out, instead of writing them.
        dtype, dry_run, force, debug: as for `inject`.
        workers: threads; None for as many as suit the machine.
    """

    def work(job: tuple[Prepared, list[CacheItem]]) -> list[Outcome]:
        dataset, items = job
        if remove:
            return [remove_weights(item, dry_run, debug) for item in items]
        return inject(dataset, items, dtype=dtype, dry_run=dry_run, force=force, debug=debug)

    jobs = ((dataset, items) for dataset in prepared for items in dataset.jobs())
    for outcomes in run_parallel(work, jobs, workers or default_workers()):
        yield from outcomes


def inject(
    prepared: Prepared,
    job: list[CacheItem],
    *,
    dtype: str = "float16",
    dry_run: bool = False,
    force: bool = False,
    debug: bool = False,
) -> list[Outcome]:
    """Writes the weights of the caches of one job, where they are missing or their inputs have changed.

    Args:
        prepared: the dataset.
        job: one of its jobs.
        dtype: "float16" or "float32".
        dry_run: decide, decode and write nothing.
        force: write also what is up to date.
        debug: raise what is no UserError, instead of making it the problem of one cache.
    """
    outcomes: list[Outcome] = []
    due: list[_Due] = []
    for item in job:
        try:
            file = read_header(item.path)
            shape = latent_shape(file, item, prepared.dataset, prepared.family)
            inputs = find_inputs(item, shape, prepared.dataset, prepared.family, prepared.masks)
            kinds = {
                group[0].kind if group else ("file" if any(named) else "full")
                for group, named in zip(inputs.candidates, inputs.labels, strict=True)
            }
            if not force:
                _check_not_foreign(file)
            current = not force and _is_current(file, shape, inputs, dtype)
            if (current and "full" in file.metadata["mask_source"].split(",")) or (dry_run and "full" in kinds):
                check_not_required(item, prepared.dataset)
        except Exception as error:
            outcomes.append(Outcome(item, "problem", message=problem_line(error, item.path, debug)))
            continue
        if current:
            outcomes.append(Outcome(item, "unchanged", file.metadata["mask_source"]))
        elif dry_run:
            outcomes.append(Outcome(item, "written", ",".join(sorted(kinds))))
        else:
            due.append(_Due(item, file, shape, inputs))
    return outcomes + _write(prepared, due, dtype, debug)


@dataclasses.dataclass(frozen=True)
class _Due:
    """A cache whose weights are to be computed and written."""

    item: CacheItem
    file: TensorFile
    shape: LatentShape
    inputs: Inputs


def _write(prepared: Prepared, due: list[_Due], dtype: str, debug: bool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    by_plane: dict[tuple[int, int], list[_Due]] = {}
    for cache in due:
        by_plane.setdefault((cache.shape.height, cache.shape.width), []).append(cache)
    for group in by_plane.values():
        try:
            results = _compute(prepared, group)
        except Exception as error:
            # One mask serves all windows of a clip: its fault is named once.
            line = problem_line(error, group[0].item.path, debug)
            outcomes.append(Outcome(group[0].item, "problem", message=line))
            outcomes += [Outcome(cache.item, "problem") for cache in group[1:]]
            continue
        for cache, weights in zip(group, results, strict=True):
            try:
                save_weights(cache.file, cache.shape, weights, cache.inputs.digest, prepared.dataset, dtype)
                outcomes.append(Outcome(cache.item, "written", weights.source, weights.note))
            except Exception as error:
                outcomes.append(Outcome(cache.item, "problem", message=problem_line(error, cache.item.path, debug)))
    return outcomes


def _compute(prepared: Prepared, group: list[_Due]) -> list[Weights]:
    dataset = prepared.dataset
    if group[0].item.window is None:
        return [compute_weights(cache.item, cache.file, cache.shape, cache.inputs, dataset) for cache in group]
    items, shapes = [cache.item for cache in group], [cache.shape for cache in group]
    return compute_clip_weights(items, shapes, group[0].inputs, dataset, prepared.family)


def weights_key(shape: LatentShape, dtype: str) -> str:
    """The name of the weights in a cache."""
    return f"{WEIGHTS_PREFIX}{shape.frames}x{shape.height}x{shape.width}_{dtype}"


def own_weights(file: TensorFile) -> set[str]:
    """The names of the weights in a cache that this package wrote; those of another program are not among them."""
    if not file.metadata.get(VERSION, "").startswith(f"{PROGRAM} "):
        return set()
    return {name for name in file.tensors if WEIGHTS_NAME.fullmatch(name) or label_of(name)}


def own_metadata(file: TensorFile) -> set[str]:
    """The keys of the metadata of a cache that this package wrote."""
    if not file.metadata.get(VERSION, "").startswith(f"{PROGRAM} "):
        return set()
    return file.metadata.keys() & set(METADATA_KEYS)


def verify_tensors(file: TensorFile) -> bool | None:
    """Whether latents and all else in a cache are what they were when it was masked; None where that was not noted.

    Reads the whole cache.

    Raises:
        UserError: when it cannot be read, or another program writes it meanwhile.
    """
    if not own_weights(file) or FINGERPRINT not in file.metadata:
        return None
    return file.fingerprint(file.tensors.keys() - own_weights(file)) == file.metadata[FINGERPRINT]


def _check_not_foreign(file: TensorFile) -> None:
    foreign = {name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)} - own_weights(file)
    if foreign:
        raise UserError(
            f"{file.path} has mask weights of another program ({min(foreign)}): --force replaces them, and they cannot be "
            "had back"
        )


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
        VERSION: f"{PROGRAM} {__version__}",
    }
    if weights.labels:
        provenance[LABELS_METADATA] = json.dumps(list(weights.labels))
    metadata = {key: value for key, value in file.metadata.items() if key not in METADATA_KEYS}
    old = {name for name in file.tensors if name.startswith(WEIGHTS_PREFIX) or label_of(name)}
    key = weights_key(shape, dtype)
    arrays = {key: weights.values, **{labels_key(label, key): part for label, part in weights.labels.items()}}
    rewrite(
        file,
        drop=old,
        add={name: array.astype(dtype) for name, array in arrays.items()},
        metadata={**metadata, **provenance},
        fingerprint=FINGERPRINT,
    )


def remove_weights(item: CacheItem, dry_run: bool = False, debug: bool = False) -> Outcome:
    """Takes our weights and provenance out of a cache; it is then as the trainer's script wrote it."""
    try:
        file = read_header(item.path)
        ours, keys = own_weights(file), own_metadata(file)
        if not ours and not keys:
            return Outcome(item, "unchanged")
        if not dry_run:
            metadata = {key: value for key, value in file.metadata.items() if key not in keys}
            rewrite(file, drop=ours, metadata=metadata)
        return Outcome(item, "removed")
    except Exception as error:
        return Outcome(item, "problem", message=problem_line(error, item.path, debug))


def _is_current(file: TensorFile, shape: LatentShape, inputs: Inputs, dtype: str) -> bool:
    name = weights_key(shape, dtype)
    names = {name, *(labels_key(label, name) for label in labels_in(file.metadata))}
    if own_weights(file) != names or file.metadata.get("mask_hash") != inputs.digest:
        return False
    if "mask_source" not in file.metadata:
        return False
    for one in names:
        if file.tensors[one]["dtype"] != NUMPY_NAMES[dtype]:
            return False
        values = file.read(one)
        if not np.all((values >= 0) & (values <= 1)):  # NaN is neither
            return False
    return True
