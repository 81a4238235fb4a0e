"""Work on many files with Ray Data: a pool of actors on this machine or on a cluster. The counterpart of `run_parallel`.

Ray gives a job out again when the actor that had it died, so `work` must see for itself what is finished already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from masked_loss_triton import __version__
from masked_loss_triton.errors import UserError, install_command

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 2  # of a job whose actor died, before it is tried once more without others beside it
BLOCKS_PER_WORKER, LARGEST_BLOCK = (
    16,
    64,
)  # jobs are given out in blocks: small ones at few jobs, so that none idles long
OBJECT_STORE = 2**27  # bytes of a local Ray: jobs and outcomes are names and numbers


def run_ray(
    make_worker: Callable[[], Callable[[T], R]],
    jobs: Sequence[T],
    lost: Callable[[T, str], R],
    *,
    guard: Callable[[T], AbstractContextManager[Any]] = contextlib.nullcontext,
    split: Callable[[T], list[T]] = lambda job: [job],
    workers: int | None = None,
    num_gpus: float | None = None,
    address: str | None = None,
    debug: bool = False,
) -> Iterator[R]:
    """Yields one outcome for each job, in no order.

    Args:
        make_worker: called once in each actor; gives what turns a job into its outcome. This, `guard` and jobs are pickled.
        jobs: what is to be done.
        lost: the outcome of a job that killed every actor that tried it, from the job and a reason.
        guard: entered for each job, in the actor: a lock, which an actor that outlives this process by seconds still holds.
        split: the parts of a job that are tried on their own when the whole killed every actor.
        workers: actors; by default one for each GPU where they use any, else one for each core.
        num_gpus: of each actor, also a fraction; None is one where the machines have any.
        address: of a running cluster, HOST:PORT or "auto"; by default RAY_ADDRESS, else a Ray of its own on this machine.
        debug: show what Ray says.

    Raises:
        UserError: when Ray is not installed, cannot be started or reached, or has no room for one worker; and what
            `make_worker` or `work` raise.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("ray://"):
        raise UserError(
            f"{address}: Ray's client cannot run Ray Data: give HOST:PORT, or send the command with `ray job submit`", 2
        )
    _reach(address)
    ray = _import(debug)
    started = not ray.is_initialized()
    if started:
        _start(ray, address, workers, debug)
    try:
        workers, num_gpus = _room(ray, workers, num_gpus)
        left = dict(enumerate(jobs))
        for alone in (False, True):
            for number, outcome in _pass(
                ray, (make_worker, guard), left, min(workers, len(left)), num_gpus, alone, debug
            ):
                if left.pop(number, None) is not None:
                    yield outcome
            left = dict(enumerate(part for job in left.values() for part in ([job] if alone else split(job))))
        for job in left.values():
            yield lost(job, f"the worker died at it, {2 * (RETRIES + 1)} times: see dmesg, it may want more memory")
    except ray.exceptions.RayError as error:
        raise _told("Ray gave up", error) from error
    finally:
        if started:
            ray.shutdown()


