"""Work on many files with a few threads and flat memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Four threads per core, 16 at most: decoding and resizing release the interpreter lock, and waiting for the disk to
    write a cache takes as long as making its weights."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4 * count, 16)


def run_parallel(work: Callable[[T], R], jobs: Iterable[T], workers: int) -> Iterator[R]:
    """Yields the results of `work` as they come; only a few jobs per worker are in flight, so that memory stays flat."""
    waiting = iter(jobs)
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[R]] = set()
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < 2 * workers:
                    try:
                        running.add(pool.submit(work, next(waiting)))
                    except StopIteration:
                        exhausted = True
                done, running = wait(running, return_when=FIRST_COMPLETED) if running else (set(), running)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
