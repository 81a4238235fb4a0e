"""Makes masks with workers of Ray; the counterpart of `generate_masks`."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from masked_loss_triton.files.ray_engine import run_ray, stamp
from masked_loss_triton.files.shard import Shard, shard_lock
from masked_loss_triton.generate.backends import entries
from masked_loss_triton.generate.batches import Done, Generation, Worker
from masked_loss_triton.generate.jobs import Job

Batch = list[tuple[Job, tuple[int, ...] | None]]  # each with the stamp of its target when the run began


def generate_masks_on_ray(
    jobs: Sequence[Job], generation: Generation, shard: Shard, run: str, **options: Any
) -> Iterator[Done]:
    """Makes and writes the masks of the jobs; yields what became of each, as they are done.

    Args:
        jobs: what is to be done.
        generation: how; each worker of Ray makes its own from it.
        shard: the part of the work that these jobs are.
        run: the name under which the caller holds `shard_lock`.
        options: of `run_ray`: workers, num_gpus, address, debug.
    """
    batches = [[(job, stamp(job.target)) for job in batch] for batch in generation.batches(jobs)]
    if generation.device == "cpu" or all(entry.on_the_cpu for entry in entries(generation.backend)):
        options["num_gpus"] = options.get("num_gpus") or 0.0
    guard = functools.partial(_guard, generation.masks, shard, run)
    for finished in run_ray(functools.partial(_make, generation), batches, _lost, split=_split, guard=guard, **options):
        yield from finished


def _guard(masks: Path, shard: Shard, run: str, batch: Batch) -> AbstractContextManager[None]:
    return shard_lock(masks, "masked-loss generate", shard, run)


def _make(generation: Generation) -> Callable[[Batch], list[Done]]:
    return functools.partial(_work, generation.worker())


def _work(worker: Worker, batch: Batch) -> list[Done]:
    """Does what a worker that died has not done."""
    finished, jobs = [], []
    for job, before in batch:
        done = worker.written_since(job) if stamp(job.target) != before else None
        if done is not None:
            finished.append(done)
        else:
            # Where nothing was found, an older mask may have been taken away.
            jobs.append(dataclasses.replace(job, masks=tuple(path for path in job.masks if os.path.lexists(path))))
    return finished + (worker.run(jobs) if jobs else [])


def _split(batch: Batch) -> list[Batch]:
    return [[one] for one in batch]


def _lost(batch: Batch, reason: str) -> list[Done]:
    return [Done(job, "problem", f"{job.source}: {reason}") for job, _ in batch]
