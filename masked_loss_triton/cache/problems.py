"""Everything that is wrong with the masks of a dataset, found without changing anything."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.align import Inputs, compute_clip_weights, compute_weights, find_inputs, place
from masked_loss_triton.cache.check_pictures import check_source
from masked_loss_triton.cache.checked import Checked, CheckedDataset, Findings
from masked_loss_triton.cache.clip_masks import kept_masks, section_span
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX, Prepared, own_weights, unread_of, verify_tensors
from masked_loss_triton.cache.items import CacheItem, LatentShape, Source, latent_shape
from masked_loss_triton.cache.kinds import Problem, problem
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header
from masked_loss_triton.errors import UserError, problem_line
from masked_loss_triton.files.atomic import check_replaceable
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.files.shard import WHOLE, Shard
from masked_loss_triton.masks.geometry import frames_per_latent
from masked_loss_triton.masks.labels import label_of
from masked_loss_triton.masks.operations import MaskOperations
from masked_loss_triton.masks.reading import open_image
from masked_loss_triton.masks.sources import read_still


@dataclasses.dataclass(frozen=True)
class CacheFindings:
    """The problems of one cache, whether it has weights (None: it could not be read), and the operations that these were made
    with, if that is known."""

    problems: list[Problem]
    masked: bool | None = None
    operations: MaskOperations | None = None
    labels: tuple[str, ...] = ()


def find_problems(
    prepared: Sequence[Prepared],
    *,
    ignore: Collection[str] = (),
    workers: int | None = None,
    advance: Callable[[], object] = lambda: None,
    debug: bool = False,
) -> Findings:
    """Finds what is wrong with the pictures, clips, masks and caches of datasets. Arguments as for `check_shard`."""
    return check_shard(prepared, ignore=ignore, workers=workers, advance=advance, debug=debug).findings()


def check_shard(
    prepared: Sequence[Prepared],
    shard: Shard = WHOLE,
    *,
    ignore: Collection[str] = (),
    workers: int | None = None,
    advance: Callable[[], object] = lambda: None,
    debug: bool = False,
) -> Checked:
    """Checks the pictures, clips, masks and caches of a shard of datasets.

    Args:
        prepared: the datasets, whole.
        shard: the part of them that is looked at.
        ignore: names of `KINDS` to leave out.
        workers: threads; None for as many as suit the machine.
        advance: called once for each picture, clip and cache.
        debug: raise what is no UserError, instead of making it the problem of one file.
    """

    def work(job: tuple[int, Source | CacheItem]) -> tuple[int, CacheFindings | list[Problem]]:
        index, item = job
        dataset = prepared[index]
        try:
            if isinstance(item, Source):
                return index, check_source(dataset, item)
            return index, check_cache(dataset, item, "damaged" not in ignore)
        except Exception as error:
            file = item.targets[0] if isinstance(item, Source) else item.path
            kind = "unreadable" if isinstance(item, Source) else "cache"
            return index, [problem(dataset, kind, file, problem_line(error, file, debug))]

    parts = [dataset.part(shard) for dataset in prepared]

    def jobs() -> Iterator[tuple[int, Source | CacheItem]]:
        for index, part in enumerate(parts):
            yield from ((index, source) for source in part.sources.values())
            yield from ((index, item) for item in part.items)

    checked = [_begun(dataset, shard) for dataset in prepared]
    for index, result in run_parallel(work, jobs(), workers or default_workers()):
        if isinstance(result, CacheFindings):
            checked[index].masked += result.masked is True
            checked[index].unmasked += result.masked is False
            if result.operations is not None:
                checked[index].count_operations(json.dumps(dataclasses.asdict(result.operations)))
            checked[index].count_labels(result.labels)
            result = result.problems
        checked[index].problems += result
        advance()
    pictures, caches = sum(len(part.sources) for part in parts), sum(len(part.items) for part in parts)
    options = repr((sorted(ignore), [(dataset.dataset, dataset.family.suffixes) for dataset in prepared]))
    digest = hashlib.sha256(options.encode("utf-8", "backslashreplace")).hexdigest()
    return Checked(shard, pictures, caches, digest, sorted(ignore), checked)


def _begun(prepared: Prepared, shard: Shard) -> CheckedDataset:
    """Returns the findings of a shard as far as file names alone show them; what is in the files is added later."""
    dataset = prepared.dataset
    problems = [line for line in check_lists(prepared) if Path(line.file).name in shard]
    asked = dataset.operations != MaskOperations()
    return CheckedDataset(dataset.index, str(dataset.cache_directory), asked, problems=problems)


def check_cache(prepared: Prepared, item: CacheItem, verify: bool = True) -> CacheFindings:
    """Checks one cache: its header, its weights, and that they are those of its mask.

    Args:
        prepared: the dataset.
        item: one of its caches.
        verify: read it whole, to see damage.
    """
    found: list[Problem] = []
    dataset = prepared.dataset
    if item.source is None:
        found.append(problem(prepared, "orphan", item.path, "delete it, or put its picture back"))
    try:
        file = read_header(item.path)
        shape = latent_shape(file, item, dataset, prepared.family)
        _check_fits(prepared, item, file, shape)
        if verify and verify_tensors(file) is False:
            found.append(problem(prepared, "damaged", item.path, "delete it and run the caching script again"))
        if dataset.has_mask_source:
            check_replaceable(item.path)
    except UserError as error:
        return CacheFindings([*found, problem(prepared, "cache", item.path, str(error))])
    if item.source is None:
        found += _check_orphan(prepared, item, file, shape)
    names = [name for name in file.tensors if name.startswith(WEIGHTS_PREFIX)]
    if not names:
        return CacheFindings([*found, problem(prepared, "unmasked", item.path, "run masked-loss cache")], masked=False)
    operations = cached_operations(file)
    if foreign := set(names) - own_weights(file):
        note = f"{min(foreign)} is of another program: masked-loss cache --force replaces it"
        return CacheFindings([*found, problem(prepared, "cache", item.path, note)], masked=True)
    shares = {label: file.read(name) for name in sorted(file.tensors) if (label := label_of(name))}
    values = np.concatenate([file.read(names[0]), *shares.values()])
    if not np.all((values >= 0) & (values <= 1)):  # also where they are no numbers
        note = "its weights are not all between 0 and 1: run masked-loss cache again"
        found.append(problem(prepared, "cache", item.path, note))
    elif not np.any(values):
        found.append(problem(prepared, "empty", item.path, "its weights are 0 everywhere: the crop left the mask out"))
    found += _check_current(prepared, item, file, shape, operations)
    return CacheFindings(found, True, operations, tuple(label for label, share in shares.items() if np.any(share)))


def _check_fits(prepared: Prepared, item: CacheItem, file: TensorFile, shape: LatentShape) -> None:
    """Refuses what the cache command would refuse of a cache apart from its mask."""
    if item.section is not None:
        section_span(item, shape)
        return
    if item.window is not None:
        try:
            frames_per_latent(item.window[1], shape.frames)
        except ValueError as error:
            raise UserError(f"{item.path}: {error}; run the caching script again") from error
        return
    targets = item.source.targets if item.source is not None else (item.path,)
    place(np.zeros((len(targets), 1, 1), np.float32), item, file, shape, prepared.dataset)
    if item.source is not None:
        size = item.size
        # A picture that cannot be read is named as itself.
        with contextlib.suppress(UserError), open_image(targets[0]) as image:
            size = image.size
        if size != item.size:
            raise UserError(
                f"{item.path} is of a picture of {item.size[0]}x{item.size[1]}, and {targets[0]} is {size[0]}x{size[1]}: "
                "run the caching script again"
            )


def _check_orphan(prepared: Prepared, item: CacheItem, file: TensorFile, shape: LatentShape) -> list[Problem]:
    """Tries the mask of a cache without picture, which is looked at nowhere else."""
    dataset, family = prepared.dataset, prepared.family
    try:
        inputs = find_inputs(item, shape, dataset, family, prepared.masks)
        if item.window is not None:
            compute_clip_weights([item], [shape], inputs, dataset, family)
        else:
            compute_weights(item, file, shape, inputs, dataset)
    except UserError as error:
        return [problem(prepared, "unreadable", item.path, str(error))]
    return []


def _check_current(
    prepared: Prepared, item: CacheItem, file: TensorFile, shape: LatentShape, operations: MaskOperations | None
) -> list[Problem]:
    dataset = prepared.dataset
    if not dataset.has_mask_source:
        return []
    try:
        inputs = find_inputs(item, shape, dataset, prepared.family, prepared.masks)
    except UserError:
        return []  # the mask's own problem is named with its picture, or with the orphan
    made = file.metadata.get("mask_hash")
    if made == inputs.digest:
        return []
    if operations is not None and made == inputs.digest_with(operations):
        note = f"masked with {operations}, now asked for {dataset.operations}: give the same, or run masked-loss cache again"
        return [problem(prepared, "options", item.path, note)]
    if not _are_readable(item, inputs, prepared):
        return []  # as above: caching again would not help
    return [problem(prepared, "outdated", item.path, "run masked-loss cache again")]


def _are_readable(item: CacheItem, inputs: Inputs, prepared: Prepared) -> bool:
    """Whether the masks of an item can be decoded; of those of clips the first frame."""
    groups = [list(group) for group in inputs.candidates]
    groups += [[one] for labels in inputs.labels for one in labels if one is not None]
    try:
        for group in groups:
            if item.window is None:
                read_still(group)
            elif group:
                clip = item.source.targets[0] if item.source is not None else None
                next(iter(kept_masks(group[0], clip, prepared.dataset, prepared.family)), None)
    except UserError:
        return False
    return True


def cached_operations(file: TensorFile) -> MaskOperations | None:
    """Returns the operations that the weights of a cache were made with; None where another program or version made them."""
    try:
        return MaskOperations(**json.loads(file.metadata["mask_operations"]))
    except (KeyError, ValueError, TypeError):
        return None


def check_lists(prepared: Prepared) -> list[Problem]:
    """Finds what the names alone show: unused and ambiguous masks, formats that are not read, pictures without cache."""
    dataset, found = prepared.dataset, []
    if prepared.masks is not None:
        known = {target.stem for source in prepared.sources.values() for target in source.targets}
        known |= {item.stem for item in prepared.items}
        labels = dataset.mask_labels
        labelled = {f"{stem}.{label}" for stem in known for label in labels}
        for stem, path in sorted(prepared.masks.stems(dataset.is_video).items()):
            name, _, label = stem.rpartition(".")
            if stem in known or stem in labelled:
                continue
            note = f"no picture or clip is called {stem}"
            if name in known:
                near = difflib.get_close_matches(label, labels, 1)
                given = f"mask_labels are {', '.join(labels)}" if labels else f"name it: --mask_labels {label}"
                note = f"{label} is no label: {f'did you mean {near[0]}?' if near else given}"
            found.append(problem(prepared, "unused", path, note))
        for first, second in prepared.masks.pairs(dataset.is_video):
            found.append(problem(prepared, "ambiguous", second, f"{first.name} is used"))
    note = "save it as PNG, or a video as MP4"
    found += [problem(prepared, "unread", path, note) for path in unread_of(prepared)]
    cached = {item.stem for item in prepared.items}
    for stem, source in sorted(prepared.sources.items()):
        if cached and stem not in cached:
            found.append(problem(prepared, "uncached", source.targets[0], "run the trainer's caching script"))
    return found
