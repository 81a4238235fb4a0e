"""Adds mask weights to latent caches with workers of Ray; the counterpart of threads that run `inject`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from masked_loss_triton.cache.inject import Outcome, Prepared, inject, remove_weights
from masked_loss_triton.cache.items import CacheItem
from masked_loss_triton.files.ray_engine import run_ray, stamp
from masked_loss_triton.files.shard import Shard, shard_lock

# The number of the dataset, and items that share one decoding, each with its stamp when the run began.
Job = tuple[int, list[tuple[CacheItem, tuple[int, ...] | None]]]


def inject_on_ray(
    prepared: Sequence[Prepared], shard: Shard, run: str, *, options: dict[str, Any], **ray: Any
) -> Iterator[Outcome]:
    """Masks all caches of datasets, or takes their masks out, and yields what happened to each as it happens.

    Args:
        prepared: the datasets.
        shard: the part of the work that they are.
        run: the name under which the caller holds `shard_lock`.
        options: of `inject_all`: remove, dtype, dry_run, force, debug.
        ray: options of `run_ray`: workers, num_gpus, address, debug.
    """
    jobs: list[Job] = [
        (number, [(item, stamp(item.path)) for item in items])
        for number, one in enumerate(prepared)
        for items in one.jobs()
    ]
    # What an actor needs to know of a dataset; each job has its own items and sources.
    known = [dataclasses.replace(one, items=[], sources={}) for one in prepared]
    guard = functools.partial(_guard, [one.dataset.cache_directory for one in prepared], shard, run)
    ray["num_gpus"] = ray.get("num_gpus") or 0.0
    for outcomes in run_ray(functools.partial(_make, known, **options), jobs, _lost, guard=guard, **ray):
        yield from outcomes


def _guard(folders: list[Any], shard: Shard, run: str, job: Job) -> AbstractContextManager[None]:
    return shard_lock(folders[job[0]], "masked-loss cache", shard, run)


def _make(prepared: list[Prepared], *, remove: bool, **options: Any) -> Callable[[Job], list[Outcome]]:
    if remove:
        return functools.partial(_remove, {name: options[name] for name in ("dry_run", "debug")})
    return functools.partial(_inject, prepared, options)


def _remove(options: dict[str, Any], job: Job) -> list[Outcome]:
    fresh, written = _sorted(job)
    return _told([remove_weights(item, **options) for item in (*fresh, *written)], written, "removed")


def _inject(prepared: list[Prepared], options: dict[str, Any], job: Job) -> list[Outcome]:
    fresh, written = _sorted(job)
    done = inject(prepared[job[0]], fresh, **options) if fresh else []
    done += inject(prepared[job[0]], written, **{**options, "force": False}) if written else []
    return _told(done, written, "written")


def _sorted(job: Job) -> tuple[list[CacheItem], list[CacheItem]]:
    """The items of a job that are as they were when the run began, and those that a worker wrote before it died."""
    before = {item.path: one == stamp(item.path) for item, one in job[1]}
    return [item for item, _ in job[1] if before[item.path]], [item for item, _ in job[1] if not before[item.path]]


def _told(outcomes: list[Outcome], written: list[CacheItem], status: str) -> list[Outcome]:
    """The outcomes, with `status` for caches that are up to date because a worker of this run wrote them before it died."""
    late = {item.path for item in written}
    return [
        dataclasses.replace(one, status=status) if one.item.path in late and one.status == "unchanged" else one
        for one in outcomes
    ]


def _lost(job: Job, reason: str) -> list[Outcome]:
    """The outcomes of a job that no worker could finish: one line for its first item, none for the others."""
    first, *rest = [item for item, _ in job[1]]
    return [Outcome(first, "problem", message=f"{first.path}: {reason}"), *(Outcome(item, "problem") for item in rest)]
