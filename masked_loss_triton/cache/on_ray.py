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
    prepared: Sequence[Prepared], shard: Shard, run: str, *, remove: bool, options: dict[str, Any], **ray: Any
) -> Iterator[list[Outcome]]:
    """Yields the outcomes of each job of the datasets, as they are done.

    Args:
        prepared: the datasets.
        shard: the part of the work that they are.
        run: the name under which the caller holds `shard_lock`.
        remove: take weights out.
        options: of `inject`, or of `remove_weights`.
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
    make = functools.partial(_make, known, remove, options)
    ray["num_gpus"] = ray.get("num_gpus") or 0.0
    return run_ray(make, jobs, _lost, guard=guard, **ray)


def _guard(folders: list[Any], shard: Shard, run: str, job: Job) -> AbstractContextManager[None]:
    return shard_lock(folders[job[0]], "masked-loss cache", shard, run)


def _make(prepared: list[Prepared], remove: bool, options: dict[str, Any]) -> Callable[[Job], list[Outcome]]:
    return functools.partial(_work, prepared, remove, options)


def _work(prepared: list[Prepared], remove: bool, options: dict[str, Any], job: Job) -> list[Outcome]:
    number, items = job
    fresh = [item for item, before in items if stamp(item.path) == before]
    # Written since: by the worker that had the job before this one and died.
    written = [item for item, before in items if stamp(item.path) != before]
    if remove:
        done = [remove_weights(item, **options) for item in (*fresh, *written)]
    else:
        done = inject(prepared[number], fresh, **options) if fresh else []
        done += inject(prepared[number], written, **{**options, "force": False}) if written else []
    late = {item.path for item in written}
    status = "removed" if remove else "written"
    return [
        dataclasses.replace(one, status=status) if one.item.path in late and one.status == "unchanged" else one
        for one in done
    ]


def _lost(job: Job, reason: str) -> list[Outcome]:
    """One line for items that share one decoding."""
    first, *rest = [item for item, _ in job[1]]
    return [Outcome(first, "problem", message=f"{first.path}: {reason}"), *(Outcome(item, "problem") for item in rest)]
