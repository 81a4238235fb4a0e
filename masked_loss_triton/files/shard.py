"""Which part of the work is this process's, when several machines share it. File names decide; the machines do not communicate."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.locks import folder_lock

# Launchers that give each of their processes a number and the count. Those of one job, then those that start several jobs:
# within each job there may be several processes.
PROCESSES = {
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "torchrun": ("RANK", "WORLD_SIZE"),
    "skypilot": ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
}
JOBS = {
    "slurm": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    "skypilot": ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS"),
}
WRITE_OUT = "give --shard I/N, with I from 0 to N-1"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0; `read_from` are the variables that said so."""

    index: int = 0
    count: int = 1
    read_from: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """For file names: 0of3."""
        return f"{self.index}of{self.count}"

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        """Whether a relative path is in this part; every path is in exactly one, on every machine."""
        return shard_of(path, self.count) == self.index


WHOLE = Shard()


def shard_of(path: str | os.PathLike[str], count: int) -> int:
    """The part, 0 to count - 1, that a relative path is in: a hash of the bytes of its name, with / between folders."""
    digest = hashlib.sha256(os.fsencode(PurePath(path).as_posix())).digest()
    return int.from_bytes(digest[:8], "big") % count


@contextlib.contextmanager
def shard_lock(
    folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], command: str, shard: Shard, run: str = ""
) -> Iterator[None]:
    """Locks folders for one shard: others of as many shards may be in them too, but the same shard only once.

    Args:
        folders: one folder or several.
        command: what others are told.
        shard: WHOLE keeps everybody out.
        run: processes that name the same run hold the lock together.

    Raises:
        UserError: naming the holder, when it is held for too long.
    """
    if shard.count == 1:
        with folder_lock(folders, command, party=run):
            yield
        return
    folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    with (
        folder_lock(folders, command, party=f"{command} in {shard.count} shards"),
        folder_lock(folders, f"{command} --shard {shard}", party=run, name=f".masked_loss.{shard.name}.lock"),
    ):
        yield


def parse_shard(text: str | None, environ: Mapping[str, str] = os.environ) -> Shard:
    """The shard that `--shard` names: I/N, "env" or the name of one launcher; the whole where it was not given.

    Raises:
        UserError: for another text, and for variables that are absent or contradict each other, with exit status 2.
    """
    if text is None:
        return WHOLE
    if text == "env" or text in {**PROCESSES, **JOBS}:
        return _from_environment(text, environ)
    index, slash, count = text.partition("/")
    if not slash:
        raise UserError(f"--shard {text!r} is no shard: {WRITE_OUT}, or env", 2)
    return _checked(index, count, (), f"--shard {text}")


def _checked(index: str, count: str, names: tuple[str, ...], where: str) -> Shard:
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
        raise UserError(f"{where} is not two whole numbers: {WRITE_OUT}", 2)
    if int(index) >= int(count):
        raise UserError(f"{where}: there is no part {index} of {count}; {WRITE_OUT}", 2)
    return Shard(int(index), int(count), names)


def _from_environment(launcher: str, environ: Mapping[str, str]) -> Shard:
    names = None if launcher == "env" else launcher
    processes = _agreed([_process(name, environ) for name in PROCESSES if names in (None, name)])
    jobs = _agreed([_job(name, environ) for name in JOBS if names in (None, name)])
    if processes is None or jobs is None:
        found = processes or jobs
        if found is None:
            tables = [table[name] for table in (PROCESSES, JOBS) for name in table if names in (None, name)]
            known = ", ".join("/".join(pair) for pair in tables)
            raise UserError(f"--shard {launcher}: none of {known} is set: {WRITE_OUT}", 2)
        return found
    # Each of several jobs has several processes.
    index = jobs.index * processes.count + processes.index
    return Shard(index, jobs.count * processes.count, jobs.read_from + processes.read_from)


def _agreed(found: list[Shard | None]) -> Shard | None:
    """What the launchers say that have more than one process; they must say the same."""
    there = [one for one in found if one is not None]
    several = [one for one in there if one.count > 1] or there
    if any(str(one) != str(several[0]) for one in several):
        said = " but ".join(f"{'/'.join(one.read_from)} says {one}" for one in several)
        raise UserError(f"--shard env: {said}: {WRITE_OUT}, or name the launcher, as in --shard torchrun", 2)
    return several[0] if several else None


def _process(launcher: str, environ: Mapping[str, str]) -> Shard | None:
    index, count = PROCESSES[launcher]
    slurm = launcher == "slurm"
    # A batch script has the number 0 and no count, or the count of the tasks that its srun would start.
    if slurm and count not in environ and environ.get(index, "0") == "0":
        return None
    shard = _pair(index, count, environ)
    if slurm and shard is not None and shard.count > 1 and "SLURM_JOB_ID" in environ and not _in_step(environ):
        raise UserError(f"--shard: {count} is {shard.count}, but srun did not start this: put srun before it", 2)
    return shard


def _in_step(environ: Mapping[str, str]) -> bool:
    return any(name in environ for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))


def _job(launcher: str, environ: Mapping[str, str]) -> Shard | None:
    index, count = JOBS[launcher]
    if launcher != "slurm" or index not in environ:
        return _pair(index, count, environ)
    # An array may begin anywhere and count in steps; one with holes does not tell which of its tasks this is.
    first, step = environ.get("SLURM_ARRAY_TASK_MIN", "0"), environ.get("SLURM_ARRAY_TASK_STEP", "1")
    last = environ.get("SLURM_ARRAY_TASK_MAX")
    tasks: Any = environ.get(count)
    try:
        place, rest = divmod(int(environ[index]) - int(first), int(step))
        holes = last is not None and tasks is not None and (int(last) - int(first)) // int(step) + 1 != int(tasks)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"--shard: the SLURM_ARRAY_TASK_ variables are no whole numbers ({error}): {WRITE_OUT}", 2
        ) from error
    if rest or holes:
        raise UserError(f"--shard: the numbers of this Slurm array have gaps: use --array=0-N, or {WRITE_OUT}", 2)
    return _pair(index, count, {**environ, index: str(place)})


def _pair(index: str, count: str, environ: Mapping[str, str]) -> Shard | None:
    if index not in environ and count not in environ:
        return None
    for name in (index, count):
        if name not in environ:
            raise UserError(f"--shard: {index} and {count} belong together, and {name} is not set: {WRITE_OUT}", 2)
    where = f"{index}={environ[index]!r}, {count}={environ[count]!r}"
    return _checked(environ[index], environ[count], (index, count), where)