def _reach(address: str) -> None:
    """Refuses a cluster that does not answer; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:  # "local" or "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray answers at {address} ({error}): give HOST:PORT of its head, as `ray start` says it", 2
        ) from error


def _import(debug: bool) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not debug:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default" if debug else "ignore")
            import ray
            import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray needs the package {error.name!r}: {install_command('ray')}", 2) from error
    return ray


def _start(ray: Any, address: str, workers: int | None, debug: bool) -> None:
    level = logging.INFO if debug else logging.CRITICAL
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": debug}
    if address == "local":
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        with contextlib.nullcontext() if debug else _without_stderr():
            ray.init(address=address, **options)
    except Exception as error:
        raise _told(f"Ray cannot be started or reached at {address}", error) from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Discards what is written to standard error within, by C++ code too: Ray's logs its own settings at every log level."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _room(ray: Any, workers: int | None, num_gpus: float | None) -> tuple[int, float]:
    """The number of workers and the GPUs of each, once it is clear that there is room for one."""
    there = ray.cluster_resources()
    gpus, cores = there.get("GPU", 0), there.get("CPU", 0)
    each = float(gpus > 0) if num_gpus is None else num_gpus
    if each > gpus or cores < 1:
        raise UserError(
            f"a worker wants a core and {each:g} GPUs, and Ray has {cores:g} and {gpus:g}: lower --num_gpus", 2
        )
    return workers or max(1, int(min(cores, gpus / each) if each else cores)), each


def _pass(
    ray: Any, functions: Any, jobs: dict[int, Any], workers: int, num_gpus: float, alone: bool, debug: bool
) -> Iterator[tuple[int, Any]]:
    """Yields (number, outcome) of the jobs that did not lose their actor too often."""
    if not jobs:
        return
    if not debug:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # blocks that lost their actor too often are left out
    blocks = max(min(len(jobs), BLOCKS_PER_WORKER * workers), -(-len(jobs) // LARGEST_BLOCK))
    rows = [{"number": number, "job": pickle.dumps(job)} for number, job in jobs.items()]
    data = ray.data.from_items(rows, override_num_blocks=len(jobs) if alone else blocks).map_batches(
        Actor,
        fn_constructor_args=(pickle.dumps(functions), os.getcwd(), __version__),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=workers,
            initial_size=workers,
            # A job that waits in an actor behind one that kills it would be counted as lost with it.
            max_tasks_in_flight_per_actor=1 if alone else 2,
        ),
        num_cpus=1,
        num_gpus=num_gpus,
        ray_remote_args_fn=_remote_options,
    )
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            kind, outcome, trace = pickle.loads(row["outcome"])
            if kind == "error":
                raise outcome from RuntimeError(f"in a worker of Ray:\n{trace}")
            yield row["number"], outcome


def _remote_options() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": RETRIES}


def _told(what: str, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"{what} ({reason}): --debug shows more")


def stamp(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What tells a file or folder from the one that took its place, the same on every machine; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class Actor:
    """One worker, in a process of its own. What goes wrong is an answer like any other: an actor that raises is restarted."""

    def __init__(self, functions: bytes, folder: str, version: str) -> None:
        self.answer: tuple[str, Any, str] | None = None
        try:
            self.raylet = os.getppid()
            self.work, self.guard = self._made(functions, folder, version)
        except Exception as error:
            self.answer = _error(error)

    @staticmethod
    def _made(functions: bytes, folder: str, version: str) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        node = os.uname().nodename if hasattr(os, "uname") else "a machine"
        if version != __version__:
            raise UserError(
                f"{node} has masked_loss_triton {__version__}, this one {version}: install the same on both", 2
            )
        try:
            os.chdir(folder)  # paths may be relative
        except OSError as error:
            raise UserError(f"{node} has no folder {folder}: start in one that every machine sees", 2) from error
        make_worker, guard = pickle.loads(functions)
        return make_worker(), guard

    def __call__(self, batch: Any) -> Any:
        import pyarrow

        answers = [pickle.dumps(self._answer(row)) for row in batch["job"].to_pylist()]
        return pyarrow.table({"number": batch["number"], "outcome": pyarrow.array(answers, pyarrow.binary())})

    def _answer(self, job: bytes) -> tuple[str, Any, str]:
        if self.answer is not None:
            return self.answer
        try:
            unpickled = pickle.loads(job)
            self._exit_if_ray_is_dead()
            with self.guard(unpickled):
                self._exit_if_ray_is_dead()
                return "outcome", self.work(unpickled), ""
        except Exception as error:
            return _error(error)

    def _exit_if_ray_is_dead(self) -> None:
        """Ends this process when the Ray node that started it is gone: another worker may have been given the same job."""
        if os.getppid() != self.raylet:
            os._exit(1)


def _error(error: Exception) -> tuple[str, Any, str]:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # some exceptions cannot be pickled
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return "error", error, traceback.format_exc()
